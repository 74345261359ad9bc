"""`train.py --dry-run`: what would run, and nothing else."""

import pytest
from tiny import changed, run_training, tiny_config, write_world
from tiny_lists import tiny_ranker, write_lists

import train
from fgrpo_jax import policies
from fgrpo_jax.data import datasets
from fgrpo_jax.run import memory
from fgrpo_jax.types import num_params


@pytest.mark.parametrize("system", ["llm", "ranker"])
def test_it_tells_and_does_nothing(system, tmp_path, capsys, monkeypatch):
    """Memory is that of the arrays: Adam has two moments of every weight, in 4 bytes."""
    (tmp_path / "data").mkdir()
    where = tmp_path / "data", tmp_path / "prepared", tmp_path / "run"
    (write_world if system == "llm" else write_lists)(where[0])
    config = tiny_config(*where, sft_steps=1, rl_steps=1) if system == "llm" else tiny_ranker(*where, steps=1)
    monkeypatch.setattr(memory, "size", lambda count: f"{count:.0f} bytes")
    monkeypatch.setattr(train, "train_and_evaluate", None)
    assert run_training(config, "--dry-run") == 0
    said = capsys.readouterr().out
    assert not where[2].exists()
    assert said.startswith("devices ") and said.endswith("; without --dry-run this would start\n")
    for policy in policies.make(config, datasets.load(config.data), where[2]).values():
        weights = 4 * num_params(policy.table)
        assert f"parameters {weights} bytes, moments {2 * weights} bytes, gradients {weights} bytes" in said
    assert "relevance float32 [8, " in said
    example = "<SLATE>\n--- and the transcript to imitate" if system == "llm" else "example\nquery train-"
    assert example in said and said.count("item ") > 5


def test_a_mistake_is_still_a_mistake(tmp_path, capsys):
    config = tiny_config(tmp_path, tmp_path, tmp_path / "run", rl_steps=1)
    assert run_training(changed(config, {"rl.optim.learning_rate": -1.0}), "--dry-run") == 2
    assert "rl.optim.learning_rate=-1.0 must be positive" in capsys.readouterr().err


def test_sizes_are_for_people():
    assert [memory.size(n) for n in (0, 1023, 1536, 3 * 2**20, 2**41)] == [
        "0 B", "1023 B", "1.5 KiB", "3.0 MiB", "2048.0 GiB",
    ]  # fmt: skip
