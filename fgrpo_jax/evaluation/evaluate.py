"""Scores of predicted slates and rankings, their errors, and intervals; on the host, in float64.

A method, whether policy or baseline, is judged by `Prediction`s alone: what it put in the slate, how it
ranked it. Every number is a function of (examples, predictions, cut-offs, seed).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from fgrpo_jax import metrics
from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.evaluation.baselines import BASELINES, NotApplicable
from fgrpo_jax.types import OK, Outcome, RankingExample

AT_CUTOFF = ("recall", "precision", "hit", "ndcg")  # of the ranking, at every cut-off: what is reported by default
WHOLE = ("mrr", "slate_recall")  # of the whole ranking, of the slate: always reported
MORE_AT_CUTOFF = ("slate_ndcg", "map", "f1", *metrics.TOPIC_METRICS)  # on request; the last need topics
MORE_WHOLE = ("list_auc", "pool_auc")
ERRORS = ("ok", "slate_miss", "rank_drop", "malformed", "no_relevant")
DIGITS = 6  # decimals kept in everything written, so that files are the same bytes everywhere


class Prediction(NamedTuple):
    """Indices into `example.candidates`.

    A list may hold the items completed before a rule was broken: see `counted`.
    """

    slate: tuple[int, ...]
    ranking: tuple[int, ...]
    outcome: Outcome = OK


class Evaluation(NamedTuple):
    """Every method on the same examples. Methods keep the order they were given in."""

    examples: Sequence[RankingExample]
    predictions: Mapping[str, Sequence[Prediction]]
    scores: Mapping[str, Mapping[str, np.ndarray]]  # method -> metric -> [Q] float64
    errors: Mapping[str, Sequence[str]]  # method -> a name of ERRORS per query
    summary: dict[str, object]  # JSON-ready: see `summarise`


def from_scores(scores: np.ndarray, slate_max: int, rank_max: int) -> Prediction:
    """The best `slate_max` candidates as slate and the best `rank_max` of them as ranking.

    Ties keep the pool's order, which evaluation has shuffled by (seed, query id). Raises ValueError on
    a score that is not finite.
    """
    scores = np.asarray(scores, np.float64)
    if not np.isfinite(scores).all():
        raise ValueError(f"candidate {int(np.argmin(np.isfinite(scores)))} has a score that is not finite")
    order = tuple(np.argsort(-scores, kind="stable").tolist())
    return Prediction(order[:slate_max], order[: min(rank_max, slate_max)])


def counted(prediction: Prediction) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The slate and the ranking that count: a broken phase counts as empty, and is never repaired.

    A broken rank part leaves the slate standing; a broken slate leaves nothing.
    """
    if prediction.outcome.breaks is None:
        return prediction.slate, prediction.ranking
    return (() if prediction.outcome.breaks == "slate" else prediction.slate), ()


def _check(example: RankingExample, prediction: Prediction) -> None:
    for name, items in zip(("slate", "ranking"), counted(prediction)):
        if len(set(items)) < len(items) or any(not 0 <= i < len(example.candidates) for i in items):
            raise ValueError(
                f"query {example.query_id}: {name} {items} must hold distinct indices below "
                f"{len(example.candidates)}, the size of its pool"
            )
    slate, ranking = counted(prediction)
    if not set(ranking) <= set(slate):
        raise ValueError(f"query {example.query_id}: ranking {ranking} holds items outside the slate {slate}")


def _pad(rows: Sequence[Sequence[float]], fill: float, dtype: type) -> np.ndarray:
    out = np.full((len(rows), max(map(len, rows), default=0) or 1), fill, dtype)
    for row, values in zip(out, rows):
        row[: len(values)] = values
    return out


