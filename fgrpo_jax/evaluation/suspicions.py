"""What makes a data set suspicious: rules that know nothing of taste or meaning, and find the answers all the same.

    find(dataset, examples, scores) -> one Suspicion for each rule that applies

`examples` are queries of an evaluation split with their frozen pools, in the frozen order. A cue scores candidates;
how well it finds the answers is its AUC, the chance that a relevant candidate of a pool scores above another one, and
its precision at 1, both with ties shared out, mean over queries. All of it is deterministic.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fgrpo_jax.data.datasets import Dataset
from fgrpo_jax.evaluation.baselines.covisitation import sequences
from fgrpo_jax.types import RankingExample

FEWEST = 20  # queries, and pairs of items, below which nothing is said
AUC = 0.85  # from which a cue gives the answers away (0.5 by chance)
FIRST = 0.75  # the same of precision at 1, where 0 is chance and 1 always
MET, SAME_ORDER, NEAR = 3, 0.95, 3  # times that two items met within NEAR places; share in one order
ORDERED = 0.8  # share of neighbours in order from which a sequence follows its ids
SAME_PLACE = 0.5  # share of queries whose answers lie in one place of the pool
AHEAD = 0.1  # of random, from which popularity is said to win

Cue = Callable[[RankingExample], Sequence[float] | None]  # None: this query has no such thing


class Suspicion(NamedTuple):
    name: str
    text: str


def find(
    dataset: Dataset, examples: Sequence[RankingExample], scores: Mapping[str, float], metric: str
) -> list[Suspicion]:
    """scores: mean of `metric` of each baseline, by its name, on the same queries."""
    found = [
        *(Suspicion("time", note.text) for note in dataset.notes if note.about == "time"),
        *order_by_id(examples),
        *fixed_order(dataset),
        *duplicates(dataset),
        *same_text(examples),
        *same_place(examples),
        *popularity(scores, metric),
    ]
    for name, (cue, text) in {**CUES, "pool_overlap": pool_overlap(dataset)}.items():
        found += gives_away(name, cue, text, examples)
    return found


# ---------------------------------------------------------------------- order, duplicates, places


def _key(item: str) -> tuple[int, str]:
    """Numbers in their order, before text."""
    return (int(item), "") if _is_number(item) else (10**18, item)


def _is_number(item: str) -> bool:
    return item.isdecimal() and len(item) <= 18


def order_by_id(examples: Sequence[RankingExample]) -> list[Suspicion]:
    """Whether neighbours of a history, and a history's last item and a single answer, are in the order of their ids."""
    up = pairs = 0
    for example in examples:
        answers = [item for (item, _), gain in zip(example.candidates, example.relevance) if gain > 0]
        items = [item for item, _ in example.history] + answers * (len(answers) == 1)
        up += sum(_key(a) < _key(b) for a, b in zip(items, items[1:]))
        pairs += max(0, len(items) - 1)
    share = up / pairs if pairs else 0.5
    if pairs < FEWEST or 1 - ORDERED < share < ORDERED:
        return []
    order = "ascend" if share > 0.5 else "descend"
    text = f"in {max(share, 1 - share):.1%} of {pairs:,} pairs of items taken one after the other the ids {order}"
    return [Suspicion("order_by_id", f"{text}: the order may be that of the ids, not of time")]


def fixed_order(dataset: Dataset) -> list[Suspicion]:
    """Whether items that meet in several training sequences meet in one order: a hidden one, of ids or of names."""
    if dataset.kind != "recommendation":
        return []
    met: Counter[tuple[str, str]] = Counter()
    for walk in sequences(dataset.splits.get("train", ())):
        pairs = (walk[i : i + 1] + (later,) for i in range(len(walk)) for later in walk[i + 1 : i + 1 + NEAR])
        met.update({pair for pair in pairs if pair[0] != pair[1]})
    often = {(a, b): met[a, b] + met[b, a] for a, b in met if a < b or (b, a) not in met}
    often = {pair: count for pair, count in often.items() if count >= MET}
    agreed = sum(max(met[a, b], met[b, a]) for a, b in often)
    if len(often) < FEWEST or agreed < SAME_ORDER * sum(often.values()):
        return []
    text = f"{len(often):,} pairs of items that met {MET} times or more did so in one order, but for"
    share = f"{text} {1 - agreed / sum(often.values()):.1%} of times"
    return [Suspicion("fixed_order", f"{share}: sequences may be sorted by something that is not time")]


