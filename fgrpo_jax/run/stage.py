"""What surrounds the loop of a stage: starting, logging, evaluating, saving, stopping."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils

from fgrpo_jax.config_files import to_json
from fgrpo_jax.files import write_atomically
from fgrpo_jax.run.checkpoint import Checkpoints, placed
from fgrpo_jax.run.experiment import Experiment, initial_params
from fgrpo_jax.run.finished import best_params, frozen_params, source_of
from fgrpo_jax.run.log import MetricsLog
from fgrpo_jax.run.meter import Meter, Validation
from fgrpo_jax.run.progress import Progress
from fgrpo_jax.stages import reference_of, stages
from fgrpo_jax.types import Mean, PyTree, RankingExample, TrainState


class Stage:
    """One stage on its way: `state` and `frozen` to start from, `on_step` after every step.

    Everything it knows can be rebuilt from the run directory, so a resumed stage goes on bit
    for bit: from the latest checkpoint the train state, and the sums of the steps that were
    not logged yet; from metrics.jsonl the evaluations.

    optimizer, state_at: as train.make_step returns them.
    """

    def __init__(
        self,
        experiment: Experiment,
        name: str,
        optimizer: optax.GradientTransformation,
        state_at: TrainState,
        run_dir: Path,
        log: MetricsLog,
    ):
        self.name, self.stage, self._experiment = name, stages(experiment.config)[name], experiment
        self._config, self._run_dir, self._dir, self._log = experiment.config, run_dir, run_dir / name, log
        self._optimizer, self._state_at = optimizer, state_at
        self._is_main = jax.process_index() == 0
        self.finished = False

    def __enter__(self) -> Stage:
        with contextlib.ExitStack() as stack:
            self._checkpoints = stack.enter_context(
                Checkpoints(self._dir / "checkpoints", self._config.checkpoint.keep)
            )
            for step in self._checkpoints.steps():
                # An earlier version kept the metric of what was evaluated only because it was the last step.
                if step % self._checkpoints.meta(step)["config"][self.name]["eval_every"]:
                    self._checkpoints.forget_metric(step)
            latest = self._checkpoints.latest_step()
            self.state, self.frozen = self._start(latest)
            self._step = int(self.state.step)
            progress = Progress(self.name, self._step, self.stage.steps, self.stage.batch_queries, self._is_main)
            stack.callback(progress.close)
            self._validation = Validation(self._experiment, self.name, self._log, progress)
            self._validation.resume(latest)
            self._meter = Meter(self._experiment, self.name, self._log, progress)
            if latest is not None:
                self._meter.restore(self._checkpoints.meta(latest).get("unlogged", {}))
            if latest is None and self._validation.examples:
                self._evaluate_and_save(self.state, 0)
            elif latest and self._validation.is_over(latest):  # killed between its last checkpoint and done.json
                self._finish(latest)
            self._exits = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exits.close()

    def remaining(self) -> range:
        """The steps the loop has still to make."""
        return range(self._step, self._step if self.finished else self.stage.steps)

    def compiling(self, what: str, program: Callable) -> Callable:
        """A program of the loop, (.., .., the batch, ...), that says when it compiles."""
        return self._meter.progress.compiling(what, program, changing=2)

    # ------------------------------------------------------------------ starting

    def _start(self, latest: int | None) -> tuple[TrainState, PyTree]:
        """The train state of the latest checkpoint, or where the stage begins; and what is frozen beside it."""

        def initial(params: PyTree) -> TrainState:
            return TrainState(jnp.int32(0), params, self._optimizer.init(params))

        reference = reference_of(self.stage)
        params = self._start_params() if latest is None or reference == "start" else None
        frozen = frozen_params(self._experiment, self._run_dir, self.name)
        frozen |= self._experiment.base(self._experiment.policy(self.name))
        if reference == "start":  # a copy: the parameters themselves are donated to the first update
            frozen["reference"] = jax.tree.map(jnp.copy, params)
        elif reference == "base":
            frozen["reference"] = self._experiment.policy(self.name).base.bare
        if latest is None:
            return jax.jit(initial, out_shardings=self._state_at)(params), frozen
        if self._is_main:
            print(f"{self.name}: resuming from step {latest}", flush=True)
        del params  # or there would be two of them while restoring
        shapes = self._experiment.policy(self.name).shapes()
        wanted = placed(jax.eval_shape(initial, shapes), self._state_at)
        return self._checkpoints.restore(latest, wanted), frozen

    def _start_params(self) -> PyTree:
        if source := source_of(self._config, self._run_dir, self.name):
            return best_params(self._experiment, *source)
        return initial_params(self._experiment, self._experiment.policy(self.name))

    # ------------------------------------------------------------------ after every step

    def on_step(
        self, state: TrainState, metrics: dict[str, Mean], examples: Sequence[RankingExample], stopping: bool
    ) -> bool:
        """Log, check, evaluate, save; False when the loop is to end.

        Before anything is logged or saved, it is asked at once whether the step was finite. Raises
        TrainingError where one was not.
        """
        self._step = step = self._step + 1
        self._check_finite()
        self._meter.progress.stepped(step)
        self._meter.add(step, metrics, examples)
        last = step == self.stage.steps
        logging = step % self._config.log_every == 0 or last
        evaluating = step % self.stage.eval_every == 0 or last
        saving = stopping or step % self._config.checkpoint.every == 0
        if logging or evaluating or saving:
            self._check_finite()
        if logging:
            self._meter.write(step)
        if evaluating:  # also when stopping: the checkpoint, written once, holds the metric
            self._evaluate_and_save(state, step)
            if self._validation.is_over(step):
                self._finish(step)
                return False
        elif saving:
            self._save(state, step, None)
        return not stopping

    def _check_finite(self) -> None:
        self._meter.check(self._kept)

    def _kept(self) -> str:
        good = self._checkpoints.latest_step()
        kept = "no checkpoint was saved before" if good is None else f"the last good checkpoint is step {good}"
        return f"{kept} in {self._dir / 'checkpoints'}"

    # ------------------------------------------------------------------ evaluating, saving

    def _evaluate_and_save(self, state: TrainState, step: int) -> None:
        metric = self._validation.measure(state.params, self.frozen, step)
        # What is evaluated only because it is the last step is no more once the stage goes on from it.
        self._save(state, step, metric if step % self.stage.eval_every == 0 else None)
        self._meter.progress.skip(step)

    def _save(self, state: TrainState, step: int, metric: float | None) -> None:
        meta = {
            "config": json.loads(to_json(self._config)),
            "data": self._experiment.dataset.fingerprints,
            "unlogged": self._meter.unlogged(),
        }
        self._checkpoints.save(step, state, meta, metric)

    def _finish(self, step: int) -> None:
        self._checkpoints.wait()
        best = self._checkpoints.best_step()
        metric = None if best is None else self._checkpoints.metric(best)
        last = self._validation.measured.get(step)
        if best is None or (last is not None and last > metric):
            best, metric = step, last
        self._checkpoints.pin(best)
        if self._is_main:
            record = {"step": step, "best_step": best, "metric": self._validation.metric, "best": metric}
            write_atomically(self._dir / "done.json", json.dumps(record, indent=1) + "\n")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"{self.name} done")  # before anyone looks for done.json
        self.finished = True