def score(
    examples: Sequence[RankingExample],
    predictions: Sequence[Prediction],
    cutoffs: Sequence[int],
    names: Sequence[str] = AT_CUTOFF,
) -> dict[str, np.ndarray]:
    """Metric name -> [Q] float64, in query order; queries without a relevant item score 0.

    names: of AT_CUTOFF, MORE_AT_CUTOFF and MORE_WHOLE; slate_ndcg is the NDCG of the slate in its best order, the
    most that ranking it can give. What could have been found includes what the pool
    missed. Raises ValueError when the two differ in length, when a list that counts repeats an item or leaves
    its pool, or a ranking its slate; DataError for metrics of topics where candidates have none.
    """
    if len(examples) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(examples)} queries")
    for example, prediction in zip(examples, predictions):
        _check(example, prediction)
    lists = [counted(prediction) for prediction in predictions]
    pool_QC = _pad([(*e.relevance, *(lost.gain for lost in e.missed)) for e in examples], 0.0, np.float64)
    slate_QN = metrics.take_gains(pool_QC, _pad([slate for slate, _ in lists], -1, np.int64))
    ranking_QK = metrics.take_gains(pool_QC, _pad([ranking for _, ranking in lists], -1, np.int64))
    scores = {}
    topics = _topics(examples, [ranking for _, ranking in lists]) if set(names) & set(metrics.TOPIC_METRICS) else ()
    for name in (name for name in names if name not in MORE_WHOLE):
        for k in sorted(set(cutoffs)):
            if name in metrics.TOPIC_METRICS:
                scores[f"{name}@{k}"] = metrics.TOPIC_METRICS[name](ranking_QK, pool_QC, k, *topics)
            elif name == "slate_ndcg":
                scores[f"{name}@{k}"] = metrics.ndcg(-np.sort(-slate_QN, axis=1), pool_QC, k)
            else:
                scores[f"{name}@{k}"] = metrics.METRICS[name](ranking_QK, pool_QC, k)
    scores["mrr"] = metrics.mrr(ranking_QK, pool_QC)
    scores["slate_recall"] = metrics.recall(slate_QN, pool_QC)
    for name in (name for name in names if name in MORE_WHOLE):
        scores[name] = _whole(metrics.METRICS[name], examples, ranking_QK, pool_QC, [len(r) for _, r in lists])
    return scores


def _whole(
    metric: metrics.Metric,
    examples: Sequence[RankingExample],
    ranking_QK: np.ndarray,
    pool_QC: np.ndarray,
    lengths: Sequence[int],
) -> np.ndarray:
    """[Q], pools of one size at a time: padding would count as candidates."""
    size_Q = np.array([len(example.candidates) + len(example.missed) for example in examples])
    found_Q, length_Q = np.zeros(len(examples)), np.array(lengths)
    for size in set(size_Q.tolist()):
        rows = size_Q == size
        found_Q[rows] = metric(ranking_QK[rows], pool_QC[rows, :size], length_Q[rows])
    return found_Q


def _topics(examples: Sequence[RankingExample], rankings: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Topics of the listed items [Q,K] and of all that could have been found [Q,C]."""
    if lacking := next((example for example in examples if len(example.topics) < len(example.candidates)), None):
        raise DataError(
            f"query {lacking.query_id}: its candidates have no topics, which {', '.join(metrics.TOPIC_METRICS)} are "
            "about: take them out of eval.metrics"
        )
    topics_QC = _pad([(*e.topics, *(lost.topic for lost in e.missed)) for e in examples], -1, np.int64)
    return metrics.take_topics(topics_QC, _pad(rankings, -1, np.int64)), topics_QC


def error_class(example: RankingExample, prediction: Prediction, k: int) -> str:
    """Why the first k of the ranking are not the best possible; exactly one name of ERRORS.

    With n = min(relevant candidates, k), the relevant items the first k could hold, in this order:
    no_relevant  n = 0: nothing could be found (what the pool missed is not this method's error)
    malformed    the transcript broke a rule
    slate_miss   fewer than n relevant items entered the slate
    rank_drop    n or more entered it, but fewer than n stand in the first k of the ranking
    ok           n relevant items stand in the first k
    """
    relevant = {i for i, gain in enumerate(example.relevance) if gain > 0}
    n = min(len(relevant), k)
    if n == 0:
        return "no_relevant"
    if prediction.outcome.breaks:
        return "malformed"
    if len(relevant.intersection(prediction.slate)) < n:
        return "slate_miss"
    return "rank_drop" if len(relevant.intersection(prediction.ranking[:k])) < n else "ok"


def errors_of(examples: Sequence[RankingExample], predictions: Sequence[Prediction], k: int) -> list[str]:
    """`error_class` of every query."""
    return [error_class(example, prediction, k) for example, prediction in zip(examples, predictions)]


def draws(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n queries is drawn, with replacement, in every resample: [up to 64, n] at a time."""
    rng, step = np.random.default_rng(seed), 64
    for start in range(0, resamples, step):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start))


