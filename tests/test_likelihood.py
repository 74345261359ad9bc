"""A stage's best checkpoint by likelihood: the number, where it is logged, and what follows from it."""

import json

import jax
import numpy as np
import pytest
from helpers import quick_jit, quick_runs
from tiny import changed, rows, run_training, tiny_config, write_world
from tiny_lists import tiny_ranker, write_lists

from fgrpo_jax.config_files import absent, from_json, to_json
from fgrpo_jax.data import datasets
from fgrpo_jax.data.batches import evaluation_examples
from fgrpo_jax.policies.ranker import scorers
from fgrpo_jax.policies.ranker.config import RankerConfig
from fgrpo_jax.policies.ranker.system import make_spec
from fgrpo_jax.run import directory
from fgrpo_jax.run.experiment import assemble, initial_params
from fgrpo_jax.run.likelihood import Likelihood
from fgrpo_jax.run.stage import Stage
from fgrpo_jax.stages import stages

JUDGES = {f"{name}.steps": 0 for name in stages(RankerConfig()) if name not in ("evaluator", "pointwise")}


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_runs():
        yield


@pytest.fixture(scope="module")
def ranker(tmp_path_factory):
    """Evaluator and point-wise network alone, the latter on the labels of whole pools."""
    folder = tmp_path_factory.mktemp("ranker")
    (folder / "data").mkdir()
    config = tiny_ranker(write_lists(folder / "data"), folder / "prepared", folder / "run", steps=10)
    fields = {"network.labels": "relevance", "pointwise.metric": "likelihood", "evaluator.eval_every": 2}
    return changed(config, JUDGES | fields)


@pytest.fixture(scope="module")
def trained(ranker):
    assert run_training(ranker) == 0
    return directory.path_of(ranker.run_dir)


def measured(run_dir, stage, name="likelihood"):
    return {row["step"]: row[f"eval/{name}"] for row in rows(run_dir, stage) if f"eval/{name}" in row}


@pytest.mark.parametrize("fields", [{}, {"pointwise.microbatches": 2}, {"pointwise.batch_queries": 5}])
def test_it_is_the_mean_over_all_labels(ranker, tmp_path, fields):
    """Of every candidate of every query, one query at a time; the last batch is not full."""
    config = changed(ranker, fields)
    experiment = assemble(config, datasets.load(config.data), tmp_path)
    policy = experiment.policy("pointwise")
    params = initial_params(experiment, policy)
    examples = evaluation_examples(experiment.dataset, config, "validation")[:11]
    logits = quick_jit(scorers.pointwise_logits, static_argnums=0)
    spec, found = make_spec(config, policy.table["items"].shape[0] - 1), []
    for example in examples:
        logit = np.asarray(logits(spec, params, policy.encode([example])), np.float64)[0, : len(example.candidates)]
        label = np.asarray(example.relevance) > 0
        alone = np.where(label, -np.log1p(np.exp(-logit)), -np.log1p(np.exp(logit)))
        found += (alone + label * (logit - np.log(np.exp(logit).sum()))).tolist()
    assert Likelihood(experiment, "pointwise")(params, {}, examples) == pytest.approx(np.mean(found), rel=1e-5)


def test_the_best_checkpoint_is_the_most_likely_one(ranker, trained):
    for stage in ("evaluator", "pointwise"):
        found, done = measured(trained, stage), directory.read_done(trained, stage)
        assert done["metric"] == "likelihood" and done["best"] == max(found.values()) == found[done["best_step"]]
        assert found[0] < done["best"] < 0  # something was learnt
        assert len(set(found.values())) == len(found) > 1
    assert list(measured(trained, "evaluator")) == [0, 2, 4, 6, 8, 10]
    assert measured(trained, "evaluator", "ndcg@2").keys() == measured(trained, "evaluator").keys()


