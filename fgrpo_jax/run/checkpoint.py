"""Checkpoints of one stage (Orbax), and what to do when the machine is taken away.

A step is a folder that appears, complete, by one rename: a process killed while saving
leaves a `*.orbax-checkpoint-tmp` folder that nobody reads. It goes by one rename too, into
`deleted/`, which is emptied before the next save, so that a process killed while deleting leaves
no half of a step. At an address (gs://…), where nothing is renamed, a step is complete while
`commit_success.txt` lies in it, which is written last and taken away first.

A checkpoint holds the train state and `meta`: JSON with whatever the caller needs to resume
(config, fingerprints of the data). That they fit the run at hand is for the caller to check.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from fgrpo_jax.config import ConfigError
from fgrpo_jax.files import is_address, path_of, storing, write_atomically
from fgrpo_jax.types import PyTree

_PINNED, _DELETED = "pinned.json", "deleted"
_COMPLETE = "commit_success.txt"  # Orbax's name for it


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # `preemption` alone asks: hosts agree on a stop by counting these questions, and a
        # second asker that counts otherwise (Orbax does, in every save) breaks the count.
        del step
        return False


class _Keep:
    """Orbax's preservation policy by our own rule (`Checkpoints.kept`)."""

    def __init__(self, rule: Callable[[Sequence[int]], set[int]]):
        self._rule = rule

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self._rule([info.step for info in checkpoints])
        return [info.step in kept for info in checkpoints]


class Checkpoints:
    """The checkpoints in one directory. All processes make the same calls in the same order.

    Kept are the latest `keep_latest`, the one with the largest metric (the earliest of
    equals), and the pinned ones; others go once a newer one is complete. `directory` may
    be any path epath knows (gs://…) and is made if missing.

    read_only: for a directory somebody else may be writing to, as evaluation during
        training: makes, sweeps and deletes nothing; the directory has to exist.

    Raises ValueError when `keep_latest` is below 1, OSError when the directory cannot be
    made or, read-only, is missing.
    """

    def __init__(self, directory: str | epath.Path, keep_latest: int, read_only: bool = False):
        if keep_latest < 1:
            raise ValueError(f"keep_latest={keep_latest}: without the latest checkpoint nothing can resume")
        self._directory = _place(directory)
        self._keep_latest, self._read_only = keep_latest, read_only
        if read_only and not self._directory.is_dir():
            raise FileNotFoundError(f"no checkpoints at {self._directory}: there is no such directory")
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Keep(set if is_address(directory) else self.kept),  # see _prune
            cleanup_tmp_directories=not read_only,  # what an earlier, killed process left
            create=not read_only,
            read_only=read_only,
            todelete_subdir=None if read_only else _DELETED,
            enable_async_checkpointing=True,
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        with storing(self._directory):
            self._manager = _Manager(self._directory, options=options, item_handlers=handlers)
        if not read_only:
            self._empty_deleted()
        self._metrics = {step: self._read(step)["metric"] for step in self._manager.all_steps()}

    # ------------------------------------------------------------------ writing

    def save(self, step: int, state: PyTree, meta: dict[str, Any], metric: float | None) -> bool:
        """Start saving, and return once the state was copied off the devices.

        metric: validation quality, larger is better; None where it was not measured.
        False, and nothing is written, where `step` was saved before. An error of the save
        before this one (disk full) is raised here, by `wait` or by `close`, as StorageError.
        Raises ValueError when the metric is not finite, or the step older than the latest.
        """
        if metric is not None and not math.isfinite(metric):
            raise ValueError(f"step {step}: metric {metric} is not finite; a best checkpoint could not be told")
        latest = self.latest_step()
        if step in self._metrics:
            return False
        if latest is not None and step < latest:
            raise ValueError(f"step {step} comes after step {latest} was saved in {self._directory}")
        there = set(self._manager.all_steps())  # of the others the metric is not asked again
        self._metrics = {old: value for old, value in self._metrics.items() if old in there} | {step: metric}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave({"meta": meta, "metric": metric})
        )
        with storing(self._directory, Exception):  # Orbax and TensorStore raise ValueErrors
            self._manager.wait_until_finished()
            self._prune()
            self._empty_deleted()  # or its space would be missing
            return self._manager.save(step, args=items, force=True)

    def pin(self, step: int) -> None:
        """Keep this checkpoint whatever comes later, in this and in every later process."""
        if step not in self._metrics:
            raise ValueError(f"no checkpoint of step {step} in {self._directory}; there are {self.steps()}")
        pinned = sorted({*self.pinned(), step})
        if jax.process_index() == 0:
            write_atomically(self._directory / _PINNED, json.dumps(pinned))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"pin {step}")

    def wait(self) -> None:
        """Until the save under way is complete on disk. Raises StorageError where it went wrong."""
        with storing(self._directory, Exception):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and stop the background threads. Raises as `wait`."""
        with storing(self._directory, Exception):
            self._prune()
            self._manager.close()
            if not self._read_only:
                self._empty_deleted()

    def _prune(self) -> None:
        """At an address, let go of complete checkpoints that are not kept; elsewhere Orbax does, by a rename.

        A process killed amid it leaves what is not complete, which nobody reads and the next one sweeps.
        """
        if self._read_only or not is_address(self._directory):
            return
        self._manager.wait_until_finished()
        for step in sorted({*self.steps()} - self.kept(self.steps())):
            if jax.process_index() == 0:
                (self._directory / str(step) / _COMPLETE).unlink()
            self._manager.delete(step)

    def _empty_deleted(self) -> None:
        place = self._directory / _DELETED
        if jax.process_index() == 0 and place.is_dir():
            with storing(place):
                place.rmtree()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    # ------------------------------------------------------------------ reading

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def pinned(self) -> set[int]:
        path = self._directory / _PINNED
        return set(json.loads(path.read_text())) if path.exists() else set()

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step of the largest metric, the earliest of equals; None when none has one."""
        return self._best(self.steps())

    def _best(self, steps: Sequence[int]) -> int | None:
        measured = [step for step in steps if self._metrics[step] is not None]
        return max(measured, key=lambda step: (self._metrics[step], -step), default=None)

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Which of these steps stay."""
        return {*sorted(steps)[-self._keep_latest :], self._best(steps), *self.pinned()} & set(steps)

    def forget_metric(self, step: int) -> None:
        """It is no longer a candidate for the best, in this process."""
        self._metrics[step] = None

    def metric(self, step: int) -> float | None:
        return self._metrics[step]

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given. Raises FileNotFoundError when there is no such step."""
        self.wait()
        return self._read(step)["meta"]

    def _read(self, step: int) -> dict[str, Any]:
        self._check_exists(step)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        except (KeyError, ValueError, FileNotFoundError) as error:
            place = self._directory / str(step)
            raise ConfigError(
                f"the checkpoint {place} is not whole ({error}): copy it again from where it was made, or remove it"
            ) from error

    def restore(self, step: int, abstract_state: PyTree) -> PyTree:
        """The saved state, bit for bit, as `abstract_state` wants it laid out.

        abstract_state: ShapeDtypeStructs with shardings (of any mesh), in the tree that was
        saved. Raises FileNotFoundError when there is no such step, ValueError with the names
        when the tree, a shape or a type differs from what was saved (Orbax would convert).
        """
        self.wait()
        self._check_exists(step)
        self._check_fits(step, abstract_state, everything=True)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        return self._manager.restore(step, args=args)["state"]

    def restore_part(self, step: int, wanted: dict[str, PyTree]) -> dict[str, PyTree]:
        """Some branches of a saved state, as `{"params": ...}` without the optimizer's.

        wanted: ShapeDtypeStructs with shardings. Raises as `restore`.
        """
        self.wait()
        self._check_exists(step)
        self._check_fits(step, wanted, everything=False)
        places = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=places, partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(self._directory / str(step) / "state", args=args)

    def _check_exists(self, step: int) -> None:
        if step not in self._manager.all_steps():
            raise FileNotFoundError(f"no checkpoint of step {step} in {self._directory}; there are {self.steps()}")

    def _check_fits(self, step: int, wanted: PyTree, everything: bool) -> None:
        saved = _described(self._manager.item_metadata(step)["state"].tree)
        asked = _described(wanted)
        compared = {*saved, *asked} if everything else {*asked}
        names = sorted(name for name in compared if saved.get(name) != asked.get(name))
        if names:
            found = [f"{n}: saved {saved.get(n, 'nothing')}, asked for {asked.get(n, 'nothing')}" for n in names]
            rest = [f"and {len(names) - 5} more"] if len(names) > 5 else []
            raise ValueError(
                f"checkpoint of step {step} in {self._directory} was written for another model or "
                f"optimizer:\n  " + "\n  ".join(found[:5] + rest)
            )


