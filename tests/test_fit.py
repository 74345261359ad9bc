"""How models of feedback fit shown lists, by plain loops and by SciPy."""

import numpy as np
import pytest
from scipy import stats

from fgrpo_jax.evaluation.evaluate import draws
from fgrpo_jax.evaluation.fit import NAMES, Shown, fit, lines


def lists(queries=30, seed=0, levels=(0.0, 0.0, 1.0)):
    """Up to four lists of up to five positions a query; logits of few values, so that some are equal."""
    rng = np.random.default_rng(seed)
    found, number = [], 0
    for q in range(queries):
        for _ in range(rng.integers(1, 5)):
            size = int(rng.integers(1, 6))
            feedback = rng.choice(levels, size)
            logit = np.round(2 * feedback - 1 + rng.normal(size=size), 1)
            found.append((logit, feedback, np.full(size, 3 * q), np.full(size, number)))
            number += 7  # numbers need not follow each other
    order = rng.permutation(number // 7)
    return Shown(*(np.concatenate(part).astype(kind) for part, kind in zip(zip(*(found[i] for i in order)), "ffii")))


def plainly(shown):
    """The point values, by definition."""
    p, y = 1 / (1 + np.exp(-shown.logit.astype(float))), shown.feedback.astype(float)
    error = 0.0
    for k in range(10):
        cell = (p >= k / 10) & ((p < (k + 1) / 10) | (k == 9))
        error += abs(p[cell].mean() - y[cell].mean()) * cell.mean() if cell.any() else 0
    pairs = [(a > b) + (a == b) / 2 for a in p[y > 0] for b in p[y == 0]]
    taus, right = [], []
    for q in np.unique(shown.query):
        sums = [(p[shown.list == j].sum(), y[shown.list == j].sum()) for j in np.unique(shown.list[shown.query == q])]
        said, was = zip(*sums)
        if len(set(was)) > 1:
            tau = stats.kendalltau(said, was).statistic
            taus.append(0 if np.isnan(tau) else tau)
            right.append(np.mean([
                0.5 if a == c else (a > c) == (b > d)
                for i, (a, b) in enumerate(sums) for c, d in sums[i + 1:] if b != d
            ]))  # fmt: skip
    values = (np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)), np.mean((p - y) ** 2), error, np.mean(pairs))
    return dict(zip(NAMES, (*values, np.mean(taus), np.mean(right)))), len(taus)


@pytest.mark.parametrize("seed, levels", [(0, (0, 0, 1)), (1, (0, 1)), (2, (0, 0, 0.25, 0.5, 1)), (3, (0.5, 1))])
def test_values_are_those_of_their_definitions(seed, levels):
    shown = lists(seed=seed, levels=levels)
    if min(levels) > 0:  # then there is no AUC
        shown = shown._replace(feedback=np.where(shown.query == 0, 0, shown.feedback))
    found, (expected, compared) = fit(shown, 5, 0), plainly(shown)
    for name, value in expected.items():
        assert found[name]["value"] == pytest.approx(value, abs=2e-6), name
    assert found["compared_queries"] == compared > 5
    assert (found["queries"], found["positions"]) == (30, len(shown.logit))
    assert sum(cell["positions"] for cell in found["bins"]) == len(shown.logit)


def test_intervals_are_those_of_queries_drawn_again():
    """Each resample, written out as the queries that it holds, so often."""
    shown = lists(queries=12)
    resampled = []
    for counts in np.concatenate(list(draws(12, 40, 3))):
        rows, queries, numbers = [], [], []
        for q, times in enumerate(counts):
            mine = np.flatnonzero(shown.query == 3 * q)
            for _ in range(times):
                rows.append(mine)
                queries.append(np.full(len(mine), len(queries)))
                numbers.append(shown.list[mine] + 10_000 * len(numbers))
        rows = np.concatenate(rows)
        again = Shown(shown.logit[rows], shown.feedback[rows], np.concatenate(queries), np.concatenate(numbers))
        resampled.append(plainly(again)[0])
    found = fit(shown, 40, 3)
    for name in NAMES:
        low, high = np.percentile([one[name] for one in resampled], (2.5, 97.5))
        assert (found[name]["low"], found[name]["high"]) == pytest.approx((low, high), abs=2e-6), name
        assert low < found[name]["value"] < high


def test_what_cannot_be_told_is_not_told():
    assert fit(Shown(*np.zeros((4, 0))), 10, 0) is None
    shown = Shown(np.array([0.0, 40.0, -40.0]), np.array([1.0, 1.0, 1.0]), np.zeros(3, int), np.array([0, 0, 1]))
    found = fit(shown, 10, 0)
    assert found["auc"] is None and found["kendall_tau"]["value"] == 1  # 2 of 2 against 1 of 1
    assert found["log_likelihood"]["value"] == pytest.approx((np.log(0.5) - 40) / 3)  # not minus infinity
    found = fit(shown._replace(list=np.zeros(3, int)), 10, 0)
    assert found["kendall_tau"] is None and found["pairwise_accuracy"] is None and found["compared_queries"] == 0
    assert lines({"judge": found}).splitlines()[-1].split()[-3:] == ["-", "-", "-"]
