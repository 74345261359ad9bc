"""`python -m fgrpo_jax.bench credit`: its statistics, and that its gradients are those of training."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_step import build
from tiny import changed, quick_programs, run_training, tiny_config, write_world

import train
from fgrpo_jax.algorithm.credit import SCHEMES
from fgrpo_jax.bench import command, credit
from fgrpo_jax.data.batches import make_batches
from fgrpo_jax.run.experiment import encode, initial_params, random_key
from fgrpo_jax.stages import stages


def test_signal_of_known_gradients():
    """Two rows of Gaussian gradients around different means, the second four times as noisy."""
    mean, noise, draws = np.asarray([[3.0, 4.0, 0.0], [0.0, 0.0, 5.0]]), np.asarray([[1.0], [4.0]]), 900
    rng = np.random.default_rng(0)
    drawn = {name: mean + noise * rng.normal(size=(draws, 2, 3)) for name in ("draw", "reference")}

    def gradients(params, frozen, query, key):
        name, i = key
        return jnp.asarray(drawn[name][i], jnp.float32), (np.zeros(2), np.ones(2), 5.0)

    measure = functools.partial(credit.signal, gradients, None, None, None)
    found, like = measure(draws, 100, key=lambda *key: key, own=[1], shared=0)
    np.testing.assert_allclose(found["snr"], [25 / 3, 25 / 48], rtol=0.1)
    few = [measure(3, 0, key=lambda name, i, n=n: (name, 3 * n + i), own=[], shared=0)[0] for n in range(100)]
    assert "cosine" not in few[0]
    variance = drawn["draw"].reshape(-1, 3, 2, 3)[:100].var(1, ddof=1).sum(-1)
    squared = (drawn["draw"].reshape(-1, 3, 2, 3)[:100].mean(1) ** 2).sum(-1)
    np.testing.assert_allclose([x["snr"] for x in few], squared / variance, rtol=1e-3)
    np.testing.assert_allclose([x["unbiased"] for x in few], squared / variance - 1 / 3, rtol=1e-2, atol=1e-3)
    unit = mean / 5
    cosine = (drawn["draw"] * unit).sum(-1) / np.linalg.norm(drawn["draw"], axis=-1)
    np.testing.assert_allclose(found["cosine"], cosine.mean(0), atol=0.02)
    np.testing.assert_allclose(like[1], 1)


def test_gradients_are_those_of_training(tmp_path):
    with quick_programs():
        experiment = build(tmp_path)
        config, policy = experiment.config, experiment.policy("rl")
        rows = credit.rows_of(stages(config)["rl"], 1.0)
        params, stage = initial_params(experiment, policy), stages(config)["rl"]
        query = encode(experiment, policy, make_batches(experiment.dataset, config, "rl", stage).batch_at(0))
        key = random_key(config.seed, "rl", "rollout", 0)
        found, (dead, reward, items) = credit.make_gradients(experiment, policy, stage, rows)(params, {}, query, key)
        for name in ("exact", "labels"):
            of_scheme = dataclasses.replace(stage, credit=rows[name])
            batch, seen = train.make_step(experiment, policy, of_scheme)[0](params, {}, query, key)
            objective = credit.with_values(credit.clipped_pg(), SCHEMES[name].value_by)

            def loss(params, batch=batch, objective=objective):
                return objective(policy.choices(params, {}, query, batch.rollout), batch)[0]

            flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.jit(jax.grad(loss))(params))])
            assert np.abs(flat).max() > 1e-3
            np.testing.assert_allclose(found[list(rows).index(name)], flat, atol=1e-6)
    assert np.abs(np.diff(found, axis=0)).max(-1).min() > 1e-4  # every row is another gradient
    for p, phase in enumerate(("slate", "rank")):
        assert dead[p] == pytest.approx(seen[f"dead_groups/{phase}"].value())
    assert items == pytest.approx(5) and (np.asarray(reward) > 0).all()


def test_a_run_directory(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    write_world(tmp_path / "data")
    config = tiny_config(tmp_path / "data", tmp_path / "prepared", tmp_path / "run", sft_steps=2)
    config = changed(config, {"transcript.constrained": False})
    with quick_programs():
        assert run_training(config) == 0
        capsys.readouterr()
        sizes = "--queries 4 --group 2 --draws 2 --batches 2 --reference 1".split()
        where = [str(tmp_path / "run"), "--at", "sft:2", "--json", str(tmp_path / "found.json")]
        assert command.main(["credit", *where, *sizes]) == 0
    printed = capsys.readouterr().out
    assert "note: no row exact: rl.credit.scheme='exact' needs the choices of the grammar" in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["row"] for row in found] == ["grpo", "gdpo", "fgrpo", "outcome", "to_go", "to_go_state"]
    assert all(len(row[name]) == 2 for row in found for name in ("snr", "unbiased", "cosine"))
    for wrong, message in (
        (["--stage", "sft"], "--stage sft has no policy gradient of own samples (source='logged'"),
        (["--stage", "dpo"], "has no stage 'dpo', only sft, rl"),
        (["--at", "sft"], "--at sft: give a stage (sft, rl) and a step, as sft:60"),
    ):
        assert command.main(["credit", str(tmp_path / "run"), *wrong]) == 2
        assert message in capsys.readouterr().err
