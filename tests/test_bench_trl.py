"""The benchmark beside TRL, which is not among the test's packages: what surrounds its process."""

import contextlib
import json
import types

import pytest

from fgrpo_jax.bench import command, trl
from fgrpo_jax.bench.measure import WORKLOADS
from fgrpo_jax.config import ConfigError
from fgrpo_jax.models.decoder import num_params


def test_the_shape_is_that_of_smollm2():
    """134,515,008 parameters, as transformers counts those of SmolLM2-135M."""
    spec, shape = WORKLOADS["smollm2"]
    assert num_params(spec) == 134_515_008 and shape == (1, 480, 8, 72)


def test_without_trl_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(trl.importlib.util, "find_spec", lambda name: None)
    assert command.main(["trl"]) == 2
    said = capsys.readouterr().err
    assert said == "error: bench trl needs torch and trl: pip install 'fgrpo_jax[parity]' trl\n"


def test_a_gpu_that_pytorch_does_not_see_is_named(spec, monkeypatch):
    monkeypatch.setattr(trl.importlib.util, "find_spec", lambda name: True)
    blind = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setattr(trl.importlib, "import_module", lambda name: blind)
    with pytest.raises(ConfigError, match="a GPU that this PyTorch does not see"):
        trl.compare(spec._replace(dtype="bfloat16"), WORKLOADS["smollm2"][1], 1, 1)


def test_both_are_called_in_turns_and_the_first_round_is_dropped(spec, tmp_path, monkeypatch, capsys):
    asked = []

    @contextlib.contextmanager
    def process(spec, shape, steps, threads):
        def step():
            asked.append(steps)
            return [100.0, 8.0, 6.0][len(asked) - 1]

        yield num_params(spec), step

    small = spec._replace(qk_norm=False, num_layers=1)
    monkeypatch.setitem(WORKLOADS, "smollm2", (small, WORKLOADS["smollm2"][1]))
    monkeypatch.setattr(trl, "trl_process", process)
    monkeypatch.setattr(trl, "keep_memory", lambda: None)  # of the process that runs all tests
    monkeypatch.setattr(trl.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(trl.importlib.metadata, "version", lambda name: f"the {name}")
    sizes = ["--prompt", "5", "--group", "2", "--length", "3", "--repeats", "2", "--threads", "1"]
    assert command.main(["trl", *sizes, "--json", str(tmp_path / "found.json")]) == 0
    assert asked == [3, 3, 3]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["trl"]["median"] == 7.0 and found["step"]["n"] == 2
    assert found["shape"] == {"batch": 1, "prompt": 5, "group": 2, "length": 3}
    ratio = 7.0 / found["step"]["median"]
    assert f"ratio           {ratio:9.2f}\n" in capsys.readouterr().out
    assert found["step"]["median"] == pytest.approx(found["rollout"]["median"] + found["update"]["median"])
