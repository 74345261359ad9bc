"""Checkpoints: which stay, what comes back, and what a kill or a SIGTERM leaves behind."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import two_processes

from fgrpo_jax.config import ConfigError
from fgrpo_jax.run.checkpoint import Checkpoints, placed, preemption
from fgrpo_jax.types import TrainState

PARAMS = {"a": jnp.arange(6.0).reshape(2, 3) / 7, "b": jnp.full(4, 1 / 3, jnp.bfloat16)}


def abstract(tree):
    return placed(tree, jax.tree.map(lambda x: x.sharding, tree))


def make_state(step):
    params = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), PARAMS)
    return TrainState(jnp.int32(step), params, optax.adamw(optax.constant_schedule(1e-3)).init(params))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def start(script, **environ):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environ}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_round_trip_and_reopening(tmp_path):
    with Checkpoints(tmp_path / "new" / "dir", keep_latest=2) as kept:
        assert (kept.latest_step(), kept.best_step(), kept.steps()) == (None, None, [])
        assert kept.save(4, make_state(4), {"config": {"seed": 1}, "data": ["ff"]}, metric=0.25)
        assert not kept.save(4, make_state(5), {}, metric=0.5)  # saved before: nothing happens
        assert kept.meta(4) == {"config": {"seed": 1}, "data": ["ff"]}
    with Checkpoints(tmp_path / "new" / "dir", keep_latest=2, read_only=True) as kept:
        assert (kept.latest_step(), kept.best_step(), kept.metric(4)) == (4, 4, 0.25)
        assert_same(kept.restore(4, abstract(make_state(0))), make_state(4))
        part = kept.restore_part(4, {"params": abstract(PARAMS)})
        assert_same(part, {"params": make_state(4).params})


def test_keeps_latest_best_and_pinned(tmp_path):
    state = make_state(0)
    with Checkpoints(tmp_path, keep_latest=2) as kept:
        for step, metric in enumerate([0.1, 0.5, None, 0.5, 0.3, None]):
            kept.save(step, state, {"step": step}, metric)
        kept.wait()
        assert kept.steps() == [1, 4, 5] and kept.best_step() == 1  # of equals, the earliest
        kept.pin(4)
    with Checkpoints(tmp_path, keep_latest=2) as kept:  # best and pins outlive the process
        assert kept.pinned() == {4}
        kept.save(6, state, {}, None)
        kept.save(7, state, {}, 0.6)
        kept.save(8, state, {}, 0.2)
        kept.save(9, state, {}, 0.2)
        kept.wait()
        assert kept.steps() == [4, 7, 8, 9] and kept.best_step() == 7
        assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "7", "8", "9", "pinned.json"]
        assert kept.meta(4) == {"step": 4}
        for step in range(10, 30):
            kept.save(step, state, {}, None)
        kept.wait()
        assert kept.steps() == [4, 7, 28, 29] and kept.best_step() == 7
        assert len(kept._metrics) < 10  # a run of many steps does not grow by them


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="keep_latest=0"):
        Checkpoints(tmp_path, keep_latest=0)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        Checkpoints(tmp_path / "missing", keep_latest=1, read_only=True)
    with Checkpoints(tmp_path, keep_latest=1) as kept:
        kept.save(3, make_state(3), {}, None)
        with pytest.raises(ValueError, match="not finite"):
            kept.save(4, make_state(4), {}, float("nan"))
        with pytest.raises(ValueError, match="step 2 comes after step 3"):
            kept.save(2, make_state(2), {}, None)
        for call in (lambda: kept.restore(7, abstract(make_state(0))), lambda: kept.meta(7)):
            with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7 .* \[3\]"):
                call()
        with pytest.raises(ValueError, match="no checkpoint of step 7"):
            kept.pin(7)
        other = abstract(make_state(0))
        wide = jax.ShapeDtypeStruct((3, 3), jnp.float32, sharding=other.params["a"].sharding)
        half = jax.ShapeDtypeStruct((4,), jnp.float16, sharding=other.params["b"].sharding)
        for params, message in (
            ({**other.params, "a": wide}, r"params.a: saved float32 \(2, 3\), asked for float32 \(3, 3\)"),
            ({**other.params, "b": half}, r"params.b: saved bfloat16 \(4,\), asked for float16 \(4,\)"),
            ({**other.params, "z": wide}, r"params.z: saved nothing, asked for float32 \(3, 3\)"),
            ({"b": half}, r"params.a: saved float32 \(2, 3\), asked for nothing"),
        ):
            with pytest.raises(ValueError, match=message):
                kept.restore(3, other.replace(params=params))
        with pytest.raises(ValueError, match="params.z: saved nothing"):
            kept.restore_part(3, {"params": {"z": wide}})


def test_kill_while_saving_leaves_the_older_step(tmp_path):
    child = start(f"""
        import os, signal
        import jax.numpy as jnp
        from fgrpo_jax.run.checkpoint import Checkpoints
        kept = Checkpoints({str(tmp_path)!r}, keep_latest=1)
        kept.save(1, dict(x=jnp.full(30_000_000, 1.0)), dict(step=1), 0.5)
        kept.wait()
        kept.save(2, dict(x=jnp.full(30_000_000, 2.0)), dict(step=2), 0.9)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, errors[-3000:]
    left = sorted(p.name for p in tmp_path.iterdir())
    with Checkpoints(tmp_path, keep_latest=1) as kept:
        latest = kept.latest_step()
        assert latest == (2 if "2" in left else 1), left  # normally the kill comes first
        assert kept.meta(latest) == {"step": latest} and kept.best_step() == latest
        shape = {"x": jax.ShapeDtypeStruct((30_000_000,), jnp.float32, sharding=jnp.ones(1).sharding)}
        assert (np.asarray(kept.restore(latest, shape)["x"]) == latest).all()
        kept.save(3, {"x": jnp.ones(30)}, {}, None)  # and the run goes on
        kept.wait()
        assert not [p for p in tmp_path.iterdir() if "tmp" in p.name]