def resampled_means(values_QM: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means [resamples, M] over queries drawn with replacement; all M columns share each draw."""
    n = len(values_QM)
    return np.concatenate([counts_RQ @ values_QM / n for counts_RQ in draws(n, resamples, seed)])


def _interval(name: str, point: float, means: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(means, (2.5, 97.5))
    # + 0.0: minus zero would be written differently.
    values = {name: point, "low": low, "high": high}
    return {key: round(float(value), DIGITS) + 0.0 for key, value in values.items()}


def summarise(
    scores: Mapping[str, Mapping[str, np.ndarray]], versus: str, resamples: int = 2000, seed: int = 0
) -> dict[str, object]:
    """Means over queries and paired differences to `versus`, each with its 95 % interval.

    Percentile bootstrap over queries; every method and metric sees the same resamples, so a
    difference is paired. `{"methods": {method: {metric: {mean, low, high}}}, "paired": {method:
    {metric: {difference, low, high}}}, "versus", "queries", "resamples", "seed"}`. Raises
    ValueError when `versus` is not one of the methods, or there is no query.
    """
    if versus not in scores:
        raise ValueError(f"eval.versus={versus!r} was not evaluated; choose one of {', '.join(scores)}")
    names = tuple(scores[versus])
    values = np.stack([scores[method][name] for method in scores for name in names], axis=1)
    if not len(values):
        raise ValueError("no query to evaluate: the split is empty")
    shape = (len(scores), len(names))
    means, point = resampled_means(values, resamples, seed).reshape(-1, *shape), values.mean(0).reshape(shape)
    base = list(scores).index(versus)

    def intervals(kind: str, point_M: np.ndarray, means_RM: np.ndarray) -> dict[str, dict[str, float]]:
        return {name: _interval(kind, point_M[j], means_RM[:, j]) for j, name in enumerate(names)}

    methods, paired = {}, {}
    for i, method in enumerate(scores):
        methods[method] = intervals("mean", point[i], means[:, i])
        if i != base:
            paired[method] = intervals("difference", point[i] - point[base], means[:, i] - means[:, base])
    return {
        "methods": methods,
        "paired": paired,
        "versus": versus,
        "queries": len(values),
        "resamples": resamples,
        "seed": seed,
    }


def compare(
    examples: Sequence[RankingExample],
    predictions: Mapping[str, Sequence[Prediction]],
    cutoffs: Sequence[int],
    versus: str,
    resamples: int = 2000,
    seed: int = 0,
    names: Sequence[str] = AT_CUTOFF,
    rewards: Mapping[str, Mapping[str, np.ndarray]] = MappingProxyType({}),
    reward_k: int = 0,
) -> Evaluation:
    """All methods on the same examples; the summary also counts errors and broken rules.

    rewards: learned ones, method -> name -> [Q], of the first reward_k of the ranking; scores like the others.

    Adds to `summarise`: `"errors": {method: {name of ERRORS: queries}}` (at the largest cut-off),
    `"outcomes": {method: {outcome: queries}}`, `"cutoffs"` and, where there are any, `"rewards": {name: reward_k}`.
    Raises what `score` and `summarise` do, and ValueError on a method name that could not be a file name.
    """
    for method in predictions:
        if not re.fullmatch(r"[\w.+-]+", method):
            raise ValueError(f"method {method!r}: use letters, digits and _ . + - only; it names a file")
    scores = {method: score(examples, predicted, cutoffs, names) for method, predicted in predictions.items()}
    scores = {method: found | dict(rewards.get(method, {})) for method, found in scores.items()}
    errors = {method: errors_of(examples, predicted, max(cutoffs)) for method, predicted in predictions.items()}
    summary = summarise(scores, versus, resamples, seed)
    summary["cutoffs"] = sorted(set(cutoffs))
    if rewards:
        summary["rewards"] = dict.fromkeys(rewards[versus], reward_k)
    summary["errors"] = {method: {name: Counter(found)[name] for name in ERRORS} for method, found in errors.items()}
    summary["outcomes"] = {
        method: dict(sorted(Counter(prediction.outcome.name for prediction in predicted).items()))
        for method, predicted in predictions.items()
    }
    return Evaluation(examples, predictions, scores, errors, summary)


def run_baselines(
    names: Sequence[str],
    train_examples: Sequence[RankingExample],
    catalogue: Sequence[tuple[str, str]],
    kind: str,
    seed: int,
    examples: Sequence[RankingExample],
    slate_max: int,
    rank_max: int,
) -> tuple[dict[str, list[Prediction]], dict[str, str]]:
    """Predictions of every baseline that makes sense here, and the reasons of those that do not."""
    predictions, left_out = {}, {}
    for name in names:
        try:
            found = BASELINES[name](train_examples, catalogue, kind, seed)(examples)
        except NotApplicable as reason:
            left_out[name] = str(reason)
            continue
        predictions[name] = [from_scores(scores, slate_max, rank_max) for scores in found]
    return predictions, left_out
