"""Every query of an evaluation as compact JSON, which page.js searches and shows a piece at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fgrpo_jax.evaluation.evaluate import ERRORS, Evaluation
from fgrpo_jax.evaluation.report_page.markup import cut
from fgrpo_jax.types import RankingExample

CUTS = (2000, 800, 320, 160, 80)  # characters kept of a text: the first at which all texts together fit
BUDGET = 12_000_000  # characters of all texts
HISTORY = 20  # the last items shown of one
LIKELY = 8  # candidates of a step that are shown, the most probable first


class Step(NamedTuple):
    """One action of a transcript.

    phase: a name of PHASES. place: items that this phase's list had before.
    named: the candidates that the action leaves possible as the next item; () where it is a literal.
    probability: of the action. open: (candidate, probability of naming it), the LIKELY most probable first.
    others: of naming another candidate. literal: of none (a separator, or the end of the list).
    """

    phase: str
    place: int
    named: tuple[int, ...]
    probability: float
    open: tuple[tuple[int, float], ...]
    others: float
    literal: float

    def about(self, index: Sequence[int]) -> Step:
        """The same of candidates in another order: the c-th is the index[c]-th there."""
        return self._replace(named=tuple(index[c] for c in self.named), open=tuple((index[c], p) for c, p in self.open))


Transcripts = Mapping[str, Mapping[int, Sequence[Step]]]  # method -> place of the query -> its steps


class Items:
    """The items of all queries, each once, by its id and its text (which may differ between queries)."""

    def __init__(self) -> None:
        self.index: dict[tuple[str, str], int] = {}

    def add(self, item: tuple[str, str]) -> int:
        return self.index.setdefault(item, len(self.index))


def cut_for(texts: Sequence[str], budget: int = BUDGET) -> int:
    """The characters of a text that are kept."""
    fits = (size for size in CUTS if sum(min(len(text), size) for text in texts) <= budget)
    return next(fits, CUTS[-1])


def content(evaluation: Evaluation, metric: str, transcripts: Transcripts) -> dict[str, object]:
    """JSON-ready; what each list means is read in page.js, which is the only reader.

    metric: of `evaluation.scores`, by which queries can be sorted.
    """
    items = Items()
    examples, methods = evaluation.examples, list(evaluation.predictions)
    rows = [_query(example, items) for example in examples]
    outcomes = sorted({p.outcome.name for found in evaluation.predictions.values() for p in found})
    texts = [text for _, text in items.index]
    size = cut_for([*texts, *(e.query for e in examples)])
    for row in rows:
        row[1] = cut(row[1], size)
    return {
        "metric": metric,
        "errors": ERRORS,
        "outcomes": outcomes,
        "methods": methods,
        "cut": size if any(len(text) > size for text in itertools.chain(texts, (e.query for e in examples))) else 0,
        "ids": [cut(item, size) for item, _ in items.index],
        "texts": [cut(text, size) for text in texts],
        "queries": rows,
        "lists": [_lists(evaluation, method, metric, outcomes) for method in methods],
        "steps": {
            method: {str(q): list(map(_step, steps)) for q, steps in of_method.items()}
            for method, of_method in transcripts.items()
        },
    }


def _query(example: RankingExample, items: Items) -> list[object]:
    """[id, query, history, pool, gains of the relevant [place, gain], missed [id, gain], history left out]."""
    history = [items.add(item) for item in example.history]
    pool = [items.add(item) for item in example.candidates]
    gains = [[i, _number(gain)] for i, gain in enumerate(example.relevance) if gain > 0]
    missed = [[lost.item, _number(lost.gain)] for lost in example.missed]
    return [
        example.query_id, example.query, history[-HISTORY:], pool, gains, missed, max(0, len(history) - HISTORY),
    ]  # fmt: skip


def _lists(evaluation: Evaluation, method: str, metric: str, outcomes: Sequence[str]) -> list[list[object]]:
    """Of every query: [slate, ranking, place in outcomes, place in errors, score in thousandths]."""
    numbers = {name: i for i, name in enumerate(outcomes)}
    found = []
    score_Q = np.rint(1000 * np.asarray(evaluation.scores[method][metric])).astype(int).tolist()
    for prediction, error, score in zip(evaluation.predictions[method], evaluation.errors[method], score_Q):
        outcome = numbers[prediction.outcome.name]
        found.append([list(prediction.slate), list(prediction.ranking), outcome, ERRORS.index(error), score])
    return found


def _step(step: Step) -> list[object]:
    open_ = [[c, round(p, 4)] for c, p in step.open]
    return [
        step.phase, step.place, list(step.named), round(step.probability, 4), open_, round(step.others, 4),
        round(step.literal, 4),
    ]  # fmt: skip


def _number(gain: float) -> float | int:
    return int(gain) if gain == int(gain) else round(gain, 4)


def chosen(errors_of: Mapping[str, Sequence[str]], limit: int) -> list[int]:
    """Queries worth a look, at most `limit`: in turns the next one of each kind of error of each method.

    errors_of: method -> a name of ERRORS per query.
    """
    kinds: list[Iterator[int]] = []
    for errors in errors_of.values():
        for name in ERRORS:
            kinds.append(iter([q for q, error in enumerate(errors) if error == name]))
    found: dict[int, None] = {}
    while kinds and len(found) < limit:
        kinds = [kind for kind in kinds if _take(kind, found, limit)]
    return sorted(found)


def _take(kind: Iterator[int], found: dict[int, None], limit: int) -> bool:
    """Whether there was one, which is then in `found`."""
    if len(found) >= limit:
        return False
    q = next((q for q in kind if q not in found), None)
    if q is not None:
        found[q] = None
    return q is not None
