"""What makes a ranker's configuration impossible."""

from __future__ import annotations

import math

from fgrpo_jax.config import StageConfig, TargetConfig
from fgrpo_jax.policies.ranker.config import NetworkConfig, RankerConfig
from fgrpo_jax.policies.ranker.proposals import PROPOSALS, READS
from fgrpo_jax.policies.ranker.scorers import REWARDS
from fgrpo_jax.stages import stages

_READS = {name: stage for name, (stage, _) in REWARDS.items()}  # of a learned reward: the stage that it reads


def problems(config: RankerConfig) -> list[str]:
    found = [*_network(config.network), *_proposals(config), *_selection(config), *_rerankers(config), *_bias(config)]
    for name, stage in stages(config).items():
        if stage.steps:
            found += _stage(config, name, stage)
        if name in {*_READS.values(), "generators"} and stage.policy != name:
            found.append(f"{name}.policy={stage.policy!r}: this stage is read as the {name}; leave it at {name!r}")
    if config.reward.rules:
        found.append("reward.rules: a ranker's lists cannot break a rule; leave it empty")
    return found


def _network(n: NetworkConfig) -> list[str]:
    found = []
    for name in ("hidden_size", "num_layers", "num_heads", "mlp_size", "list_length", "beam"):
        if getattr(n, name) < 1:
            found.append(f"network.{name}={getattr(n, name)} must be at least 1")
    if n.list_layers < 0:
        found.append(f"network.list_layers={n.list_layers} must not be negative")
    if n.num_heads > 0 and n.hidden_size % n.num_heads:
        found.append(f"network.hidden_size={n.hidden_size} must be a multiple of num_heads={n.num_heads}")
    if not (math.isfinite(n.init_std) and n.init_std > 0):
        found.append(f"network.init_std={n.init_std} must be positive")
    return found


def _proposals(config: RankerConfig) -> list[str]:
    p, found = config.proposals, []
    for name, count in p.mix:
        if name not in PROPOSALS:
            found.append(f"proposals.mix: {name!r} is not one of {', '.join(PROPOSALS)}")
        if count < 1 or (name == "evaluator" and count > 1):
            found.append(f"proposals.mix: {count} lists of {name!r}; ask for at least one, and of 'evaluator' for one")
    if not (0 <= p.noise < math.inf and 0 <= p.mmr_lambda <= 1):
        found.append("proposals: noise must be >= 0 and finite, mmr_lambda in [0, 1]")
    return found


def _selection(config: RankerConfig) -> list[str]:
    s, found = config.selection, []
    if s.generators < 1 or s.lists < 1:
        found.append("selection.generators and selection.lists must be at least 1")
    if len(set(s.sizes)) < len(s.sizes) or any(not 1 <= count <= s.generators for count in s.sizes):
        found.append(f"selection.sizes={s.sizes} must differ, from 1 to selection.generators={s.generators}")
    if len({f"{weight:g}" for weight in s.mmr}) < len(s.mmr) or any(not 0 <= weight <= 1 for weight in s.mmr):
        found.append(f"selection.mmr={s.mmr} must be different weights in [0, 1]")
    return found


def _rerankers(config: RankerConfig) -> list[str]:
    if config.dlcm.steps and not config.network.sees_retrieval:
        return [
            "dlcm reads the pool in the first stage's order, which network.sees_retrieval=false hides: dlcm.steps=0"
        ]
    return []


def _bias(config: RankerConfig) -> list[str]:
    b = config.bias
    if not math.isfinite(b.weight):
        return [f"bias.weight={b.weight} must be finite"]
    if (b.kind == "none") != (b.weight == 0):
        return [f"bias: kind={b.kind!r} with weight={b.weight}; give both, or neither"]
    trained = [(name, stage) for name, stage in stages(config).items() if stage.steps]
    if b.kind != "none" and not any(name == "evaluator" or "evaluator" in stage.frozen_from for name, stage in trained):
        return [f"bias.kind={b.kind!r}: no stage that is trained reads the evaluator; leave it at 'none'"]
    return []


def _stage(config: RankerConfig, name: str, stage: StageConfig) -> list[str]:
    """Whether what it proposes and what rewards it is frozen beside it."""
    found, needs = [], {}
    if stage.target != TargetConfig():
        found.append(f"{name}.target: a ranker imitates network.labels, and reads no target: leave it as it is")
    if stage.source == "mixed":
        proposed = sum(count for _, count in config.proposals.mix)
        if stage.group_size <= proposed:
            found.append(
                f"{name}.group_size={stage.group_size} has no room for own samples beside the {proposed} lists of "
                "proposals.mix"
            )
        needs |= {f"proposal {one!r}": READS[one] for one, _ in config.proposals.mix if one in READS}
        if stage.objective.name == "clipped_pg":
            found.append(
                f"{name}.source='mixed': the policy gradient of clipped_pg is of lists that the policy drew itself, "
                "which proposals are not: use source='sampled', or objective.name='group_softmax'"
            )
    if stage.source != "logged":
        needs |= {f"reward {reward!r}": _READS[reward] for _, reward, _ in stage.credit.terms if reward in _READS}
    for what, network in needs.items():
        if network not in stage.frozen_from:
            found.append(f"{name}: {what} reads the stage {network!r}, so name it in {name}.frozen_from")
    if stage.policy == "generator" and stage.source != "logged" and stage.credit.scheme not in ("group", "to_go"):
        found.append(
            f"{name}.credit.scheme={stage.credit.scheme!r} reads the slate of a ranking, and a generator writes none: "
            "use group or to_go, or policy two_phase"
        )
    if stage.policy == "generator" and stage.source != "logged":
        if any(phase == "slate" for phase, _, _ in stage.credit.terms):
            found.append(f"{name}.credit.terms: its lists are rankings, with no slate phase; use rank, or two_phase")
    return found
