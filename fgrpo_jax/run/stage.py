"""What surrounds the loop of a stage: starting, logging, evaluating, saving, stopping."""

from __future__ import annotations

import contextlib
import heapq
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from fgrpo_jax import config as config_lib
from fgrpo_jax.config import ConfigError, StageConfig
from fgrpo_jax.data.batches import evaluation_examples
from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.evaluation.evaluate import score
from fgrpo_jax.files import write_atomically
from fgrpo_jax.models import decoder
from fgrpo_jax.policies.llm.policy import warn_of_merges
from fgrpo_jax.run.checkpoint import Checkpoints, placed, steps_in
from fgrpo_jax.run.directory import is_done
from fgrpo_jax.run.experiment import Experiment, Predictor, attention_of, make_policy
from fgrpo_jax.run.finished import check_start
from fgrpo_jax.run.log import MetricsLog, Progress
from fgrpo_jax.run.sharding import check_divisible, query_shards
from fgrpo_jax.types import Mean, PyTree, RankingExample, TrainingError, TrainState


def check_training(experiment: Experiment, run_dir: Path) -> None:
    """Refuse, before anything is written or compiled, what only training needs.

    Raises ConfigError for batches that do not fit the mesh, for a start that does not fit and for
    attention or weights that this machine cannot compute, DataError for splits that are not there.
    """
    config, dataset = experiment.config, experiment.dataset
    if config.model.attention == "flash" and attention_of(config.model) != "flash":
        raise ConfigError(
            "model.attention='flash' needs an NVIDIA GPU of compute capability 8.0 or a TPU v5, or later ones, "
            f"and this is a {jax.devices()[0].device_kind}: set 'auto' or 'blocks'"
        )
    _check_bfloat16(experiment)
    has = f"data set {dataset.name!r} has only {', '.join(dataset.splits)}: add its raw file, or"
    for name, stage in (("sft", config.sft), ("rl", config.rl)):
        if stage.steps:
            check_divisible(experiment.mesh, stage.batch_queries, stage.microbatches, name)
        if stage.steps and stage.patience and "validation" not in dataset.splits:
            raise DataError(f"{name}.patience needs a validation split, and {has} set {name}.patience=0")
    if config.eval.split not in dataset.splits:
        raise DataError(f"eval.split={config.eval.split!r}: the run ends on it, and {has} choose another")
    if config.start_from and _reads_start(run_dir, "rl", config.rl):
        check_start(experiment, run_dir)
    _check_longest(experiment)
    warn_of_merges(config, experiment.tokenizer, dataset.splits[config.eval.split][0])


def _check_bfloat16(experiment: Experiment) -> None:
    """XLA's CPU compiler aborts on sums of bfloat16 over some axes of a mesh, where others are its own to split."""
    mesh, param_dtype = experiment.mesh, experiment.config.model.param_dtype
    if param_dtype != "bfloat16" or jax.default_backend() != "cpu":
        return
    if mesh.shape["tensor"] > 1 and query_shards(mesh) > 1:
        raise ConfigError(
            "model.param_dtype='bfloat16' on CPUs cannot be compiled with mesh.tensor above 1 and queries split too "
            "(mesh.data, mesh.fsdp): set mesh.tensor=1, or model.param_dtype='float32'"
        )


def _check_longest(experiment: Experiment, how_many: int = 16) -> None:
    """Encode the longest given pools of every split: one that fits no bucket is refused now.

    The longest by characters; sampled pools are drawn anew every epoch and cannot be listed.
    """
    dataset = experiment.dataset
    policy = make_policy(experiment, None)
    for name, split in dataset.splits.items():
        if dataset.sampled_negatives and name == "train":
            continue
        policy.encode(heapq.nlargest(how_many, split, key=_characters))


def _characters(example: RankingExample) -> int:
    return len(example.query) + sum(len(text) for _, text in (*example.candidates, *example.history))


def _reads_start(run_dir: Path, name: str, stage: StageConfig) -> bool:
    """Whether the parameters a stage starts from are read: at its start, and as the reference of its KL term."""
    begun = bool(steps_in(run_dir / name / "checkpoints"))
    return bool(stage.steps) and not is_done(run_dir, name) and (not begun or bool(stage.objective.kl_weight))