def duplicates(dataset: Dataset) -> list[Suspicion]:
    """Queries that a split shares with an earlier one: by their text or, without one, by history and answers."""
    known: dict[tuple, tuple[str, str]] = {}
    found = []
    for split, rows in dataset.splits.items():
        twice, first, mine = 0, "", {}
        for example in rows:
            key = _content(example)
            if key in known:
                other, query_id = known[key]
                first = first or f"{example.query_id!r} is {query_id!r} of {other}"
                twice += 1
            mine.setdefault(key, (split, example.query_id))
        known = mine | known
        if twice:
            text = f"{twice:,} of {len(rows):,} queries of {split} occur in another split too (as {first})"
            found.append(Suspicion("duplicates", f"{text}: what is learnt there is judged here"))
    return found


def _content(example: RankingExample) -> tuple:
    if example.query:
        return example.query, tuple(item for item, _ in example.history)
    answers = [item for (item, _), gain in zip(example.candidates, example.relevance) if gain > 0]
    answers += [lost.item for lost in example.missed]
    return tuple(item for item, _ in example.history), tuple(sorted(answers))


def same_text(examples: Sequence[RankingExample]) -> list[Suspicion]:
    """Whether pools hold a relevant candidate and a copy of it that nobody judged, or judged otherwise."""
    copies = 0
    for example in examples:
        gains: dict[str, set[float]] = defaultdict(set)
        for (_, text), gain in zip(example.candidates, example.relevance):
            gains[text].add(gain)
        copies += any(len(found) > 1 for found in gains.values())
    if not copies:
        return []
    text = f"in {copies:,} of {len(examples):,} pools candidates of the same text have different gains"
    return [Suspicion("same_text", f"{text}: nothing that is read tells them apart")]


def same_place(examples: Sequence[RankingExample]) -> list[Suspicion]:
    """Whether one place of the pool holds an answer far more often than the number of answers explains."""
    places, expected, queries = Counter(), 0.0, 0
    for example in examples:
        answers = [place for place, gain in enumerate(example.relevance) if gain > 0]
        if answers and len(answers) < len(example.relevance):
            places.update(answers)
            expected += len(answers) / len(example.relevance)
            queries += 1
    if queries < FEWEST:
        return []
    place, count = min(places.items(), key=lambda pair: (-pair[1], pair[0]))
    if count / queries < max(SAME_PLACE, 1.5 * expected / queries):
        return []
    text = f"place {place + 1} of the pool holds an answer in {count / queries:.1%} of {queries:,} queries"
    shown = f"{text} (by chance {expected / queries:.1%})"
    return [Suspicion("same_place", f"{shown}: policies are shown a drawn order, other programs may not be")]


def popularity(scores: Mapping[str, float], metric: str) -> list[Suspicion]:
    """Whether counting alone is ahead of every baseline that reads the query."""
    others = {name: value for name, value in scores.items() if name not in ("random", "popularity")}
    if not {"random", "popularity"} <= set(scores) or not others:
        return []
    best = max(others, key=others.get)
    if scores["popularity"] < max(others[best], scores["random"] + AHEAD):
        return []
    text = f"popularity alone has {metric} {100 * scores['popularity']:.1f}, and the best that reads the query"
    more = f"{text} ({best}) {100 * others[best]:.1f}: histories may say nothing, or negatives be too unpopular"
    return [Suspicion("popularity", more)]


# ---------------------------------------------------------------------- cues


