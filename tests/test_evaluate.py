"""Scores, errors, intervals, and the files an evaluation leaves."""

import itertools
import json
import os

import ir_measures
import numpy as np
import pytest

from fgrpo_jax.evaluation import evaluate, report
from fgrpo_jax.evaluation.evaluate import Prediction
from fgrpo_jax.types import OK, Outcome, RankingExample

DUPLICATE = Outcome("rank_duplicate", "rank")


def example(query_id, relevance, history=()):
    candidates = tuple((f"item {i}", f"Item number {i}") for i in range(len(relevance)))
    return RankingExample(query_id, "", candidates, tuple(map(float, relevance)), history)


def fabricated(n=60, seed=0):
    """Queries of 5 to 8 candidates with graded gains, some without a relevant one, and two methods."""
    rng = np.random.default_rng(seed)
    examples, methods = [], {"good": [], "bad-method": []}
    for q in range(n):
        size = int(rng.integers(5, 9))
        gains = rng.choice([0, 0, 0, 1, 2], size)
        examples.append(example(f"query {q}%", gains))
        for name, noise in (("good", 0.5), ("bad-method", 3.0)):
            predicted = evaluate.from_scores(gains + noise * rng.standard_normal(size), 4, 3)
            if q % 11 == 3:
                predicted = predicted._replace(outcome=DUPLICATE, ranking=predicted.ranking[:1] * 2)
            if q % 13 == 5:
                predicted = Prediction((0, 0), (), Outcome("slate_duplicate", "slate"))
            methods[name].append(predicted)
    return examples, methods


def test_from_scores_cuts_and_keeps_ties_in_pool_order():
    assert evaluate.from_scores([0, 2, 1, 2], 3, 2) == Prediction((1, 3, 2), (1, 3), OK)
    assert evaluate.from_scores(np.zeros(2), 10, 5) == Prediction((0, 1), (0, 1), OK)
    assert evaluate.from_scores(np.zeros(4), 1, 5) == Prediction((0,), (0,), OK)
    with pytest.raises(ValueError, match="candidate 1 .* not finite"):
        evaluate.from_scores([0, np.nan], 1, 1)


def test_score_by_hand():
    examples = [example("a", [0, 1, 0, 1]), example("b", [1, 0]), example("none", [0, 0, 0])]
    predictions = [Prediction((1, 0, 3), (0, 1)), Prediction((1, 0), (1, 0)), Prediction((0, 1), (0,))]
    scores = evaluate.score(examples, predictions, (1, 2))
    names = (f"{name}@{k}" for name in evaluate.AT_CUTOFF for k in (1, 2))
    assert tuple(scores) == (*names, *evaluate.WHOLE) and scores["mrr"].dtype == np.float64
    half = 1 / np.log2(3)
    np.testing.assert_allclose(scores["recall@2"], [0.5, 1, 0])
    np.testing.assert_allclose(scores["precision@2"], [0.5, 0.5, 0])
    np.testing.assert_allclose(scores["hit@1"], [0, 0, 0])
    np.testing.assert_allclose(scores["ndcg@2"], [half / (1 + half), half, 0])
    np.testing.assert_allclose(scores["mrr"], [0.5, 0.5, 0])
    np.testing.assert_allclose(scores["slate_recall"], [1, 1, 0])


def test_the_best_that_ranking_a_slate_could_give():
    """slate_ndcg is the NDCG of the best of all its orders; a broken slate has none."""
    examples, methods = fabricated(20)
    found = evaluate.score(examples, methods["good"], (2, 3), ("slate_ndcg",))
    for q, (one, predicted) in enumerate(zip(examples, methods["good"])):
        slate, _ = evaluate.counted(predicted)
        for k in (2, 3):
            orders = [Prediction(slate, order) for order in itertools.permutations(slate)]
            scores = [evaluate.score([one], [order], (k,), ("ndcg",))[f"ndcg@{k}"][0] for order in orders]
            np.testing.assert_allclose(found[f"slate_ndcg@{k}"][q], max(scores))


def test_a_broken_phase_scores_nothing_and_a_broken_ranking_leaves_the_slate():
    query, items = example("a", [1, 0]), (0, 1)
    for outcome, slate_recall in ((Outcome("too_long", "slate"), 0), (DUPLICATE, 1), (OK, 1)):
        scores = evaluate.score([query], [Prediction(items, items, outcome)], (1,))
        assert scores["slate_recall"][0] == slate_recall
        assert scores["ndcg@1"][0] == scores["mrr"][0] == (outcome == OK)