def test_kill_while_deleting_leaves_whole_steps(tmp_path):
    """A kill when some files of the step that is to go are gone."""
    child = start(f"""
        import os, signal
        import jax.numpy as jnp
        from fgrpo_jax.run.checkpoint import Checkpoints
        unlink = os.unlink
        def unlink_and_die(path, **where):
            unlink(path, **where)
            if os.path.basename(path) == "metadata":
                os.kill(os.getpid(), signal.SIGKILL)
        kept = Checkpoints({str(tmp_path)!r}, keep_latest=1)
        kept.save(1, dict(x=jnp.full(30, 1.0)), dict(step=1), None)
        kept.wait()
        os.unlink = unlink_and_die
        kept.save(2, dict(x=jnp.full(30, 2.0)), dict(step=2), None)
        kept.close()
    """)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, errors[-3000:]
    with Checkpoints(tmp_path, keep_latest=1) as kept:
        assert kept.latest_step() == 2
        shape = {"x": jax.ShapeDtypeStruct((30,), jnp.float32, sharding=jnp.ones(1).sharding)}
        for step in kept.steps():
            assert kept.meta(step) == {"step": step}
            assert (np.asarray(kept.restore(step, shape)["x"]) == step).all()
        kept.save(3, {"x": jnp.ones(30)}, {}, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3"]


def test_a_checkpoint_that_is_not_whole_is_named(tmp_path):
    with Checkpoints(tmp_path, keep_latest=2) as kept:
        kept.save(1, make_state(1), {}, None)
    shutil.rmtree(tmp_path / "1" / "meta")
    with pytest.raises(ConfigError, match=f"the checkpoint {tmp_path / '1'} is not whole .* or remove it"):
        Checkpoints(tmp_path, keep_latest=2)


def test_sigterm_in_one_process():
    before = signal.getsignal(signal.SIGTERM)
    with preemption() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() and stop()
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path):
    """Two processes of two devices train, one is told to go, both save; one device restores."""
    script = f"""
        import time
        import jax, jax.numpy as jnp, numpy as np
        from fgrpo_jax.run.checkpoint import Checkpoints, preemption
        from fgrpo_jax.run.processes import initialize_distributed
        from fgrpo_jax.run.sharding import local_rows, make_mesh, shard_batch
        assert initialize_distributed()
        mesh = make_mesh(2, 2, 1)
        x = shard_batch(mesh, np.arange(8.0, dtype=np.float32)[local_rows(mesh, 8)], 8)
        assert x.shape == (8,) and len(local_rows(mesh, 8)) == 4
        advance = jax.jit(lambda x: (x + 1, x.sum()))
        with Checkpoints({str(tmp_path)!r}, keep_latest=2) as kept, preemption() as stop:
            for step in range(1, 1001):
                x, total = advance(x)
                assert float(total) == 28 + 8 * (step - 1)
                if step == 3:
                    kept.save(3, dict(x=x), dict(step=3), 0.5)
                    kept.pin(3)
                    print("ready", flush=True)
                if stop():
                    kept.save(step, dict(x=x), dict(step=step), None)
                    assert stop()
                    break
                time.sleep(0.02)
        print("stopped", step, flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with two_processes(command, devices=2) as both:
        said = iter(both[1].stdout.readline, "")
        assert "ready\n" in said, both[1].communicate()[1][-3000:]
        both[1].send_signal(signal.SIGTERM)
        done = [child.communicate(timeout=120) for child in both]
    assert [child.returncode for child in both] == [0, 0], done[0][1][-3000:] + done[1][1][-3000:]
    step = int(done[0][0].split()[-1])
    assert done[0][0].endswith(f"stopped {step}\n") and done[1][0] == f"stopped {step}\n"
    with Checkpoints(tmp_path, keep_latest=2, read_only=True) as kept:
        assert kept.steps() == [3, step] and kept.best_step() == 3 and kept.pinned() == {3}
        shape = {"x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=jnp.ones(1).sharding)}
        np.testing.assert_array_equal(kept.restore(step, shape)["x"], np.arange(8) + step)
