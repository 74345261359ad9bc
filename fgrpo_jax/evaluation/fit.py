"""How well a model of feedback fits lists that were shown: likelihood, calibration, and whether it ranks them rightly.

Of every position: the log-likelihood (nats) of its feedback y from 0 to 1, y log p + (1 - y) log(1 - p); the Brier
score (p - y)^2; the expected calibration error, the mean distance of mean p and mean y in ten bins of equal width of
p, weighted by their positions; the AUC of p, any feedback above 0 being positive. Of a query's lists: Kendall's tau-b
between what the model expects of a list (the sum of p) and its feedback (the sum of y), and the share of pairs of
lists with different feedback that it orders rightly, half of them where it says the same; both are means over the
queries with two lists, at least, whose feedback differs. Intervals are 95 % percentile bootstraps over queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fgrpo_jax.evaluation.evaluate import DIGITS, draws
from fgrpo_jax.evaluation.table import align

BINS = 10
NAMES = ("log_likelihood", "brier", "calibration_error", "auc", "kendall_tau", "pairwise_accuracy")


class Shown(NamedTuple):
    """Every position X of the lists that were shown, one behind the other."""

    logit: np.ndarray  # [X] of positive feedback, as the model sees it
    feedback: np.ndarray  # [X] from 0 to 1
    query: np.ndarray  # [X] int: number of its query
    list: np.ndarray  # [X] int: number of its list, not used for another one


def fit(shown: Shown, resamples: int, seed: int) -> dict[str, object] | None:
    """JSON-ready: `{name of NAMES: {"value", "low", "high"} or None where there is none, "queries", "lists",
    "positions", "compared_queries": with lists that differ, "bins": [{"positions", "predicted", "observed"}]}`.

    None where no list was shown.
    """
    if not len(shown.logit):
        return None
    queries, query_X = np.unique(shown.query, return_inverse=True)
    logit_X, y_X = shown.logit.astype(np.float64), shown.feedback.astype(np.float64)
    p_X = 1 / (1 + np.exp(-logit_X))
    bin_X = np.minimum((p_X * BINS).astype(int), BINS - 1)
    likelihood_X = -y_X * np.logaddexp(0, -logit_X) - (1 - y_X) * np.logaddexp(0, logit_X)

    def by_query(values_X: np.ndarray) -> np.ndarray:
        return np.bincount(query_X, values_X, len(queries))

    def by_bin(values_X: np.ndarray) -> np.ndarray:
        cells = np.bincount(query_X * BINS + bin_X, values_X, len(queries) * BINS)
        return cells.reshape(-1, BINS)

    size_Q, likelihood_Q, brier_Q = map(by_query, (np.ones(len(p_X)), likelihood_X, (p_X - y_X) ** 2))
    gap_QB, auc = by_bin(p_X - y_X), _Auc(logit_X, y_X > 0, query_X)
    agreement_Q2, compared_Q = _agreement(p_X, y_X, query_X, shown.list)

    def statistics(weight_Q: np.ndarray) -> list[float]:
        """NAMES, of queries that count so often; nan where there is nothing to tell."""
        n = weight_Q @ size_Q
        error = np.abs(weight_Q @ gap_QB).sum() / n
        agreement = _ratio(weight_Q @ agreement_Q2, weight_Q @ compared_Q)
        return [weight_Q @ likelihood_Q / n, weight_Q @ brier_Q / n, error, auc(weight_Q), *agreement]

    drawn = [statistics(w) for counts_RQ in draws(len(queries), resamples, seed) for w in counts_RQ.astype(float)]
    bins = [by_bin(values_X).sum(0) for values_X in (np.ones(len(p_X)), p_X, y_X)]
    return {
        **_intervals(statistics(np.ones(len(queries))), np.array(drawn)),
        "queries": len(queries),
        "lists": len(np.unique(shown.list)),
        "positions": len(p_X),
        "compared_queries": int(compared_Q.sum()),
        "bins": [
            {"positions": int(n), "predicted": _rounded(p / max(n, 1)), "observed": _rounded(y / max(n, 1))}
            for n, p, y in zip(*bins)
        ],
    }


def _ratio(above: np.ndarray, below: float) -> np.ndarray:
    return above / below if below else np.full(np.shape(above), np.nan)


def _rounded(value: float) -> float:
    return round(float(value), DIGITS) + 0.0


def _intervals(point: list[float], drawn_RM: np.ndarray) -> dict[str, dict[str, float] | None]:
    """Resamples that can tell nothing do not count."""
    found: dict[str, dict[str, float] | None] = {}
    for name, value, drawn_R in zip(NAMES, point, drawn_RM.T):
        told = drawn_R[np.isfinite(drawn_R)]
        low, high = np.percentile(told, (2.5, 97.5)) if len(told) else (value, value)
        values = {"value": value, "low": low, "high": high}
        found[name] = {k: _rounded(v) for k, v in values.items()} if np.isfinite(value) else None
    return found


class _Auc:
    """The area under the ROC curve where queries have weights; scores are sorted once."""

    def __init__(self, score_X: np.ndarray, positive_X: np.ndarray, query_X: np.ndarray):
        order = np.argsort(score_X)
        self._query, self._positive = query_X[order], positive_X[order]
        self._begins = np.flatnonzero(np.diff(score_X[order], prepend=-np.inf))  # of equal scores

    def __call__(self, weight_Q: np.ndarray) -> float:
        weight_X = weight_Q[self._query]
        positive, negative = (
            np.add.reduceat(weight_X * kind, self._begins) for kind in (self._positive, ~self._positive)
        )
        pairs = positive.sum() * negative.sum()
        below = np.cumsum(negative) - negative
        return float(_ratio((positive * (below + negative / 2)).sum(), pairs))


def _agreement(
    p_X: np.ndarray, y_X: np.ndarray, query_X: np.ndarray, list_X: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tau-b and share of pairs ordered rightly [Q,2], and whether there is something to order [Q], else zeros.

    Sums are compared to six digits: more are rounding.
    """
    _, first_J, list_of_X = np.unique(list_X, return_index=True, return_inverse=True)
    query_J = query_X[first_J]
    expected_J, observed_J = (np.round(np.bincount(list_of_X, values), DIGITS) for values in (p_X, y_X))
    agreement_Q2, compared_Q = np.zeros((query_X.max() + 1, 2)), np.zeros(query_X.max() + 1)
    for q, rows in enumerate(np.split(np.argsort(query_J, kind="stable"), np.cumsum(np.bincount(query_J))[:-1])):
        i, j = np.triu_indices(len(rows), 1)
        said, was = (np.sign(sums[rows[i]] - sums[rows[j]]) for sums in (expected_J, observed_J))
        if was.any():
            compared_Q[q] = 1
            tau = (said * was).sum() / np.sqrt((said**2).sum() * (was**2).sum()) if said.any() else 0.0
            agreement_Q2[q] = tau, (1 + (said * was)[was != 0]).mean() / 2
    return agreement_Q2, compared_Q


def lines(fits: Mapping[str, Mapping[str, object]]) -> str:
    """A table of them, a model a row."""
    columns = ("log-likelihood", "Brier", "ECE", "AUC", "tau-b", "pairs")
    rows = [[name, *(_cell(found[key]) for key in NAMES)] for name, found in fits.items()]
    some = next(iter(fits.values()))
    head = (
        f"fit to {some['lists']} shown lists of {some['queries']} queries, [95 % interval]; ECE of {BINS} bins of equal"
    )
    head += f" width; tau-b and pairs ordered rightly in {some['compared_queries']} queries with lists that differ"
    return f"{head}\n" + align([["", *columns], *rows])


def _cell(interval: Mapping[str, float] | None) -> str:
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**interval) if interval else "-"