@pytest.mark.parametrize(
    "relevance, prediction, expected",
    [
        ([0, 0], Prediction((0,), (0,)), "no_relevant"),
        ([0, 0], Prediction((), (), Outcome("slate_empty", "slate")), "no_relevant"),
        ([1, 0], Prediction((0,), (0,), DUPLICATE), "malformed"),
        ([1, 0, 0], Prediction((1, 2), (1,)), "slate_miss"),
        ([1, 1, 0], Prediction((0, 2), (0,)), "slate_miss"),  # one of two is missing
        ([1, 0, 0], Prediction((1, 0), (1,)), "rank_drop"),
        ([1, 0, 0, 0], Prediction((1, 2, 3, 0), (1, 2, 3, 0)), "rank_drop"),  # fourth, k is 3
        ([1, 0, 0], Prediction((1, 0), (1, 0)), "ok"),
        ([1, 1, 1, 1], Prediction((0, 1, 2), (2, 1, 0)), "ok"),  # the best that k = 3 allows
        ([1, 1, 1, 1], Prediction((0, 1, 2), (2, 1)), "rank_drop"),
    ],
)
def test_error_classes(relevance, prediction, expected):
    assert evaluate.error_class(example("q", relevance), prediction, 3) == expected


def test_bad_predictions_are_refused_by_query():
    query = example("q7", [1, 0])
    for prediction, message in (
        (Prediction((0, 0), (0,)), "q7: slate .* distinct"),
        (Prediction((0, 2), (0,)), "q7: slate .* below 2"),
        (Prediction((0,), (1,)), "q7: ranking .* outside the slate"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.score([query], [prediction], (1,))
    with pytest.raises(ValueError, match="0 predictions for 1 queries"):
        evaluate.score([query], [], (1,))


def test_intervals_cover_the_textbook_ones_and_differences_are_paired():
    rng = np.random.default_rng(3)
    base = rng.random(800)
    scores = {"base": {"m": base}, "better": {"m": base + 0.01}, "other": {"m": rng.random(800)}}
    summary = evaluate.summarise(scores, "base", resamples=2000)
    found, error = summary["methods"]["base"]["m"], 1.96 * base.std() / np.sqrt(800)
    assert found["mean"] == pytest.approx(base.mean(), abs=1e-6)
    assert found["low"] == pytest.approx(base.mean() - error, abs=0.1 * error)
    assert found["high"] == pytest.approx(base.mean() + error, abs=0.1 * error)
    better, other = summary["paired"]["better"]["m"], summary["paired"]["other"]["m"]
    assert (better["low"], better["high"]) == (0.01, 0.01)  # the same queries in every resample
    assert other["high"] - other["low"] > 0.01
    assert "base" not in summary["paired"]
    with pytest.raises(ValueError, match="'sft' was not evaluated; choose one of base, better, other"):
        evaluate.summarise(scores, "sft")
    with pytest.raises(ValueError, match="empty"):
        evaluate.summarise({"a": {"m": np.zeros(0)}}, "a")


def test_resampled_means_do_not_depend_on_the_other_columns():
    values = np.random.default_rng(0).random((50, 3))
    together = evaluate.resampled_means(values, 130, 0)
    assert together.shape == (130, 3)
    np.testing.assert_allclose(together[:, 1:2], evaluate.resampled_means(values[:, 1:2], 130, 0))


def test_compare_counts_every_query_once():
    examples, predictions = fabricated()
    evaluation = evaluate.compare(examples, predictions, (1, 3), "good", resamples=50)
    for method in predictions:
        assert sum(evaluation.summary["errors"][method].values()) == len(examples)
        assert sum(evaluation.summary["outcomes"][method].values()) == len(examples)
    assert all(evaluation.summary["errors"]["bad-method"][name] for name in evaluate.ERRORS)
    with pytest.raises(ValueError, match="names a file"):
        evaluate.compare(examples, {"a/b": predictions["good"]}, (1,), "a/b")


def test_run_baselines_predicts_and_names_what_is_left_out():
    examples = [example(f"q{i}", [1, 0, 0]) for i in range(4)]
    names = ("random", "popularity", "bm25")
    predictions, left_out = evaluate.run_baselines(names, [], (), "qa", 0, examples, 2, 1)
    assert set(predictions) == {"random", "bm25"} and list(left_out) == ["popularity"]
    assert all(len(p.slate) == 2 and p.ranking == p.slate[:1] for p in predictions["random"])


def _write(folder, left_out=None):
    examples, predictions = fabricated()
    evaluation = evaluate.compare(examples, predictions, (1, 3), "good", resamples=50)
    manifest = report.manifest({"seed": 0}, {"seed": 0, "bootstrap": 0}, {"validation": "abc"}, "f00")
    return evaluation, report.write_evaluation(folder, evaluation, manifest, left_out or {})


def test_any_trec_tool_finds_the_same_numbers(tmp_path):
    evaluation, _ = _write(tmp_path / "eval")
    judged = list(ir_measures.read_trec_qrels(str(tmp_path / "eval" / "qrels.trec")))
    scale = json.loads((tmp_path / "eval" / "metrics.json").read_text())["trec_gain_scale"]
    assert scale == 1
    measures = {
        "ndcg@1": ir_measures.nDCG @ 1,
        "ndcg@3": ir_measures.nDCG @ 3,
        "recall@3": ir_measures.R @ 3,
        "precision@3": ir_measures.P @ 3,
        "hit@3": ir_measures.Success @ 3,
        "mrr": ir_measures.RR,
    }
    for method, scores in evaluation.scores.items():
        run = list(ir_measures.read_trec_run(str(tmp_path / "eval" / f"{method}.run.trec")))
        query_ids = {row.query_id for row in run}
        assert len(query_ids) == len(evaluation.examples)  # also where nothing was ranked
        for query_id in query_ids:
            points = [row.score for row in run if row.query_id == query_id]
            assert all(a > b for a, b in zip(points, points[1:]))
        for name, measure in measures.items():
            theirs = {row.query_id: row.value for row in ir_measures.iter_calc([measure], judged, run)}
            assert len(theirs) == len(evaluation.examples)
            for example_, ours in zip(evaluation.examples, scores[name]):
                assert ours == pytest.approx(theirs[report.trec_id(example_.query_id)], abs=1e-9)


def test_gains_with_fractions_become_whole_numbers():
    assert report.gain_scale([example("a", [0, 0.25, 1])]) == 100
    assert report.qrels([example("a", [0, 0.25])], 100) == "a 0 item%200 0\na 0 item%201 25\n"
    assert report.gain_scale([example("a", [1 / 3])]) == 10**6


def test_same_inputs_same_bytes_and_an_old_evaluation_is_replaced_whole(tmp_path):
    _write(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "stale.run.trec").write_text("old")
    _write(tmp_path / "b")
    read = [{f.name: f.read_bytes() for f in (tmp_path / d).iterdir()} for d in "ab"]
    assert read[0] == read[1]
    assert set(read[0]) == {
        "metrics.json", "per_query.jsonl", "qrels.trec", "manifest.json", "table.txt", "report.html",
        "good.run.trec", "bad-method.run.trec",
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_failed_write_leaves_the_old_evaluation(tmp_path, monkeypatch):
    _write(tmp_path / "a")
    before = (tmp_path / "a" / "table.txt").read_bytes()
    replace = os.replace

    def full(source, target):
        if target == tmp_path / "a" and source.name == "new":
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(report.os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        _write(tmp_path / "a")
    assert (tmp_path / "a" / "table.txt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_per_query_rows_hold_lists_errors_and_metrics(tmp_path):
    evaluation, _ = _write(tmp_path / "a")
    rows = [json.loads(line) for line in (tmp_path / "a" / "per_query.jsonl").read_text().splitlines()]
    assert [row["query_id"] for row in rows] == [e.query_id for e in evaluation.examples]
    for q, row in enumerate(rows):
        good = row["methods"]["good"]
        assert good["error"] == evaluation.errors["good"][q]
        assert good["metrics"]["ndcg@3"] == pytest.approx(evaluation.scores["good"]["ndcg@3"][q], abs=1e-6)
        assert set(good["ranking"]) <= set(row["candidates"])


def test_table_shows_methods_differences_errors_and_what_is_left_out(tmp_path):
    evaluation, text = _write(tmp_path / "a", {"popularity": "needs items"})
    assert (tmp_path / "a" / "table.txt").read_text() == text
    mean = evaluation.summary["methods"]["good"]["ndcg@3"]["mean"]
    assert f"{100 * mean:.1f} ±" in text and "difference to good, paired" in text
    assert "left out: popularity: needs items" in text
    for word in ("recall@1", "ndcg@3", "precision@3", "mrr", "slate_recall", "slate_miss", "rank_drop"):
        assert word in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_manifest_holds_what_was_passed_in_and_versions():
    manifest = report.manifest({"seed": 1}, {"seed": 1}, {"test": "ff"}, None)
    assert manifest["data"] == {"test": "ff"} and manifest["git"] is None
    assert set(manifest["versions"]) == {"fgrpo_jax", "jax", "numpy"}