def test_a_run_that_was_stopped_measures_the_same(ranker, trained, tmp_path, monkeypatch):
    config = changed(ranker, {"run_dir": str(tmp_path / "run")})
    on_step = Stage.on_step

    def stopping(self, state, metrics, examples, stopping):
        return on_step(self, state, metrics, examples, stopping=(self.name, self._step + 1) == ("evaluator", 5))

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "on_step", stopping)
        assert run_training(config) == 0
    assert run_training(config) == 0
    assert rows(tmp_path / "run") == rows(trained)
    for stage in ("evaluator", "pointwise"):
        assert directory.read_done(tmp_path / "run", stage) == directory.read_done(trained, stage)


def test_patience_of_a_language_model(tmp_path, monkeypatch):
    """It ends, and its checkpoint is chosen, by the likelihood, which gets worse from step 4 on."""
    told = iter([-3.0, -2.0, -2.5, -2.25])
    likelihood = Likelihood.__call__

    def worse(self, params, frozen, examples):
        assert likelihood(self, params, frozen, examples) < 0
        return next(told)

    monkeypatch.setattr(Likelihood, "__call__", worse)
    (tmp_path / "data").mkdir()
    config = tiny_config(write_world(tmp_path / "data"), tmp_path / "prepared", tmp_path / "run", sft_steps=40)
    assert run_training(changed(config, {"sft.metric": "likelihood", "sft.patience": 2})) == 0
    assert directory.read_done(tmp_path / "run", "sft") == {
        "step": 12, "best_step": 4, "metric": "likelihood", "best": -2.0
    }  # fmt: skip


def test_that_of_a_language_model_is_the_mean_over_its_trained_tokens(tmp_path):
    """One query at a time, in batches of three; targets without fill are the same whatever is drawn."""
    (tmp_path / "data").mkdir()
    config = tiny_config(write_world(tmp_path / "data"), tmp_path / "prepared", tmp_path / "run", sft_steps=1)
    fields = {"transcript.slate_min": 2, "transcript.slate_max": 2, "sft.target.fill": "first", "sft.batch_queries": 3}
    experiment = assemble(changed(config, fields), datasets.load(config.data), tmp_path)
    policy, stage = experiment.policy("sft"), experiment.config.sft
    params = initial_params(experiment, policy)
    examples = evaluation_examples(experiment.dataset, config, "validation")[:5]

    @quick_jit
    def alone(query):
        rollout, _ = policy.sources["logged"](stage)(params, {}, query, jax.random.key(7))
        return policy.logprobs(params, {}, query, rollout), rollout.phase

    found = []
    for example in examples:
        logp, phase = map(np.asarray, alone(policy.encode([example])))
        found += logp[phase > 0].tolist()
    assert len(found) > 10
    assert Likelihood(experiment, "sft")(params, {}, examples) == pytest.approx(np.mean(found), rel=1e-5)


def test_what_cannot_be_measured_is_refused(ranker, tmp_path, capsys):
    config = changed(ranker, {"run_dir": str(tmp_path / "run"), "grpo.steps": 2, "grpo.metric": "likelihood"})
    assert run_training(config) == 2
    assert "grpo.metric='likelihood' is of logged rollouts, grpo.source='sampled'" in capsys.readouterr().err
    data = tmp_path / "data"
    data.mkdir()
    write_lists(data)
    lines = [json.loads(line) for line in (data / "validation.jsonl").read_text().splitlines()]
    (data / "validation.jsonl").write_text("".join(json.dumps(line | {"logged": []}) + "\n" for line in lines))
    config = changed(ranker, {"run_dir": str(tmp_path / "run"), "data.manual_dir": str(data)})
    assert run_training(config) == 2
    assert "evaluator.metric='likelihood': none of the 12 validation queries" in capsys.readouterr().err


def test_runs_of_an_earlier_version_chose_by_the_evaluation():
    assert RankerConfig().evaluator.metric == "likelihood"
    old = json.loads(to_json(RankerConfig()))
    del old["evaluator"]["metric"]
    assert from_json(json.dumps(old)).evaluator.metric == "" and absent(json.dumps(old)) == ["evaluator.metric"]
    assert from_json(to_json(RankerConfig())) == RankerConfig()