def gives_away(name: str, cue: Cue, text: str, examples: Sequence[RankingExample]) -> list[Suspicion]:
    known = []
    for example in examples:
        score, relevant = cue(example), np.asarray(example.relevance) > 0
        if score is not None and relevant.any() and not relevant.all():
            known.append((auc(score, relevant), first(score, relevant), relevant.mean()))
    if len(known) < FEWEST:
        return []
    above, precise, chance = np.mean(known, 0).tolist()
    if above < AUC and precise - chance < FIRST * (1 - chance):
        return []
    text = f"{text} finds the answers: AUC {above:.2f} (0.5 by chance), precision at 1 {precise:.2f} ({chance:.2f})"
    return [Suspicion(name, f"{text}, in {len(known):,} queries")]


def auc(scores: Sequence[float], relevant: np.ndarray) -> float:
    """Of a pool with both kinds of candidates."""
    score = np.asarray(scores, np.float64)
    difference = score[relevant][:, None] - score[~relevant][None]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def first(scores: Sequence[float], relevant: np.ndarray) -> float:
    """The share of relevant candidates among those with the best score."""
    score = np.asarray(scores, np.float64)
    return float(relevant[score == score.max()].mean())


def _ids(example: RankingExample) -> list[int] | None:
    items = [item for item, _ in example.candidates]
    return list(map(int, items)) if all(map(_is_number, items)) else None


def _smallest_id(example: RankingExample) -> list[float] | None:
    ids = _ids(example)
    return None if ids is None else [-i for i in ids]


def _next_id(example: RankingExample) -> list[float] | None:
    """The nearest id above the history's last one; ids below come after those."""
    ids = _ids(example)
    if ids is None or not example.history or not _is_number(example.history[-1][0]):
        return None
    last = int(example.history[-1][0])
    return [1 / (i - last) if i > last else -1.0 for i in ids]


def _longest(example: RankingExample) -> list[float]:
    return [len(text) for _, text in example.candidates]


def _shortest(example: RankingExample) -> list[float]:
    return [-len(text) for _, text in example.candidates]


def _seen(example: RankingExample) -> list[float] | None:
    taken = {item for item, _ in example.history}
    return [float(item in taken) for item, _ in example.candidates] if taken else None


def _unseen(example: RankingExample) -> list[float] | None:
    seen = _seen(example)
    return None if seen is None else [-value for value in seen]


def _reversed_retrieval(example: RankingExample) -> list[float] | None:
    return [-score for score in example.retrieval] or None


CUES: dict[str, tuple[Cue, str]] = {
    "largest_id": (_ids, "the largest id of the pool"),
    "smallest_id": (_smallest_id, "the smallest id of the pool"),
    "next_id": (_next_id, "the nearest id above that of the last item of the history"),
    "longest_text": (_longest, "the longest text of the pool"),
    "shortest_text": (_shortest, "the shortest text of the pool"),
    "in_history": (_seen, "being in the history"),
    "not_in_history": (_unseen, "not being in the history"),
    "reversed_retrieval": (_reversed_retrieval, "the reversed order of the first stage"),
}


def pool_overlap(dataset: Dataset) -> tuple[Cue, str]:
    """Whether training pools tell the answer: negatives that were drawn by it come again with it."""
    met: dict[str, Counter[str]] = defaultdict(Counter)
    rows: Counter[str] = Counter()
    if not dataset.sampled_negatives:
        for example in dataset.splits.get("train", ()):
            items = [item for item, _ in example.candidates]
            for item, gain in zip(items, example.relevance):
                if gain > 0:
                    met[item].update(items)
                    rows[item] += 1

    def cue(example: RankingExample) -> list[float] | None:
        items = [item for item, _ in example.candidates]
        if not any(item in met for item in items):
            return None
        return [sum(met[i][j] for j in items if j != i) / rows[i] if i in met else 0.0 for i in items]

    return cue, "the candidate whose training pools share most with this pool"
