"""The configuration of a ranker's run. Nothing here imports JAX."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from fgrpo_jax.config import (
    CreditConfig,
    EvalConfig,
    ObjectiveConfig,
    OptimConfig,
    RewardConfig,
    RunConfig,
    StageConfig,
)


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Sizes that generator, evaluator and point-wise network have in common."""

    hidden_size: int = 64
    num_layers: int = 1
    """Of the trunk, which reads histories and pools."""
    list_layers: int = 1
    """Of the generator over the steps of a list; the other networks have as many more in the trunk."""
    num_heads: int = 4
    mlp_size: int = 128
    list_length: int = 6
    """L: items of a list."""
    sees_retrieval: bool = True
    """Whether the first stage's score of a candidate is read: by all networks, or by none."""
    causal_history: bool = False
    """An item of the history sees only the ones before it."""
    labels: Literal["relevance", "feedback"] = "relevance"
    """What imitation and the point-wise network learn: all labels of a pool, or the feedback in shown lists."""
    beam: int = 1
    """Lists kept in decoding for evaluation; 1: the most probable item at each step."""
    init_std: float = 0.02
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False


@dataclasses.dataclass(frozen=True)
class ProposalsConfig:
    mix: tuple[tuple[str, int], ...] = (
        ("retriever", 2),
        ("pointwise", 2),
        ("mmr_topics", 2),
        ("evaluator", 1),
        ("perturbed", 4),
        ("random", 1),
    )
    """(proposal, lists), repeated: the auxiliary set M of a "mixed" group (proposals.py says what they are);
    the rest of the group are the generator's own samples, which come first."""
    noise: float = 0.5
    """Of further lists of one proposal, in standard deviations of its scores."""
    mmr_lambda: float = 0.7
    """Weight of relevance against redundancy in maximal marginal relevance."""


@dataclasses.dataclass(frozen=True)
class BiasConfig:
    """What is wrong with the reward model on purpose, wherever lists are chosen, learned or judged by it."""

    kind: Literal["none", "noise", "popularity", "position", "shift"] = "none"
    """scorers.reward_of_lists says what each does."""
    weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class SelectionConfig:
    """Rows of an evaluation that are made of trained stages.

    Generator-evaluators: of the lists of one generator or several, the evaluator's best. Also scores re-ordered for
    diversity.
    """

    generators: int = 3
    """Of the stage `generators`."""
    sizes: tuple[int, ...] = (1, 3)
    """How many of them a row chooses from: `g_e` from the first, `mg_e_3` from the first three."""
    lists: int = 24
    """That a row chooses from, as many of each generator and one of each at least: its most probable ones, found
    by a beam."""
    mmr: tuple[float, ...] = ()
    """Rows `mmr_0.8`: lists by maximal marginal relevance, the point-wise network's scores against the same topic
    twice, at these weights of the scores. They read topics, which no network does."""


_JUDGE = StageConfig(
    source="logged",
    group_size=1,
    starts_from="initial",
    objective=ObjectiveConfig(name="nll"),
    optim=OptimConfig(learning_rate=1e-3),
)
_IMITATION = dataclasses.replace(_JUDGE, policy="generator")
_LEARNED = CreditConfig(terms=(("rank", "reward_model", 1.0),))
_GROUPS = StageConfig(
    policy="generator",
    source="mixed",
    group_size=20,
    starts_from="initial",
    frozen_from=("evaluator", "pointwise"),
    credit=_LEARNED,
    objective=ObjectiveConfig(name="group_softmax", weighting="phase"),
    optim=OptimConfig(learning_rate=1e-3),
)


@dataclasses.dataclass(frozen=True)
class RankerConfig(RunConfig):
    """Rankers of catalogue items: a reward model of lists, and generators of lists that learn from it."""

    SYSTEM: ClassVar[str] = "ranker"
    SHOWN_LISTS: ClassVar[bool] = True

    run_dir: str = "runs/goalrank"
    network: NetworkConfig = NetworkConfig()
    proposals: ProposalsConfig = ProposalsConfig()
    selection: SelectionConfig = SelectionConfig()
    bias: BiasConfig = BiasConfig()
    reward: RewardConfig = RewardConfig(k=6)
    eval: EvalConfig = EvalConfig(metric="ndcg@6", cutoffs=(1, 3, 6), versus="pointwise")
    evaluator: StageConfig = dataclasses.replace(_JUDGE, policy="evaluator", metric="likelihood")
    """The reward model, fitted to the feedback that shown lists had."""
    pointwise: StageConfig = dataclasses.replace(_JUDGE, policy="pointwise")
    """A score of each candidate by itself."""
    dlcm: StageConfig = dataclasses.replace(_JUDGE, policy="dlcm")
    prm: StageConfig = dataclasses.replace(_JUDGE, policy="prm")
    """Rerankers of the pool: scores of candidates beside the others (rerankers.py)."""
    imitation: StageConfig = _IMITATION
    """The generator by imitation (nll) of the positive candidates."""
    generators: StageConfig = dataclasses.replace(_JUDGE, policy="generators")
    """Several more by imitation, from random starts of their own, for the generator-evaluators."""
    two_phase: StageConfig = dataclasses.replace(_JUDGE, policy="two_phase")
    """A generator of slate, then ranking, by imitation: where F-GRPO starts."""
    goalrank: StageConfig = _GROUPS
    """The generator by GoalRank."""
    grpo: StageConfig = dataclasses.replace(
        _GROUPS, source="sampled", frozen_from=("evaluator",), objective=ObjectiveConfig()
    )
    """The generator by GRPO on the reward model."""
    fgrpo: StageConfig = dataclasses.replace(
        _GROUPS,
        policy="two_phase",
        starts_from="previous",
        source="sampled",
        frozen_from=("evaluator",),
        credit=CreditConfig(terms=(("slate", "recall", 1.0), ("rank", "reward_model", 1.0))),
        objective=ObjectiveConfig(),
    )
    """A generator of slate, then ranking, by F-GRPO: coverage, then the reward model."""

    def limits(self) -> tuple[int, int]:
        return self.network.list_length, self.network.list_length
