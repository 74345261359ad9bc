"""What a run writes while it trains: metrics.jsonl, samples.jsonl, and the same to its trackers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fgrpo_jax.evaluation.evaluate import Prediction
from fgrpo_jax.files import append, is_metrics, is_of_a_step, read_rows, write_atomically
from fgrpo_jax.run import trackers
from fgrpo_jax.types import RankingExample

Row = dict[str, Any]
_CUT = 200  # characters kept of a text in a sample


class MetricsLog:
    """metrics.jsonl, samples.jsonl, and the trackers. Only the main process writes.

    about: the configuration, JSON-ready, for trackers. Raises ConfigError where one of these does not start.
    """

    def __init__(
        self, run_dir: Path, names: Sequence[str], is_main: bool, about: Mapping[str, Any] = MappingProxyType({})
    ):
        self.path, self.samples_path, self._is_main = run_dir / "metrics.jsonl", run_dir / "samples.jsonl", is_main
        self._trackers = trackers.start(names, run_dir, about) if is_main else []

    def rows(self, stage: str) -> list[Row]:
        """Raises ConfigError where a line is not a row."""
        return [row for row in read_rows(self.path, is_metrics) if row["stage"] == stage]

    def forget_after(self, stage: str, step: int) -> None:
        """Drop what an interrupted run logged beyond the checkpoint it resumes from."""

        def dropped(row: Row) -> bool:
            return row["stage"] == stage and row["step"] > step

        self._forget(dropped, dropped)

    def forget_last(self, stage: str, step: int, logged: bool, evaluated: bool) -> None:
        """Drop the row of training, that of the evaluation with its samples, or both, of one step."""
        drop = {True: evaluated, False: logged}

        def here(row: Row) -> bool:
            return row["stage"] == stage and row["step"] == step

        self._forget(lambda row: here(row) and drop[_is_evaluation(row)], lambda row: here(row) and evaluated)

    def _forget(self, of_metrics: Callable[[Row], bool], of_samples: Callable[[Row], bool]) -> None:
        files = (self.path, is_metrics, of_metrics), (self.samples_path, is_of_a_step, of_samples)
        for path, fits, dropped in files if self._is_main else ():
            if path.is_file():
                write_atomically(path, "".join(_line(row) for row in read_rows(path, fits) if not dropped(row)))

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        if not self._is_main:
            return
        append(self.path, _line({"stage": stage, "step": step, **values}))
        for tracker in self._trackers:
            tracker.scalars(stage, step, values)

    def write_samples(self, stage: str, step: int, samples: Sequence[Row]) -> None:
        """Lists as `sample` says them."""
        if not self._is_main:
            return
        append(self.samples_path, "".join(_line({"stage": stage, "step": step, **sample}) for sample in samples))
        for tracker in self._trackers:
            tracker.text(stage, step, "\n\n".join(map(as_text, samples)))

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def _is_evaluation(row: Row) -> bool:
    return any(name.startswith("eval/") for name in row)


# --------------------------------------------------------------------- samples


def sample(example: RankingExample, prediction: Prediction) -> Row:
    """What a policy wrote for a query, by the texts of the items; of a history only the last item."""
    texts = [text[:_CUT] for _, text in example.candidates]
    return {
        "query_id": example.query_id,
        "query": example.query[:_CUT],
        "last": example.history[-1][1][:_CUT] if example.history else "",
        "slate": [texts[c] for c in prediction.slate],
        "ranking": [texts[c] for c in prediction.ranking],
        "outcome": prediction.outcome.name,
        "relevant": [text for text, gain in zip(texts, example.relevance) if gain > 0],
    }


def as_text(sample: Row) -> str:
    """The same for people; * marks what is relevant."""
    relevant = set(sample["relevant"])

    def listed(name: str) -> str:
        return f"{name + ':':9}" + " | ".join(("*" if text in relevant else "") + text for text in sample[name])

    about = sample["query"] or f"after {sample['last']}"
    return "\n".join([f"{sample['query_id']}: {about}", listed("slate"), listed("ranking"), sample["outcome"]])
