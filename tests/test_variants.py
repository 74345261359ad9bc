"""The algorithms as configurations of one loop: two steps of each through train.make_step."""

import os
import subprocess
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_step import build, numbers, two_steps
from test_update import learning_rates
from tiny import changed, quick_programs

import train
from fgrpo_jax.config import ConfigError
from fgrpo_jax.run import checks
from fgrpo_jax.run.checks import check_training
from fgrpo_jax.run.experiment import KNOWN, assemble, initial_params
from fgrpo_jax.run.validation import validate
from fgrpo_jax.types import TRAINED

JOINT = (("slate", "recall", 1.0), ("rank", "recall", 1.0), ("slate", "ndcg", 0.5), ("rank", "ndcg", 0.5))


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_programs():
        yield


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return build(tmp_path_factory.mktemp("variants"))


def run_variant(experiment, fields):
    config = changed(experiment.config, fields)
    validate(config, KNOWN)
    return two_steps(assemble(config, experiment.dataset, Path(config.run_dir)), "rl")


@pytest.fixture(scope="module")
def sft(experiment):
    return two_steps(experiment, "sft")


@pytest.fixture(scope="module")
def fgrpo(experiment):
    return two_steps(experiment, "rl")


def moved(state, experiment):
    start = initial_params(experiment, experiment.policy("rl"))
    changes = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, start)
    return max(jax.tree.leaves(changes))


def test_fgrpo(experiment, fgrpo):
    state, batch, seen, compiled = fgrpo
    assert compiled == 1 and int(state.step) == 2 and moved(state, experiment) > 0.01
    for row in seen:
        assert row["nonfinite"] == 0 and row["outcome/ok"] == 1 and row["grad_norm"] > 0
        assert row["loss"] == pytest.approx(0, abs=1e-5)  # centred advantages at ratio 1
        assert 0 <= row["reward/slate"] <= 1 and row["slate_length"] == 3 and row["rank_length"] == 2
        assert {"drift", "dead_groups/slate", "dead_groups/rank"} <= row.keys() and not {"kl", "clipped"} & row.keys()
        assert row["drift"] < 1e-5
    slate, rank = (np.where(batch.rollout.phase == label, batch.advantage, 0).sum(-1) for label in TRAINED)
    assert not np.allclose(slate / np.abs(slate).max(), rank / np.abs(rank).max())


def test_microbatches_change_nothing(experiment, fgrpo):
    state, *_ = run_variant(experiment, {"rl.microbatches": 2})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), state.params, fgrpo[0].params)