class Stage:
    """One stage on its way: `state` and `frozen` to start from, `on_step` after every step.

    Everything it knows can be rebuilt from the run directory, so a resumed stage goes on bit
    for bit: from the latest checkpoint the train state, and the sums of the steps that were
    not logged yet; from metrics.jsonl the evaluations.
    """

    def __init__(
        self,
        experiment: Experiment,
        name: str,
        stage: StageConfig,
        optimizer: optax.GradientTransformation,
        places: TrainState,
        start_params: Callable[[], PyTree],
        run_dir: Path,
        log: MetricsLog,
    ):
        self.name, self.stage, self._experiment, self._log = name, stage, experiment, log
        self._config = experiment.config
        self._dir = run_dir / name
        self._is_main = jax.process_index() == 0
        self._optimizer, self._places, self._start_params = optimizer, places, start_params
        self.finished = False
        self._predict = Predictor(experiment)
        self._examples = _validation(experiment)
        self._pending: tuple[int, dict[str, Mean], Sequence[RankingExample]] | None = None
        self._since: list[dict[str, Mean]] = []

    def __enter__(self) -> Stage:
        with contextlib.ExitStack() as stack:
            self._checkpoints = stack.enter_context(
                Checkpoints(self._dir / "checkpoints", self._config.checkpoint.keep)
            )
            latest = self._checkpoints.latest_step()
            self.state, self.frozen = self._start(latest)
            self._step = int(self.state.step)
            kept = -1 if latest is None else latest
            metric = f"eval/{self._config.eval.metric}"
            rows = [row for row in self._log.rows(self.name) if row["step"] <= kept and metric in row]
            self._measured = {row["step"]: row[metric] for row in rows}  # read once: every host has to decide alike
            self._log.forget_after(self.name, kept)
            self._progress = Progress(self.name, self._step, self.stage.steps, self.stage.batch_queries, self._is_main)
            if latest is None and self._examples:
                self._evaluate_and_save(self.state, 0)
            elif latest and self._is_over(latest):  # killed between its last checkpoint and done.json
                self._finish(latest)
            self._exits = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exits.close()

    def remaining(self) -> range:
        """The steps the loop has still to make."""
        return range(self._step, self._step if self.finished else self.stage.steps)

    def _start(self, latest: int | None) -> tuple[TrainState, PyTree]:
        def initial(params: PyTree) -> TrainState:
            return TrainState(jnp.int32(0), params, self._optimizer.init(params))

        needs_start = latest is None or self.stage.objective.kl_weight
        params = self._start_params() if needs_start else None
        # A copy: the parameters themselves are donated to the first update.
        frozen = {"reference": jax.tree.map(jnp.copy, params)} if self.stage.objective.kl_weight else {}
        if latest is None:
            return jax.jit(initial, out_shardings=self._places)(params), frozen
        meta = self._checkpoints.meta(latest)
        if self._is_main:
            print(f"{self.name}: resuming from step {latest}", flush=True)
        if unlogged := meta.get("unlogged"):
            self._since = [{name: Mean(*map(np.float32, pair)) for name, pair in unlogged.items()}]
        del params  # or there would be two of them while restoring
        wanted = placed(jax.eval_shape(initial, decoder.shapes(self._experiment.spec)), self._places)
        return self._checkpoints.restore(latest, wanted), frozen

    # ------------------------------------------------------------------ after every step

    def on_step(
        self, state: TrainState, metrics: dict[str, Mean], examples: Sequence[RankingExample], stopping: bool
    ) -> bool:
        """Log, check, evaluate, save; False when the loop is to end.

        Whether a step was finite is asked one step late, so that the host never waits for
        the step under way (where XLA runs beside it: not with keep_memory on a CPU); before anything is
        saved it is asked at once.
        """
        self._step = step = self._step + 1
        self._check_pending()
        self._pending = (step, metrics, examples)
        self._since.append(metrics)
        last = step == self.stage.steps
        logging = step % self._config.log_every == 0 or last
        evaluating = step % self.stage.eval_every == 0 or last
        saving = stopping or step % self._config.checkpoint.every == 0
        if logging or evaluating or saving:
            self._check_pending()
        if logging:
            self._log_since(step)
        if evaluating:  # also when stopping: the checkpoint, written once, holds the metric
            self._evaluate_and_save(state, step)
            if self._is_over(step):
                self._finish(step)
                return False
        elif saving:
            self._save(state, step, None)
        return not stopping

    def _check_pending(self) -> None:
        if self._pending is None:
            return
        step, metrics, examples = self._pending
        if float(metrics["nonfinite"].sum) == 0:
            return
        ids = ", ".join(e.query_id for e in examples[:16]) + (", ..." if len(examples) > 16 else "")
        good = self._checkpoints.latest_step()
        kept = "no checkpoint was saved before" if good is None else f"the last good checkpoint is step {good}"
        raise TrainingError(
            f"{self.name} step {step}: loss or gradient is not finite (loss {metrics['loss'].value():g}, "
            f"gradient norm {metrics['grad_norm'].value():g}). Its update was not applied; {kept} in "
            f"{self._dir / 'checkpoints'}. Queries: {ids}. Lower {self.name}.optim.learning_rate or "
            "clip_norm, or look at these queries."
        )

    def _total_since(self) -> dict[str, Mean]:
        """Of the steps since the last row: sums and counts, added one step after the other."""
        total: dict[str, Mean] = {}
        for metrics in jax.device_get(self._since):
            total = {name: total[name] + mean for name, mean in metrics.items()} if total else metrics
        self._since = [total] if total else []
        return total

    def _log_since(self, step: int) -> None:
        values = {name: mean.value() for name, mean in self._total_since().items()}
        if step % self._config.log_every == 0:  # or the row is there only because the step is the last
            self._since = []
        rate = self._progress.rate(step)
        values["queries_per_s"] = round(rate, 1)
        self._log.write(self.name, step, values)
        shown = {name: values[name] for name in ("loss", "reward/slate", "reward/rank") if name in values}
        self._progress.line(step, shown, rate)

    # ------------------------------------------------------------------ evaluating, saving

    def _evaluate_and_save(self, state: TrainState, step: int) -> None:
        if not self._examples:
            self._save(state, step, None)
            return
        scores = score(self._examples, self._predict(state.params, self._examples), self._config.eval.cutoffs)
        values = {f"eval/{name}": float(np.mean(value)) for name, value in scores.items()}
        metric = values[f"eval/{self._config.eval.metric}"]
        self._log.write(self.name, step, values)
        self._measured[step] = metric
        # What is evaluated only because it is the last step is no more once the stage goes on from it.
        self._save(state, step, metric if step % self.stage.eval_every == 0 else None)
        if self._is_main:
            k = max(self._config.eval.cutoffs)
            shown = f"{self._config.eval.metric} {metric:.4f}  recall@{k} {values[f'eval/recall@{k}']:.4f}"
            slate = f"slate recall {values['eval/slate_recall']:.4f}"
            print(f"{self.name} {step}: validation {shown}  {slate}", flush=True)
        self._progress.skip(step)

    def _save(self, state: TrainState, step: int, metric: float | None) -> None:
        meta = {
            "config": json.loads(config_lib.to_json(self._config)),
            "data": self._experiment.dataset.fingerprints,
            "unlogged": {name: [float(m.sum), float(m.count)] for name, m in self._total_since().items()},
        }
        self._checkpoints.save(step, state, meta, metric)

    def _is_over(self, step: int) -> bool:
        """At its end, or out of patience: which holds from the evaluation on that exhausted it."""
        if step == self.stage.steps:
            return True
        if not self.stage.patience or step % self.stage.eval_every:
            return False
        measured = list(self._measured.values())
        return len(measured) - 1 - int(np.argmax(measured)) >= self.stage.patience

    def _finish(self, step: int) -> None:
        self._checkpoints.wait()
        best = self._checkpoints.best_step()
        metric = None if best is None else self._checkpoints.metric(best)
        last = self._measured.get(step)
        if best is None or (last is not None and last > metric):
            best, metric = step, last
        self._checkpoints.pin(best)
        if self._is_main:
            record = {"step": step, "best_step": best, "metric": self._config.eval.metric, "best": metric}
            write_atomically(self._dir / "done.json", json.dumps(record, indent=1) + "\n")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"{self.name} done")  # before anyone looks for done.json
        self.finished = True


def _validation(experiment: Experiment) -> list[RankingExample]:
    """The first queries of the validation split; none where the data set has no such split."""
    if "validation" not in experiment.dataset.splits:
        return []
    examples = evaluation_examples(experiment.dataset, experiment.config, "validation")
    limit = experiment.config.eval.train_queries
    return examples[:limit] if limit else examples
