"""What an evaluation says of rankers beside the metrics: the reward of lists, the fit to shown ones, selections."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import quick_jit, quick_runs
from tiny import changed, contents

import eval as evaluation
from fgrpo_jax.data import datasets
from fgrpo_jax.data.batches import evaluation_examples
from fgrpo_jax.evaluation.fit import NAMES
from fgrpo_jax.policies.ranker import scorers
from fgrpo_jax.policies.ranker.system import make_spec
from fgrpo_jax.run.experiment import KNOWN, assemble
from fgrpo_jax.run.finished import best_params
from fgrpo_jax.run.validation import problems_of
from fgrpo_jax.stages import stages

TRAINED = ("evaluator", "pointwise", "generators", "goalrank")
REWARDED = ("--eval.rewards", "reward_model", "--eval.versus", "g_e")


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_runs():
        yield


@pytest.fixture(scope="module")
def whole(ranker_run, tmp_path_factory):
    """The configuration of a run of four stages, evaluated by the reward model too; never changed."""
    run_dir = tmp_path_factory.mktemp("scores") / "run"
    others = shutil.ignore_patterns(*[name for name in stages(ranker_run[0]) if name not in TRAINED])
    shutil.copytree(ranker_run[0].run_dir, run_dir, ignore=others)
    assert evaluation.main([str(run_dir), *REWARDED]) == 0
    fields = {f"{name}.steps": 0 for name in stages(ranker_run[0]) if name not in TRAINED}
    fields |= {"run_dir": str(run_dir), "eval.rewards": ("reward_model",), "eval.versus": "g_e"}
    return changed(ranker_run[0], fields)


def written(run_dir, name="metrics.json"):
    return json.loads((Path(run_dir) / "eval" / "validation" / name).read_text())


def per_query(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "eval/validation/per_query.jsonl").read_text().splitlines()]


def judged(config, name):
    """The best parameters of a stage, and a function that encodes one query."""
    experiment = assemble(config, datasets.load(config.data), Path(config.run_dir))
    policy = experiment.policy(name)
    spec = make_spec(config, policy.table["items"].shape[0] - 1)
    return spec, best_params(experiment, Path(config.run_dir), name), policy.encode, experiment.dataset


def test_every_methods_lists_are_scored_by_the_reward_model(whole):
    """One list at a time, by the reward that training reads."""
    spec, params, encode, dataset = judged(whole, "evaluator")
    examples = evaluation_examples(dataset, whole, "validation")
    of_lists = quick_jit(scorers.reward_of_lists, static_argnums=(0, 4))
    rows, summary = per_query(whole.run_dir), written(whole.run_dir)
    methods = ["random", "retrieval", *TRAINED, "g_e", "mg_e_3", "mmr_0.8"]
    assert set(summary["methods"]) == set(rows[0]["methods"]) == set(methods)
    for example, row in zip(examples, rows, strict=True):
        place = {item: i for i, (item, _) in enumerate(example.candidates)}
        for method in methods:
            ranking = [place[item] for item in row["methods"][method]["ranking"]]
            assert len(ranking) == 3  # the list is seen whole, and its first two positions count
            value = float(of_lists(spec, params, encode([example]), np.array([[ranking]], np.int32), 2)[0, 0])
            assert row["methods"][method]["metrics"]["reward_model"] == pytest.approx(value, abs=1e-5)
    for method in methods:
        values = [row["methods"][method]["metrics"]["reward_model"] for row in rows]
        assert summary["methods"][method]["reward_model"]["mean"] == pytest.approx(np.mean(values), abs=1e-5)
    assert set(summary["paired"]) == set(methods) - {"g_e"}
    best = summary["methods"]["evaluator"]["reward_model"]["mean"]  # of lists that are built to have much of it
    assert best == max(found["reward_model"]["mean"] for found in summary["methods"].values())
    table = (Path(whole.run_dir) / "eval" / "validation" / "table.txt").read_text()
    assert "learned rewards, not in percent: reward_model of the first 2; paired differences\n" in table


def test_models_of_feedback_are_held_against_shown_lists(whole):
    """Log-likelihood and Brier score of every position, one query at a time."""
    found = written(whole.run_dir, "fit.json")
    assert set(found) == {"evaluator", "pointwise"}
    for name in found:
        spec, params, encode, dataset = judged(whole, name)
        logits = quick_jit(
            {"evaluator": scorers.evaluator_logits, "pointwise": scorers.pointwise_logits}[name], static_argnums=0
        )
        said, was = [], []
        for example in evaluation_examples(dataset, whole, "validation"):
            query = encode([example])
            more = (query.logged_items,) if name == "evaluator" else ()
            logit = np.asarray(logits(spec, params, query, *more), float)[0]
            for j, shown in enumerate(example.logged):
                said += [logit[j, t] if name == "evaluator" else logit[i] for t, i in enumerate(shown.items)]
                was += shown.feedback
        p, y = 1 / (1 + np.exp(-np.array(said))), np.array(was)
        assert (found[name]["queries"], found[name]["lists"], found[name]["positions"]) == (12, 24, len(y))
        likelihood = np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
        assert found[name]["log_likelihood"]["value"] == pytest.approx(likelihood, abs=1e-5)
        assert found[name]["brier"]["value"] == pytest.approx(np.mean((p - y) ** 2), abs=1e-5)
        assert set(NAMES) < set(found[name])
    table = (Path(whole.run_dir) / "eval" / "validation" / "table.txt").read_text()
    assert table.splitlines()[-4].startswith("fit to 24 shown lists of 12 queries")


def _numbers(value, where=""):
    if isinstance(value, dict):
        return {k: v for name in value for k, v in _numbers(value[name], f"{where}.{name}").items()}
    if isinstance(value, list):
        return _numbers(dict(enumerate(value)), where)
    return {where: value} if isinstance(value, (int, float)) else {}


def test_what_is_not_there_is_said_before_anything_is_predicted(whole, tmp_path, capsys, monkeypatch):
    run_dir = tmp_path / "run"
    shutil.copytree(whole.run_dir, run_dir)
    capsys.readouterr()
    assert evaluation.main([str(run_dir), *REWARDED, "--eval.batch-queries", "5"]) == 0
    for name in ("metrics.json", "fit.json"):  # how many are predicted at once changes nothing but what is padded
        ours, theirs = (written(place, name) for place in (run_dir, whole.run_dir))
        assert ours.pop("flops", {}).keys() == theirs.pop("flops", {}).keys()
        assert _numbers(ours) == pytest.approx(_numbers(theirs), abs=2e-6)
    assert "no row" not in capsys.readouterr().out
    (run_dir / "evaluator" / "done.json").unlink()
    before = contents(run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.evaluate, "run_baselines", lambda *given: pytest.fail("predicts"))
        assert evaluation.main([str(run_dir), *REWARDED]) == 2
    said = capsys.readouterr()
    assert "note: no row g_e: it reads evaluator, not finished here\n" in said.out
    assert "eval.versus='g_e' is not evaluated here; choose one of random, retrieval, pointwise" in said.err
    assert contents(run_dir) == before
    assert evaluation.main([str(run_dir), *REWARDED, "--eval.versus", "pointwise"]) == 0
    assert "note: no column reward_model: goalrank reads it from evaluator, not finished" in capsys.readouterr().out
    assert "reward_model" not in written(run_dir)["methods"]["random"] and list(written(run_dir, "fit.json")) == [
        "pointwise"
    ]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"eval.rewards": ("ndcg",)}, "eval.rewards: 'ndcg' is not one of alpha_ndcg, pointwise_reward, reward_model"),
        ({"eval.rewards": ("pointwise_reward",)}, "eval.rewards: no stage that is trained has 'pointwise_reward'"),
        ({"goalrank.steps": 0}, "eval.rewards: no stage that is trained has 'reward_model' in its credit.terms"),
        ({"eval.versus": "mg_e_2"}, "eval.versus: 'mg_e_2' is not one of evaluator, g_e, generators, goalrank, mg_"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(whole, fields, message):
    assert any(message in line for line in problems_of(changed(whole, fields), KNOWN))
