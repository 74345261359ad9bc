"""Metrics on request, topics, and relevant items that no pool holds; what default evaluations write stays as it is."""

import dataclasses

import ir_measures
import numpy as np
import pytest

from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.evaluation import evaluate, report
from fgrpo_jax.evaluation.evaluate import Prediction
from fgrpo_jax.types import Missed, RankingExample

EVERY = (*evaluate.AT_CUTOFF, *evaluate.MORE_AT_CUTOFF, *evaluate.MORE_WHOLE)


def example(name, relevance, topics=(), missed=()):
    candidates = tuple((f"i{i}", f"Item {i}") for i in range(len(relevance)))
    return RankingExample(name, "", candidates, tuple(map(float, relevance)), topics=topics, missed=missed)


def pools(n=40, seed=0):
    """Pools of 5 to 8 candidates with topics, up to two missed items, and rankings of 3."""
    rng = np.random.default_rng(seed)
    examples, predictions = [], []
    for q in range(n):
        size = int(rng.integers(5, 9))
        missed = tuple(Missed(f"far {i}", float(rng.integers(1, 3)), int(rng.integers(-1, 3))) for i in range(q % 3))
        topics = tuple(rng.integers(0, 3, size).tolist())
        examples.append(example(f"q{q}", rng.choice([0, 0, 1, 2], size), topics, missed))
        predictions.append(evaluate.from_scores(rng.random(size), 4, 3))
    return examples, predictions


def test_numbers_by_hand():
    e = example("a", [1, 0, 1, 0], (4, 4, 4, 2), (Missed("far", 1.0, 2),))
    scores = evaluate.score([e], [Prediction((0, 1, 2, 3), (0, 1, 2))], (2, 3), EVERY)
    found = {name: value[0] for name, value in scores.items()}
    d = 1 / np.log2(np.arange(3) + 2)
    assert found["recall@3"] == pytest.approx(2 / 3) and found["slate_recall"] == pytest.approx(2 / 3)
    assert found["f1@2"] == pytest.approx(2 / (2 + 3)) and found["map@3"] == pytest.approx((1 + 2 / 3) / 3)
    assert found["ndcg@3"] == pytest.approx((d[0] + d[2]) / d.sum())
    assert found["alpha_ndcg@3"] == pytest.approx((d[0] + d[2] / 2) / (d[0] + d[1] + d[2] / 2))
    assert found["diversity@3"] == pytest.approx(1 / 3)
    assert found["list_auc"] == 0.5
    assert found["pool_auc"] == pytest.approx((2 + 1 + 0.5) / 6)  # the missed one is tied with the unlisted one


def test_more_names_add_metrics_and_change_none():
    examples, predictions = pools()
    plain = evaluate.score(examples, predictions, (1, 3))
    every = evaluate.score(examples, predictions, (1, 3), EVERY)
    assert set(plain) < set(every) and len(every) == 2 * 9 + 4
    for name, values in plain.items():
        np.testing.assert_array_equal(values, every[name])
    alone = [evaluate.score([e], [p], (1, 3), EVERY) for e, p in zip(examples, predictions)]
    for name, values in every.items():  # pools of other sizes in the batch change nothing
        np.testing.assert_allclose(values, [one[name][0] for one in alone], err_msg=name)


def test_topics_are_asked_for_only_where_they_are_needed():
    bare = [dataclasses.replace(e, topics=()) for e in pools()[0]]
    evaluate.score(bare, pools()[1], (3,), ("map", "pool_auc"))
    with pytest.raises(DataError, match="query q0: its candidates have no topics.*take them out of eval.metrics"):
        evaluate.score(bare, pools()[1], (3,), ("alpha_ndcg",))


def test_trec_tools_find_the_same_numbers_where_pools_missed_items(tmp_path):
    examples, predictions = pools()
    found = evaluate.compare(examples, {"one": predictions}, (1, 3), "one", resamples=20, names=EVERY)
    text = report.write_evaluation(tmp_path / "eval", found, {}, {})
    assert "alpha_ndcg@3" in text and "pool_auc" in text and "map@1" in text
    judged = list(ir_measures.read_trec_qrels(str(tmp_path / "eval" / "qrels.trec")))
    run = list(ir_measures.read_trec_run(str(tmp_path / "eval" / "one.run.trec")))
    measures = {"ndcg@3": ir_measures.nDCG @ 3, "map@3": ir_measures.AP @ 3, "recall@3": ir_measures.R @ 3}
    for name, measure in measures.items():
        theirs = {row.query_id: row.value for row in ir_measures.iter_calc([measure], judged, run)}
        np.testing.assert_allclose(found.scores["one"][name], [theirs[e.query_id] for e in examples], atol=1e-9)
    assert '"missed": {"far 0"' in (tmp_path / "eval" / "per_query.jsonl").read_text()
