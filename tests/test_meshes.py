"""A run that goes on, on another mesh, does what it would have done."""

import jax
import pytest
from helpers import run_on_8_devices
from tiny import ROOT, rows, write_world
from tiny_lists import write_lists

LEGS = """
    import sys
    sys.path[:0] = [{root!r}, {root!r} + "/tests"]
    import jax
    import eval as evaluation
    from fgrpo_jax.run.stage import Stage
    from tiny import changed, run_training, tiny_config

    jax.config.update("jax_compilation_cache_dir", {cache!r})
    jax.config.update("jax_disable_most_optimizations", True)
    evaluation.evaluate_run = lambda *paths: None
    devices, on_step = jax.devices(), Stage.on_step
    config = tiny_config({folder!r} + "/data", {folder!r} + "/prepared", {folder!r}, rl_steps=6)

    def run(name, count, data, fsdp, tensor, until=None):
        jax.devices = lambda: devices[:count]
        Stage.on_step = lambda self, state, metrics, examples, stopping: on_step(
            self, state, metrics, examples, stopping=self._step + 1 == until
        )
        mesh = {{"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}}
        assert run_training(changed(config, mesh | {{"run_dir": {folder!r} + "/" + name}})) == 0

    run("alone", 1, 1, 1, 1)
    run("moved", 8, 1, 4, 2, until=1)
    run("moved", 4, 4, 1, 1, until=4)
    run("moved", 1, 1, 1, 1)
"""


def test_from_8_devices_to_4_to_1(tmp_path):
    (tmp_path / "data").mkdir()
    write_world(tmp_path / "data")
    cache = jax.config.jax_compilation_cache_dir
    said = run_on_8_devices(LEGS.format(root=str(ROOT), cache=cache, folder=str(tmp_path)))
    meshes = " ".join(said).split("mesh data ")[1:]
    assert [" ".join(mesh.split()[:7]) for mesh in meshes] == [
        "1 x fsdp 1 x tensor 1", "1 x fsdp 4 x tensor 2", "4 x fsdp 1 x tensor 1", "1 x fsdp 1 x tensor 1"
    ]  # fmt: skip
    alone, moved = rows(tmp_path / "alone"), rows(tmp_path / "moved")
    assert [row["step"] for row in moved] == [row["step"] for row in alone] == [0, 3, 4, 6, 6]
    for our, their in zip(moved, alone, strict=True):
        assert our == pytest.approx(their, abs=1e-4)


RANKER = """
    import sys
    sys.path[:0] = [{root!r}, {root!r} + "/tests"]
    import jax
    import eval as evaluation
    from tiny import changed, run_training
    from tiny_lists import tiny_ranker

    jax.config.update("jax_compilation_cache_dir", {cache!r})
    jax.config.update("jax_disable_most_optimizations", True)
    evaluation.evaluate_run = lambda *paths: None
    devices = jax.devices()
    config = tiny_ranker({folder!r} + "/data", {folder!r} + "/prepared", {folder!r}, steps=3)
    others = ("dlcm", "prm", "generators", "two_phase", "grpo", "fgrpo")
    mix = (("pointwise", 2), ("random", 1), ("perturbed", 1))  # with draws
    config = changed(config, {{f"{{name}}.steps": 0 for name in others}} | {{"proposals.mix": mix}})

    def run(name, count, **mesh):
        jax.devices = lambda: devices[:count]
        mesh = {{f"mesh.{{axis}}": size for axis, size in mesh.items()}}
        assert run_training(changed(config, mesh | {{"run_dir": {folder!r} + "/" + name}})) == 0

    run("one", 1)
    run("eight", 8, data=2, fsdp=2, tensor=2)
"""


def test_a_ranker_on_8_devices_is_that_of_one(tmp_path):
    """Reward model, point-wise network, imitation and GoalRank on their lists and proposals, to the last row."""
    (tmp_path / "data").mkdir()
    write_lists(tmp_path / "data")
    cache = jax.config.jax_compilation_cache_dir
    run_on_8_devices(RANKER.format(root=str(ROOT), cache=cache, folder=str(tmp_path)))
    for stage in ("evaluator", "pointwise", "imitation", "goalrank"):
        one, eight = rows(tmp_path / "one", stage), rows(tmp_path / "eight", stage)
        assert [row["step"] for row in one] == [row["step"] for row in eight] and one[-1]["step"] == 3
        for our, their in zip(eight, one, strict=True):
            assert our == pytest.approx(their, abs=1e-4)
