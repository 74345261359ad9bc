"""The part of a configuration that is about a stage: see config.py, from which it is imported."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    """Rollout batches over which the learning rate rises, whatever objective.epochs."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Global gradient norm above which the gradient is scaled down."""


@dataclasses.dataclass(frozen=True)
class CreditConfig:
    terms: tuple[tuple[Literal["slate", "rank"], str, float], ...] = (
        ("slate", "recall", 1.0),
        ("rank", "ndcg", 1.0),
    )
    """(phase, reward, weight), repeated: which reward trains which phase."""
    normalise: Literal["none", "each", "sum"] = "none"
    """none: centred by the group; each / sum: divided by the group's std, before / after summing."""
    scheme: Literal["group", "outcome", "to_go", "to_go_state", "exact", "labels"] = "group"
    """What an action is credited with (fgrpo_jax/algorithm/credit.py): its phase's reward less the group's mean; for
    rankings less the mean over slates alike; what its item and later ones bring, less the siblings' at the same place,
    or in the same state; the gain of every choice by its probability, or by its logarithm."""
    shrinkage: float = 1.0
    """Siblings that the mean of all siblings counts for, where a baseline is a mean over those alike."""


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    name: str = "clipped_pg"
    """clipped_pg, nll or group_softmax (GoalRank)."""
    weighting: Literal["token", "phase", "constant"] = "token"
    """Loss weight of an action. token: 1 / all trained tokens of the batch. phase: those of a phase of a rollout sum
    to 1 / (phases of rollouts that have trained tokens). constant: 1 / (rollouts x tokens that transcripts of the
    batch are padded to), the same at every step only if transcript.identifier_width is that of the longest identifier
    (`data check` tells it): else a batch of longer names has smaller gradients."""
    ratio: Literal["token", "phase", "sequence"] = "phase"
    """Level at which the importance ratio is formed and clipped."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.0
    """Weight of the KL penalty to the policy of `kl_reference`."""
    kl_reference: Literal["start", "base"] = "start"
    """What the stage started from, kept beside it; or the base of adapters without any, which costs no memory."""
    sigma: float = 0.0
    """GoalRank keeps a group only if its rewards differ by more than this."""
    normalised: bool = True
    """GoalRank divides a group's rewards, less their mean, by their standard deviation; else it takes them as
    they are."""
    epochs: int = 1
    """Updates per rollout batch; above 1 the old log-probabilities that ratios are taken to are recomputed once."""


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    fill: Literal["first", "shuffled"] = "shuffled"
    """Slate target: relevant candidates first in gain order and then fill, or all shuffled.
    Fill is drawn uniformly from the rest of the pool, up to transcript.slate_min; the ranking
    is the relevant candidates in gain order, filled from the slate up to rank_min."""
    train_fill: bool = False
    """Whether the loss counts the tokens of fill items too."""


@dataclasses.dataclass(frozen=True)
class StageConfig:
    steps: int = 0
    """Rollout batches; 0 skips the stage."""
    policy: str = "llm"
    """Which of the system's policies it trains (a language model's run has one, `llm`)."""
    starts_from: str = "previous"
    """Where its parameters come from: the best checkpoint of the stage of this name; `previous`: of the last
    one before it that trains the same policy; `initial`: the policy's own start, also where none does."""
    frozen_from: tuple[str, ...] = ()
    """Earlier stages whose best parameters rewards and proposals read while it trains, unchanged."""
    source: Literal["logged", "sampled", "mixed"] = "sampled"
    """Rollouts written from the labels of the data, sampled from the policy, or sampled and proposed."""
    batch_queries: int = 64
    """Queries per step, over all devices and hosts."""
    group_size: int = 8
    """Rollouts per query."""
    microbatches: int = 1
    """Parts the batch is split into while gradients accumulate; never changes the gradient."""
    subset: tuple[float, float] = (0.0, 1.0)
    """Share of the training queries the stage sees, by hash of their user or query id."""
    eval_every: int = 100
    """Steps between evaluations on the validation split (each also saves a checkpoint)."""
    patience: int = 0
    """Stop after this many evaluations without improvement; 0: never."""
    metric: Literal["", "likelihood"] = ""
    """Chooses the stage's best checkpoint, and decides its patience: eval.metric where empty; likelihood: the mean
    log-likelihood of what is learnt in the validation queries, per action (source "logged" only)."""
    optim: OptimConfig = OptimConfig()
    credit: CreditConfig = CreditConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    target: TargetConfig = TargetConfig()