def _described(tree: PyTree) -> dict[str, str]:
    """Name of each array -> type and shape; the same for a state and for what Orbax saved of it."""
    return {name: f"{x.dtype} {x.shape}" for name, x in ocp.tree.to_flat_dict(tree, sep=".").items()}


def steps_in(directory: str | epath.Path) -> list[int]:
    """The steps of complete checkpoints; none where there is no such directory."""
    directory = _place(directory)
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []


def unpin(directory: str | epath.Path) -> None:
    """Keep no checkpoint any longer only because it was pinned. Only while no `Checkpoints` is open there."""
    (_place(directory) / _PINNED).unlink(missing_ok=True)


def _place(directory: str | epath.Path) -> epath.Path:
    """As Orbax wants it."""
    path = path_of(directory)
    return path if is_address(path) else epath.Path(path.absolute())


def placed(shapes: PyTree, shardings: PyTree) -> PyTree:
    """ShapeDtypeStructs, each with its sharding: what `restore` asks for."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings)


# --------------------------------------------------------------------- preemption


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """`with preemption() as stop:` and, once a step, `if stop(): save and leave`.

    SIGTERM no longer ends the process but makes `stop()` true. In one process that is a
    handler of ours, put back on leaving (main thread only). With several, JAX's preemption
    service hears the signal on any host and picks a step for all of them: every process
    must ask equally often, from the same step on, and some more steps may pass.
    """
    asked, reached = 0, False  # JAX says yes at one step only; we go on saying it

    def agreed() -> bool:
        nonlocal asked, reached
        asked += 1
        reached = multihost_utils.reached_preemption_sync_point(asked) or reached
        return reached

    if jax.process_count() > 1:
        yield agreed  # a handler of ours would take the signal away from JAX's service
        return
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        yield lambda: bool(heard)
    finally:
        signal.signal(signal.SIGTERM, before)
