"""Stopped, killed and resumed is the same as never stopped, to the bit; a bad step ends a run.

One run of both stages on a JSONL data set is made without interruption; a second one of the same
configuration is told to stop in its first stage, resumed, killed in its second, and resumed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_runs, two_processes
from tiny import (
    ROOT,
    changed,
    config_file,
    contents,
    rows,
    run_training,
    tiny_config,
    write_world,
)

import train
from fgrpo_jax.data.batches import make_batches
from fgrpo_jax.data.datasets import load
from fgrpo_jax.run.checkpoint import Checkpoints

STOPPED, KILLED = ("sft", 5), ("rl", 5)  # at no step that is logged, evaluated or saved anyway


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_runs():
        yield


class Run(NamedTuple):
    config: object
    directory: Path
    states: dict


@pytest.fixture(scope="module")
def whole(tmp_path_factory, states):
    """The run nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "data").mkdir()
    write_world(folder / "data")
    config = tiny_config(folder / "data", folder / "prepared", folder / "run", sft_steps=6, rl_steps=6)
    assert run_training(config) == 0
    made = dict(states)
    states.clear()
    return Run(config, folder / "run", made)


def test_a_run_on_jsonl_files(whole):
    """Pools of differing sizes, and a training query without a relevant candidate, which is skipped."""
    assert list(whole.states) == [(stage, step) for stage in ("sft", "rl") for step in range(1, 7)]
    for stage in ("sft", "rl"):
        own = rows(whole.directory, stage)
        assert [row["step"] for row in own if "loss" in row] == [3, 6]
        assert [row["step"] for row in own if "eval/ndcg@2" in row] == [0, 4, 6]
        assert all(row["nonfinite"] == 0 for row in own if "loss" in row)
        done = json.loads((whole.directory / stage / "done.json").read_text())
        measured = {row["step"]: row["eval/ndcg@2"] for row in own if "eval/ndcg@2" in row}
        best = max(measured, key=lambda step: (measured[step], -step))
        assert done == {"step": 6, "best_step": best, "metric": "ndcg@2", "best": measured[best]}
        with Checkpoints(whole.directory / stage / "checkpoints", 2, read_only=True) as kept:
            assert kept.steps() == sorted({best, 4, 6}) and kept.pinned() == {best}
    batches = make_batches(load(whole.config.data), whole.config, "rl", whole.config.rl)
    assert batches.skipped == 1 and len(batches.rows) == 39
    text = (whole.directory / "eval" / "validation" / "table.txt").read_text()
    assert text.startswith("12 queries, percent") and {"random", "bm25", "sft", "rl"} <= set(text.split())


INTERRUPTED = """
    import os, signal, sys
    sys.path.append({root!r})
    import jax, train
    from fgrpo_jax.run.stage import Stage
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    go_on = Stage.on_step
    def on_step(self, *arguments, **named):
        if (self.name, self._step + 2) == {stopped!r} and not first:
            os.kill(os.getpid(), signal.SIGTERM)  # heard when the next step is done
        if (self.name, self._step + 1) == {killed!r}:
            os.kill(os.getpid(), signal.SIGKILL)
        return go_on(self, *arguments, **named)
    Stage.on_step = on_step
    first = []
    first.append(train.main([{config!r}]))
    print("returned", first, flush=True)
    train.main([{config!r}])
"""


@pytest.fixture(scope="module")
def interrupted(whole, states, tmp_path_factory):
    """The same run, stopped, killed and resumed: (directory, what it said, states after the last resume)."""
    folder = tmp_path_factory.mktemp("interrupted")
    config = changed(whole.config, {"run_dir": str(folder / "run")})
    names = {"root": str(ROOT), "stopped": STOPPED, "killed": KILLED, "config": config_file(config, folder / "c.py")}
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }
    script = textwrap.dedent(INTERRUPTED).format(**names)
    child = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600)
    assert child.returncode == -signal.SIGKILL, child.stderr[-3000:]
    states.clear()
    return folder / "run", child.stdout, config