VARIANTS = {
    "grpo": {"rl.credit.terms": JOINT, "rl.credit.normalise": "sum", "rl.objective.weighting": "constant"},
    "gdpo, two epochs, KL": {
        "rl.credit.terms": JOINT,
        "rl.credit.normalise": "each",
        "rl.objective.epochs": 2,
        "rl.objective.kl_weight": 0.1,
        "rl.objective.ratio": "sequence",
    },
    "unconstrained, token ratios": {
        "transcript.constrained": False,
        "reward.rules": (("slate_out_of_pool", -0.5),),
        "rl.objective.epochs": 2,
        "rl.objective.ratio": "token",
        "rl.objective.clip_high": 0.3,
        "rl.objective.weighting": "phase",
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_algorithms_are_other_configurations(experiment, fgrpo, variant):
    fields = VARIANTS[variant]
    state, batch, seen, compiled = run_variant(experiment, fields)
    assert compiled == 1 and moved(state, experiment) > 0.01
    assert all(np.isfinite(value) for row in seen for value in row.values()), seen
    assert all(row["nonfinite"] == 0 for row in seen)
    assert (batch.old_logp is not None) == ("rl.objective.epochs" in fields)
    assert (batch.ref_logp is not None) == ("kl" in seen[1]) == ("rl.objective.kl_weight" in fields)
    if "transcript.constrained" in fields:
        outcomes = {key: value for key, value in seen[0].items() if key.startswith("outcome/")}
        assert outcomes["outcome/ok"] < 1 and sum(outcomes.values()) == pytest.approx(1)
        assert float(batch.reward.min()) == -0.5
    else:
        trained = np.where(batch.rollout.phase > 0, batch.advantage, np.nan)
        np.testing.assert_allclose(np.nanmin(trained, -1), np.nanmax(trained, -1), atol=1e-6)
        assert seen[0]["reward/slate"] == fgrpo[2][0]["reward/slate"]  # the same rollouts


@pytest.mark.parametrize("stage, given", [("sft", False), ("rl", True)])
def test_old_probabilities_are_computed_for_those_who_read_them(experiment, stage, given):
    """The likelihood of what is learnt has no ratio to the policy before."""
    config = changed(experiment.config, {f"{stage}.objective.epochs": 2})
    validate(config, KNOWN)
    _, batch, _, compiled = two_steps(assemble(config, experiment.dataset, Path(config.run_dir)), stage)
    assert compiled == 1 and (batch.old_logp is not None) == given


def test_a_warm_up_is_as_long_whatever_the_epochs(experiment):
    """Of 2 rollout batches: with one update each, or three."""
    for epochs, expected in ((1, [0.5, 1.0, 1.0]), (3, [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0, 1.0])):
        fields = {"rl.objective.epochs": epochs, "rl.optim.warmup_steps": 2, "rl.optim.learning_rate": 0.1}
        config = changed(experiment.config, fields)
        validate(config, KNOWN)
        policy = experiment.policy("rl")
        optimizer = train.make_step(experiment, policy, config.rl)[2]
        rates = learning_rates(optimizer, len(expected), initial_params(experiment, policy))
        np.testing.assert_allclose(rates, np.multiply(0.1, expected), rtol=1e-4)


def test_batches_that_do_not_fit_the_mesh_are_refused_before_training(experiment):
    run_dir = Path(experiment.config.run_dir)
    check_training(experiment, run_dir)
    three = types.SimpleNamespace(shape={"data": 3, "fsdp": 1, "tensor": 1})
    with pytest.raises(ConfigError, match="sft.batch_queries=8 does not split .*: set sft.batch_queries to 6 or 9"):
        check_training(experiment._replace(mesh=three), run_dir)


@pytest.mark.parametrize(
    "sizes, refused", [((2, 1, 2), True), ((1, 2, 2), True), ((4, 2, 1), False), ((1, 1, 2), False)]
)
def test_weights_that_cpus_cannot_sum_are_refused_before_training(experiment, sizes, refused, monkeypatch):
    """XLA would end the process, without a word that a user understands."""
    monkeypatch.setattr(checks.memory, "check", lambda *of_stage: None)  # which asks the devices, and there are none
    narrow = changed(experiment.config, {"model.param_dtype": "bfloat16"})
    mesh = types.SimpleNamespace(shape=dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    with pytest.raises(ConfigError, match="set mesh.tensor=1, or model.param_dtype=") if refused else nullcontext():
        built = assemble(narrow, experiment.dataset, Path(narrow.run_dir))
        check_training(built._replace(mesh=mesh), Path(narrow.run_dir))


def test_sft(experiment, sft):
    state, batch, seen, compiled = sft
    assert compiled == 1 and moved(state, experiment) > 0.01 and batch.rollout.actions.shape[1] == 1
    assert seen[1]["loss"] < seen[0]["loss"] and not any(key.startswith("reward/") for key in seen[0])


def test_eight_devices_compute_what_one_does(experiment, sft, fgrpo, tmp_path):
    """Queries over data x fsdp, parameters over fsdp and tensor: two steps of both stages."""
    folder, out = Path(experiment.config.run_dir).parent, tmp_path / "out.npz"
    script = Path(__file__).with_name("one_step.py")
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, str(script), str(folder), "2", "2", "2", str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = numbers({"sft": sft, "rl": fgrpo})
    with np.load(out) as found:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
