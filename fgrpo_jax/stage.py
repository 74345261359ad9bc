"""What surrounds the loop of a stage: starting, logging, evaluating, saving, stopping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fgrpo_jax import config as config_lib
from fgrpo_jax.checkpoint import Checkpoints, abstract
from fgrpo_jax.config import Config, ConfigError, StageConfig
from fgrpo_jax.data import evaluation_examples
from fgrpo_jax.evaluate import score
from fgrpo_jax.experiment import Experiment, Predictor
from fgrpo_jax.models import decoder
from fgrpo_jax.run import MetricsLog, Progress, read_config, write_atomically
from fgrpo_jax.types import Mean, PyTree, RankingExample, TrainingError, TrainState


class Stage:
    """One stage on its way: `state` and `frozen` to start from, `on_step` after every step.

    Everything it knows can be rebuilt from the run directory, so a resumed stage goes on bit
    for bit: the train state from the latest checkpoint, the evaluations from metrics.jsonl.
    """

    def __init__(
        self,
        experiment: Experiment,
        name: str,
        stage: StageConfig,
        optimizer: optax.GradientTransformation,
        start_params: Callable[[], PyTree],
        run_dir: Path,
        log: MetricsLog,
    ):
        self.name, self.stage, self._experiment, self._log = name, stage, experiment, log
        self._config = experiment.config
        self._dir = run_dir / name
        self._is_main = jax.process_index() == 0
        self.finished = False
        self._checkpoints = Checkpoints(self._dir / "checkpoints", self._config.checkpoint.keep)
        self._predict = Predictor(experiment)
        self._examples = _validation(experiment)
        self.state, self.frozen = self._start(optimizer, start_params)
        self._step = step = int(self.state.step)
        log.forget_after(name, step)
        self._progress = Progress(name, step, stage.steps, stage.batch_queries, self._is_main)
        self._pending: tuple[int, dict[str, Mean], Sequence[RankingExample]] | None = None
        self._since: list[dict[str, Mean]] = []
        if self._checkpoints.latest_step() is None and self._examples:
            self._evaluate_and_save(self.state)

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *error: Any) -> None:
        self._checkpoints.close()

    def _start(self, optimizer: optax.GradientTransformation, start_params: Callable) -> tuple[TrainState, PyTree]:
        latest = self._checkpoints.latest_step()
        params = start_params()
        # A copy: the parameters themselves are donated to the first update.
        frozen = {"reference": jax.tree.map(jnp.copy, params)} if self.stage.objective.kl_weight else {}
        state = jax.jit(lambda p: TrainState(jnp.int32(0), p, optimizer.init(p)))(params)
        if latest is None:
            return state, frozen
        meta = self._checkpoints.meta(latest)
        if differing := config_lib.differences(
            config_lib.from_json(json.dumps(meta["config"])).model, self._config.model
        ):
            raise ConfigError(f"the checkpoint {self._dir}/checkpoints/{latest} is of another model: {differing}")
        if self._is_main:
            print(f"{self.name}: resuming from step {latest}", flush=True)
        return self._checkpoints.restore(latest, abstract(state)), frozen

    # ------------------------------------------------------------------ after every step

    def on_step(
        self, state: TrainState, metrics: dict[str, Mean], examples: Sequence[RankingExample], stopping: bool
    ) -> bool:
        """Log, check, evaluate, save; False when the loop is to end.

        Whether a step was finite is asked one step late, so that the host never waits for
        the step under way; before anything is saved it is asked at once.
        """
        self._step = step = self._step + 1
        self._check_pending()
        self._pending = (step, metrics, examples)
        self._since.append(metrics)
        last = step == self.stage.steps
        if step % self._config.log_every == 0 or last:
            self._log_since(step)
        if stopping:
            self._save(state, step, None)
            return False
        if step % self.stage.eval_every == 0 or last:
            self._check_pending()
            self._evaluate_and_save(state, step)
            if last or self._out_of_patience():
                self._finish(step)
                return False
        elif step % self._config.checkpoint.every == 0:
            self._save(state, step, None)
        return True

    def _check_pending(self) -> None:
        if self._pending is None:
            return
        step, metrics, examples = self._pending
        if float(metrics["nonfinite"].sum) == 0:
            return
        ids = ", ".join(e.query_id for e in examples[:16]) + (", ..." if len(examples) > 16 else "")
        good = self._checkpoints.latest_step()
        raise TrainingError(
            f"{self.name} step {step}: loss or gradient is not finite (loss {metrics['loss'].value():g}, gradient "
            f"norm {metrics['grad_norm'].value():g}). Its update was not applied. Queries: {ids}. The last good "
            f"checkpoint is step {good} in {self._dir / 'checkpoints'}. Lower {self.name}.optim.learning_rate or "
            "clip_norm, or look at these queries."
        )

    def _log_since(self, step: int) -> None:
        """Means over the steps since the last row: sums and counts add exactly."""
        total = self._since[0]
        for metrics in self._since[1:]:
            total = jax.tree.map(jnp.add, total, metrics)
        self._since = []
        values = {name: mean.value() for name, mean in jax.device_get(total).items()}
        values["queries_per_s"] = round(self._progress.rate(step), 1)
        self._log.write(self.name, step, values)
        shown = {name: values[name] for name in ("loss", "reward/slate", "reward/rank") if name in values}
        self._progress.line(step, shown, values["queries_per_s"])

    # ------------------------------------------------------------------ evaluating, saving

    def _evaluate_and_save(self, state: TrainState, step: int = 0) -> None:
        if not self._examples:
            self._save(state, step, None)
            return
        scores = score(self._examples, self._predict(state.params, self._examples), self._config.eval.cutoffs)
        values = {f"eval/{name}": float(np.mean(value)) for name, value in scores.items()}
        metric = values[f"eval/{self._config.eval.metric}"]
        self._log.write(self.name, step, values)
        self._save(state, step, metric)
        if self._is_main:
            k = max(self._config.eval.cutoffs)
            shown = f"recall@{k} {values[f'eval/recall@{k}']:.4f}  slate recall {values['eval/slate_recall']:.4f}"
            print(f"{self.name} {step}: validation {self._config.eval.metric} {metric:.4f}  {shown}", flush=True)
        self._progress.skip(step)

    def _save(self, state: TrainState, step: int, metric: float | None) -> None:
        self._check_pending()
        meta = {"config": json.loads(config_lib.to_json(self._config)), "data": self._experiment.dataset.fingerprints}
        self._checkpoints.save(step, state, meta, metric)

    def _out_of_patience(self) -> bool:
        if not self.stage.patience:
            return False
        name = f"eval/{self._config.eval.metric}"
        seen = [row[name] for row in self._log.rows(self.name) if name in row]
        best = int(np.argmax(seen))
        return len(seen) - 1 - best >= self.stage.patience

    def _finish(self, step: int) -> None:
        self._checkpoints.wait()
        best = self._checkpoints.best_step()
        best = step if best is None else best
        self._checkpoints.pin(best)
        if self._is_main:
            record = {"step": step, "best_step": best, "metric": self._config.eval.metric}
            record["best"] = self._checkpoints.metric(best)
            write_atomically(self._dir / "done.json", json.dumps(record, indent=1) + "\n")
        self.finished = True


def _validation(experiment: Experiment) -> list[RankingExample]:
    """The first queries of the validation split; none where the data set has no such split."""
    if "validation" not in experiment.dataset.splits:
        return []
    examples = evaluation_examples(experiment.dataset, experiment.config, "validation")
    limit = experiment.config.eval.train_queries
    return examples[:limit] if limit else examples


# --------------------------------------------------------------------- finished stages


def is_done(run_dir: Path, name: str) -> bool:
    return (run_dir / name / "done.json").is_file()


def source_of(config: Config, run_dir: Path, name: str) -> tuple[Path, str] | None:
    """The finished stage whose best parameters stage `name` starts from; None: the initial ones."""
    if name == "rl" and config.sft.steps:
        return run_dir, "sft"
    if name == "rl" and config.start_from:
        return Path(config.start_from).expanduser(), "sft"
    return None


def best_params(experiment: Experiment, run_dir: Path, name: str) -> PyTree:
    """Parameters of a finished stage's best checkpoint on validation, in their places.

    Raises ConfigError when the stage is not finished, or is of another model.
    """
    if not is_done(run_dir, name):
        raise ConfigError(f"{run_dir} has no finished {name} stage to take parameters from")
    theirs = read_config(run_dir)
    if differing := config_lib.differences(theirs.model, experiment.config.model):
        raise ConfigError(f"{run_dir} holds another model: {'; '.join(differing)}")
    record = json.loads((run_dir / name / "done.json").read_text(encoding="utf-8"))
    shapes = decoder.shapes(experiment.spec)
    wanted = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, experiment.param_shardings
    )
    with Checkpoints(run_dir / name / "checkpoints", theirs.checkpoint.keep, read_only=True) as checkpoints:
        return checkpoints.restore_part(record["best_step"], {"params": wanted})["params"]