def test_stopped_and_killed_equals_never_stopped(whole, interrupted, states, capsys):
    directory, said, config = interrupted
    assert "sft 4: validation" in said and "stopped in sft: saved; the same command resumes" in said
    before, after = said.split("returned [0]\n")  # SIGTERM ends a run with success
    assert "sft: resuming from step 5\n" in after and "rl 0: validation" in after
    assert (directory / "sft" / "done.json").is_file() and not (directory / "rl" / "done.json").exists()

    assert run_training(config) == 0
    said = capsys.readouterr().out
    # The save of step 4 may not have been complete when the kill came.
    assert "rl: resuming from step 4\n" in said or "rl: resuming from step 2\n" in said
    assert ("rl", 6) in states and ("sft", 6) not in states
    for key, state in states.items():
        jax.tree.map(np.testing.assert_array_equal, state, whole.states[key])
    assert rows(directory) == rows(whole.directory)
    for stage in ("sft", "rl"):
        done = (directory / stage / "done.json").read_text()
        assert done == (whole.directory / stage / "done.json").read_text()
    assert contents(directory / "eval") == contents(whole.directory / "eval")


def test_a_finished_run_is_evaluated_again_and_not_trained(whole, states, tmp_path, capsys):
    """Also where the kill came between the last checkpoint and the note that the stage is done."""
    copy = tmp_path / "run"
    shutil.copytree(whole.directory, copy)
    (copy / "rl" / "done.json").unlink()
    shutil.rmtree(copy / "eval")
    states.clear()
    assert run_training(changed(whole.config, {"run_dir": str(copy)})) == 0
    assert not states and "rl: resuming from step 6\n" in capsys.readouterr().out
    assert rows(copy) == rows(whole.directory)
    for part in ("eval", "rl/done.json"):
        left, right = copy / part, whole.directory / part
        assert contents(left) == contents(right) if left.is_dir() else left.read_bytes() == right.read_bytes()


