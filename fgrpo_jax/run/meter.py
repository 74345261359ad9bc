"""What is measured while a stage trains: its steps, and its parameters on the validation split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from fgrpo_jax.algorithm.rewards import covers
from fgrpo_jax.data.batches import evaluation_examples
from fgrpo_jax.errors import TrainingError
from fgrpo_jax.evaluation.evaluate import score
from fgrpo_jax.run.experiment import Experiment, Predictor
from fgrpo_jax.run.likelihood import Likelihood
from fgrpo_jax.run.log import MetricsLog, sample
from fgrpo_jax.run.own_rewards import credit_of
from fgrpo_jax.run.progress import Progress
from fgrpo_jax.stages import stages
from fgrpo_jax.types import Mean, PyTree, RankingExample

SAMPLES = 4  # validation queries whose lists are logged at every evaluation, the first ones


class Meter:
    """The metrics of the steps since the last logged row.

    Whether a step was finite is asked one step late, so that the host never waits for the step under
    way (where XLA runs beside it: not with keep_memory on a CPU).
    """

    def __init__(self, experiment: Experiment, name: str, log: MetricsLog, progress: Progress):
        self._name, self._every, self._log, self.progress = name, experiment.config.log_every, log, progress
        stage = stages(experiment.config)[name]
        self._queries = stage.batch_queries
        of_slate = [covers(credit_of(experiment.config, stage.credit), term[1]) for term in stage.credit.terms]
        self._rewards = ["reward/slate"] * any(of_slate) + ["reward/rank"] * (not all(of_slate))
        self._last: tuple[int, dict[str, Mean], Sequence[RankingExample]] | None = None
        self._since: list[dict[str, Mean]] = []

    def add(self, step: int, metrics: dict[str, Mean], examples: Sequence[RankingExample]) -> None:
        self._last = (step, metrics, examples)
        self._since.append(metrics)

    def check(self, kept: Callable[[], str]) -> None:
        """Raises TrainingError when the last step added was not finite; `kept` says what is saved of before."""
        if self._last is None:
            return
        step, metrics, examples = self._last
        if float(metrics["nonfinite"].sum) == 0:
            return
        ids = ", ".join(e.query_id for e in examples[:16]) + (", ..." if len(examples) > 16 else "")
        raise TrainingError(
            f"{self._name} step {step}: loss or gradient is not finite (loss {metrics['loss'].value():g}, "
            f"gradient norm {metrics['grad_norm'].value():g}). Its update was not applied; {kept()}. "
            f"Queries: {ids}. Lower {self._name}.optim.learning_rate or clip_norm, or look at these queries."
        )

    def total(self) -> dict[str, Mean]:
        """Of the steps since the last row: sums and counts, added one step after the other."""
        total: dict[str, Mean] = {}
        for metrics in jax.device_get(self._since):
            # An earlier version may have saved sums of fewer metrics.
            total = {name: total[name] + mean if name in total else mean for name, mean in metrics.items()}
        self._since = [total] if total else []
        return total

    def unlogged(self) -> dict[str, list[float]]:
        """The same as JSON, for a checkpoint between two rows."""
        return {name: [float(mean.sum), float(mean.count)] for name, mean in self.total().items()}

    def restore(self, unlogged: dict[str, list[float]]) -> None:
        if unlogged:
            self._since = [{name: Mean(*map(np.float32, pair)) for name, pair in unlogged.items()}]

    def write(self, step: int) -> None:
        """A row, and a line on the terminal."""
        total = self.total()
        values = {name: mean.value() for name, mean in total.items()}
        if step % self._every == 0:  # or the row is there only because the step is the last
            self._since = []
        rate = self.progress.rate(step)
        tokens = rate * total["tokens_trained"].sum / (total["grad_norm"].count * self._queries)
        values |= {"queries_per_s": float(f"{rate:.3g}"), "tokens_per_s": float(f"{tokens:.3g}")}
        self._log.write(self._name, step, values)
        shown = [name for name in self._rewards if name in values] or ["loss"]
        self.progress.line({name: values[name] for name in shown}, rate, tokens)


class Validation:
    """The policy on its way, on the validation split; without such a split it measures nothing."""

    def __init__(self, experiment: Experiment, name: str, log: MetricsLog, progress: Progress):
        self._config, self._name, self._log = experiment.config, name, log
        self._stage = stages(experiment.config)[name]
        self._predict = Predictor(experiment, experiment.policy(name))
        self._predict.program = progress.compiling("validation", self._predict.program, changing=2)
        self._likelihood = Likelihood(experiment, name) if self._stage.metric == "likelihood" else None
        self.metric = self._stage.metric or experiment.config.eval.metric
        self.examples = _examples(experiment)
        self.measured: dict[int, float] = {}

    def resume(self, latest: int | None) -> None:
        """Read once what was logged up to the checkpoint: every host has to decide alike."""
        kept, metric = -1 if latest is None else latest, f"eval/{self.metric}"
        rows: list[dict[str, Any]] = self._log.rows(self._name)
        self.measured = {row["step"]: row[metric] for row in rows if row["step"] <= kept and metric in row}
        self._log.forget_after(self._name, kept)

    def measure(self, params: PyTree, frozen: PyTree, step: int) -> float | None:
        """Evaluate and log; the metric that chooses the best checkpoint. Raises what `Likelihood` does."""
        if not self.examples:
            return None
        settings, predicted = self._config.eval, self._predict(params, self.examples)
        scores = score(self.examples, predicted, settings.cutoffs, settings.metrics)
        values = {f"eval/{name}": float(np.mean(value)) for name, value in scores.items()}
        if self._likelihood:
            values["eval/likelihood"] = self._likelihood(params, frozen, self.examples)
        self._log.write(self._name, step, values)
        self._log.write_samples(self._name, step, list(map(sample, self.examples[:SAMPLES], predicted)))
        self.measured[step] = values[f"eval/{self.metric}"]
        if jax.process_index() == 0:
            names = dict.fromkeys((self.metric, settings.metric, f"recall@{max(settings.cutoffs)}", "slate_recall"))
            shown = [f"{n.replace('_', ' ')} {values[f'eval/{n}']:.4f}" for n in names if f"eval/{n}" in values]
            print(f"{self._name} {step}: validation {'  '.join(shown)}", flush=True)
        return self.measured[step]

    def is_over(self, step: int) -> bool:
        """At its end, or out of patience: which holds from the evaluation on that exhausted it."""
        if step == self._stage.steps:
            return True
        if not self._stage.patience or step % self._stage.eval_every:
            return False
        measured = list(self.measured.values())
        return len(measured) - 1 - int(np.argmax(measured)) >= self._stage.patience


def _examples(experiment: Experiment) -> list[RankingExample]:
    """The first queries of the validation split; none where the data set has no such split."""
    if "validation" not in experiment.dataset.splits:
        return []
    examples = evaluation_examples(experiment.dataset, experiment.config, "validation")
    limit = experiment.config.eval.train_queries
    return examples[:limit] if limit else examples
