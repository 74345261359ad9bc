"""Two methods over several seeds: means, spread, and differences paired by seed and query."""

import json

import numpy as np
import pytest

from fgrpo_jax.config import ConfigError
from fgrpo_jax.evaluation import seeds

SCORES = np.random.default_rng(0).random((2, 3, 40))  # method, seed, query


@pytest.fixture
def runs(tmp_path):
    for seed in range(3):
        folder = tmp_path / f"run{seed}" / "eval" / "test"
        folder.mkdir(parents=True)
        rows = []
        for q in range(40):
            methods = {name: {"metrics": {"mrr": SCORES[m, seed, q]}} for m, name in enumerate(("rl", "sft"))}
            rows.append(json.dumps({"query_id": f"q{q}", "methods": methods}) + "\n")
        # The order of queries in a file must not matter.
        (folder / "per_query.jsonl").write_text("".join(rows if seed else rows[::-1]))
    return [str(tmp_path / f"run{seed}") for seed in range(3)]


def entries(runs, method):
    return tuple(f"{run}:{method}" for run in runs)


def test_seeds_are_compared_query_by_query(runs):
    table = seeds.compare(entries(runs, "rl"), entries(runs, "sft"), "test", ("mrr",))
    a, b = 100 * SCORES
    row = table.splitlines()[-1]
    assert table.startswith("3 seeds, 40 queries")
    assert f"{a.mean():.1f} ±{a.mean(1).std(ddof=1):.1f}" in row
    assert f"{b.mean():.1f} ±{b.mean(1).std(ddof=1):.1f}" in row
    assert f"{(a - b).mean():+.2f} [" in row
    low, high = (float(x) for x in row.split("[")[1].strip("]").split(","))
    spread = 1.96 * (a - b).mean(0).std() / np.sqrt(40)
    assert low == pytest.approx((a - b).mean() - spread, abs=0.2 * spread)
    assert high == pytest.approx((a - b).mean() + spread, abs=0.2 * spread)


def test_the_first_queries_can_be_left_out(runs):
    table = seeds.compare(entries(runs, "rl")[1:], entries(runs, "sft")[1:], "test", ("mrr",), skip=10)
    assert table.startswith("2 seeds, 30 queries")
    assert f"{100 * (SCORES[0] - SCORES[1])[1:, 10:].mean():+.2f} [" in table


@pytest.mark.parametrize(
    "a, b, message",
    [
        ("rl", "", "3 runs in a and 0 in b"),
        ("rl", "grpo", "has no method 'grpo', only rl, sft"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs, a, b, message):
    with pytest.raises(ConfigError, match=message):
        seeds.compare(entries(runs, a), entries(runs, b) if b else (), "test", ("mrr",))


def test_other_splits_metrics_and_queries_are_refused(runs, tmp_path):
    both = entries(runs, "rl"), entries(runs, "sft")
    with pytest.raises(ConfigError, match="there is no .*validation"):
        seeds.compare(*both, "validation", ("mrr",))
    with pytest.raises(ConfigError, match="has no ndcg@5, only mrr"):
        seeds.compare(*both, "test", ("ndcg@5",))
    path = tmp_path / "run2" / "eval" / "test" / "per_query.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    said = "run0:rl and .*run2:rl were not evaluated on the same queries .40 and 39; 1 of one alone, as 'q0'.: evaluate"
    with pytest.raises(ConfigError, match=said):
        seeds.compare(*both, "test", ("mrr",))