def test_another_configuration_or_other_data_are_refused(whole, capsys):
    before = contents(whole.directory)
    assert run_training(changed(whole.config, {"sft.steps": 7, "rl.steps": 7, "rl.credit.normalise": "sum"})) == 2
    err = capsys.readouterr().err
    assert "belongs to another configuration" in err
    assert err.endswith(
        "  - sft.steps: 6 -> 7 (rl was trained with its result: choose another run_dir, or remove rl/ there)\n"
        "  - rl.credit.normalise: 'none' -> 'sum'\n"
    )
    data = Path(whole.config.data.manual_dir)
    kept = (data / "train.jsonl").read_bytes()
    try:
        write_world(data, seed=1)
        assert run_training(whole.config) == 2
        assert "the train split is not the one" in capsys.readouterr().err
    finally:
        write_world(data)
    assert (data / "train.jsonl").read_bytes() == kept and contents(whole.directory) == before


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model.hidden_size": 16}, "holds another model: hidden_size: 8 -> 16"),
        ({"prompt.instruction": "Other words."}, "has another tokenizer, so its model cannot read these data"),
        ({"start_from": "{data}"}, "is not a run directory: it holds no config.json"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(whole, tmp_path, capsys, fields, message):
    start = {"run_dir": str(tmp_path / "run"), "start_from": str(whole.directory), "sft.steps": 0, "eval.versus": "rl"}
    fields = {name: str(tmp_path) if value == "{data}" else value for name, value in fields.items()}
    assert run_training(changed(whole.config, start | fields)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_bad_step_ends_the_run_and_changes_nothing(whole, states, tmp_path, monkeypatch, capsys):
    """The third step's loss is not finite; the stage starts from the other run's first stage."""
    config = changed(
        whole.config,
        {"run_dir": str(tmp_path / "run"), "start_from": str(whole.directory), "sft.steps": 0, "eval.versus": "rl"},
    )
    make_step = train.make_step

    def make_poisoned_step(*arguments):
        collect, *others = make_step(*arguments)
        calls = []

        def poisoned(*arguments):
            batch, seen = collect(*arguments)
            calls.append(1)
            return (batch.replace(advantage=batch.advantage * jnp.nan) if len(calls) == 3 else batch), seen

        return poisoned, *others

    monkeypatch.setattr(train, "make_step", make_poisoned_step)
    states.clear()
    assert run_training(config) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: rl step 3: loss or gradient is not finite (loss nan, gradient norm nan). Its update")
    assert f"the last good checkpoint is step 2 in {tmp_path / 'run' / 'rl' / 'checkpoints'}" in err
    queries = make_batches(load(config.data), config, "rl", config.rl).batch_at(2)
    assert f"Queries: {', '.join(e.query_id for e in queries)}. Lower rl.optim.learning_rate" in err
    good, bad = states["rl", 2], states["rl", 3]
    jax.tree.map(np.testing.assert_array_equal, (good.params, good.opt_state), (bad.params, bad.opt_state))
    jax.tree.map(np.testing.assert_array_equal, good, whole.states["rl", 2])  # the same start, the same steps
    with Checkpoints(tmp_path / "run" / "rl" / "checkpoints", 2, read_only=True) as kept:
        assert kept.latest_step() == 2
    assert [row["step"] for row in rows(tmp_path / "run")] == [0]


COUNTED = """
    import json, os, sys
    sys.path.append({root!r})
    import train
    from fgrpo_jax.policies.llm import prompts
    encode, encoded = prompts.encode_prompts, []
    def encode_prompts(tokenizer, texts, *others):
        encoded.append(len(texts))
        return encode(tokenizer, texts, *others)
    prompts.encode_prompts = encode_prompts
    make_step, collected = train.make_step, []
    def make_poisoned_step(experiment, policy, stage):
        collect, *others = make_step(experiment, policy, stage)
        def poisoned(*arguments):
            batch, seen = collect(*arguments)
            collected.append(stage.source)
            bad = collected.count("sampled") == 3
            return (batch.replace(weight=batch.weight * float("nan")) if bad else batch), seen
        return poisoned, *others
    if {poisoned}:
        train.make_step = make_poisoned_step
    code = train.main([{config!r}])
    print("encoded", json.dumps(encoded), flush=True)
    sys.exit(code)
"""


def test_two_processes_of_four_devices_train_what_one_does(whole, tmp_path):
    """The whole command, on a mesh over both: the same rows up to rounding, written once.

    The third step of rl is not finite at first, which ends both, and both resume. Each encodes
    its own half of every batch: of 8 queries, also where the validation is decoded.
    """
    config = changed(whole.config, {"run_dir": str(tmp_path / "run"), "mesh.fsdp": 4})
    names = {"root": str(ROOT), "config": config_file(config, tmp_path / "config.py")}
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}

    def start(poisoned):
        command = [sys.executable, "-c", textwrap.dedent(COUNTED).format(**names, poisoned=poisoned)]
        with two_processes(command, devices=4, **quick) as both:
            said = [child.communicate(timeout=600) for child in both]
        return said, [child.returncode for child in both]

    start_up = 3 + 2  # the longest queries of every split, and a batch of each stage, for its shapes
    bad, codes = start(poisoned=True)
    assert codes == [2, 2], bad[0][1][-3000:] + bad[1][1][-3000:]
    for out, errors in bad:
        assert "error: rl step 3: loss or gradient is not finite" in errors
        encoded, steps, validations = json.loads(out.split("encoded ")[1]), 6 + 3, 3 + 1
        steps += 1  # the batch that was read ahead
        assert len(encoded) == start_up + steps + 2 * validations and set(encoded[start_up:]) == {4}
    said, codes = start(poisoned=False)
    assert codes == [0, 0], said[0][1][-3000:] + said[1][1][-3000:]
    assert "8 x cpu (2 process(es)), mesh data 2 x fsdp 4 x tensor 1" in said[0][0]
    assert "rl: resuming from step 2\n" in said[0][0]
    assert "queries, percent" in said[0][0] and "queries" not in said[1][0]
    ours, theirs = rows(tmp_path / "run"), rows(whole.directory)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert {k: v for k, v in our.items() if isinstance(v, str)} == {"stage": their["stage"]}
        assert [our[k] for k in our if k != "stage"] == pytest.approx([their[k] for k in our if k != "stage"], abs=1e-4)
    table = "eval/validation/table.txt"
    assert (tmp_path / "run" / table).read_bytes() == (whole.directory / table).read_bytes()
