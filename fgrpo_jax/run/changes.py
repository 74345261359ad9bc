"""What may change between two starts of one run: only what keeps the meaning of what was done.

    where things lie, what is logged, shown and kept, how it is computed    at any time (ALWAYS)
    steps of a stage     more than are done, where the learning rate does not depend on them
    patience of a stage  more of it: up to where it ended nothing would have been otherwise
    all of a stage       that has not begun, nor has one that starts from it or reads it beside itself

A stage that ended and has more steps (or patience) now is reopened: it goes on from its last
checkpoint, and becomes the run that had them from the start, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fgrpo_jax.config import RunConfig, StageConfig
from fgrpo_jax.config_files import differences
from fgrpo_jax.stages import stages, start_of

ALWAYS = {
    "run_dir", "data.manual_dir", "data.prepared_dir", "compilation_cache", "keep_memory", "log_every", "trackers",
    "model.attention", "model.remat", "model.logit_chunk", "network.remat",
    "selection.lists", "selection.sizes", "mesh.data", "mesh.fsdp", "mesh.tensor",
    "eval.split", "eval.cutoffs", "eval.metrics", "eval.batch_queries", "eval.baselines", "eval.bootstrap",
    "eval.rewards", "eval.versus", "eval.prompted", "eval.transcripts",
    "checkpoint.every", "checkpoint.keep",
}  # fmt: skip
CHOOSING = {"eval.queries", "eval.train_queries", "eval.metric"}
OF_A_STAGE = {"eval_every", "microbatches"}  # at any time


class Reached(NamedTuple):
    """How far a stage is: the steps of its latest checkpoint (None: not begun) and of its end (None: on its way)."""

    latest: int | None
    ended: int | None


def refused(old: RunConfig, new: RunConfig, reached: Mapping[str, Reached]) -> list[str]:
    """Every difference that is not allowed, as `rl.steps: 100 -> 200`, with its reason where it has one.

    reached: of every stage, in their order.
    """
    lines = []
    for name, line in differences(old, new).items():
        reason = _reason(name, old, new, reached)
        if reason is not None:
            lines.append(f"{line} ({reason})" if reason else line)
    return lines


def _reason(name: str, old: RunConfig, new: RunConfig, reached: Mapping[str, Reached]) -> str | None:
    """Why a field may not change, perhaps empty; None where it may."""
    stage, _, field = name.partition(".")
    if name in ALWAYS:
        return None
    if name in CHOOSING:
        return "by it checkpoints were chosen; eval.py may be given another"
    if stage not in reached:
        return ""
    if field in OF_A_STAGE:
        return None
    readers = [other for other in reached if reached[other].latest is not None and _reads(other, stage, (old, new))]
    if reached[stage].latest is None and not readers:
        return None
    before, after, here = getattr(old, stage), getattr(new, stage), reached[stage]
    if field not in ("steps", "patience") or here.latest is None:
        return ""
    if field == "steps" and before.optim.decay != "constant":
        return f"the learning rate of every step depends on it, as {stage}.optim.decay={before.optim.decay!r}"
    if field == "steps" and after.steps <= here.latest:
        return f"{here.latest} are done: choose more"
    if field == "patience" and not _more_patient(before, after):
        return ""
    if not reopens(before, after, here):
        return None
    if here.ended is not None and here.latest != here.ended:
        return f"its last checkpoint, of step {here.ended}, is gone"
    if readers:
        return f"{readers[0]} was trained with its result: choose another run_dir, or remove {readers[0]}/ there"
    return None


def _reads(name: str, stage: str, configs: tuple[RunConfig, ...]) -> bool:
    """Whether a stage takes parameters from `stage`, to start or to keep beside it, in one of these configurations."""
    return any(stage == start_of(config, name) or stage in stages(config)[name].frozen_from for config in configs)


def _more_patient(before: StageConfig, after: StageConfig) -> bool:
    return bool(before.patience) and (not after.patience or after.patience > before.patience)


def reopens(before: StageConfig, after: StageConfig, here: Reached) -> bool:
    """Whether a stage that came to its end is to go on."""
    if here.ended is not None and here.ended < before.steps:  # by its patience
        return _more_patient(before, after)
    return before.steps in here and before.steps < after.steps
