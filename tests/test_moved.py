"""A run directory that was moved: what it needs is in it, whatever the working directory."""

import json
import shutil

import pytest
from bpe import train_bpe
from helpers import quick_runs, random_params
from tiny import changed, run_training, tiny_config, write_world
from write_gguf import write_gguf

import eval as evaluation
from fgrpo_jax.export import export
from fgrpo_jax.models import decoder, hf
from fgrpo_jax.run import directory as run

SPEC = decoder.DecoderSpec(
    vocab_size=262, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_size=8,
    rope_theta=50_000.0, norm_eps=1e-5, init_std=0.3,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_runs():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a checkpoint (a GGUF file), a run on it and a run from that one, all by relative paths."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "data").mkdir()
    write_world(folder / "data", train=8, validation=4, test=1)
    tokenizer = train_bpe(["bytes alone"], SPEC.vocab_size)
    source = {"model_type": "qwen3", "max_position_embeddings": 777}
    hf.save(folder / "qwen", SPEC, random_params(SPEC), source, tokenizer)
    write_gguf(folder / "qwen.gguf", folder / "qwen", "qwen3")
    config = changed(
        tiny_config(folder / "data", folder / "prepared", "runs/first", sft_steps=2),
        {
            "model.checkpoint": "qwen.gguf",
            "tokenizer": "qwen.gguf",
            "transcript.identifier": "index",
            "transcript.separator": " > ",
            "data.prompt_buckets": (256,),
            "eval.baselines": ("random",),
            "sft.eval_every": 2,
            "rl.eval_every": 2,
            "rl.group_size": 2,
        },
    )
    second = {"run_dir": "runs/second", "start_from": "runs/first", "sft.steps": 0, "rl.steps": 2}
    (folder / "runs").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_training(config) == 0
        second = changed(config, second)
        assert run_training(second) == 0
    return folder, second


@pytest.fixture
def moved(made, tmp_path, monkeypatch):
    """Both runs elsewhere, without the checkpoint, and another working directory."""
    folder, second = made
    shutil.copytree(folder / "runs", tmp_path / "elsewhere")
    shutil.move(folder / "qwen.gguf", folder / "hidden")
    shutil.move(folder / "runs", folder / "hidden runs")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    yield tmp_path / "elsewhere", changed(second, {"run_dir": str(tmp_path / "elsewhere" / "second")})
    shutil.move(folder / "hidden", folder / "qwen.gguf")
    shutil.move(folder / "hidden runs", folder / "runs")


def scores(run_dir):
    return json.loads((run_dir / "eval" / "validation" / "metrics.json").read_text())


def test_it_is_evaluated_and_exported(moved, tmp_path, capsys):
    """Beside the run it started from, which was moved along."""
    runs, _ = moved
    before = scores(runs / "second")
    assert set(before["methods"]) == {"random", "sft", "rl"}
    shutil.rmtree(runs / "second" / "eval")
    assert evaluation.main([str(runs / "second")]) == 0
    assert scores(runs / "second") == before and "note" not in capsys.readouterr().out
    export(runs / "second", tmp_path / "out")
    exported = hf.read_config(tmp_path / "out")
    assert exported["max_position_embeddings"] == 777 and exported["rope_theta"] == SPEC.rope_theta
    numerics = {"dtype": "float32", "param_dtype": "float32", "remat": False, "attention": "auto", "logit_chunk": 4096}
    assert hf.read_spec(tmp_path / "out", **numerics) == SPEC._replace(init_std=0.02)
    export(runs / "second", tmp_path / "its start", "sft")
    export(runs / "first", tmp_path / "first")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("its start", "first")]
    assert weights[0] == weights[1]


def test_without_the_run_it_started_from_a_row_is_missing_and_that_is_said(moved, capsys):
    runs, _ = moved
    shutil.rmtree(runs / "first")
    assert evaluation.main([str(runs / "second")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "note: no row sft, which this run started from: there is no run with a finished sft stage at "
        f"{runs / 'first'}; differences are taken to rl\n"
    )
    assert set(scores(runs / "second")["methods"]) == {"random", "rl"}
    assert evaluation.main([str(runs / "second"), "--eval.versus", "bm25"]) == 2  # what was asked for is not changed
    capsys.readouterr()


def test_a_start_that_was_trained_on_is_none_any_more(moved, capsys):
    runs, _ = moved
    done = run.read_done(runs / "first", "sft")
    (runs / "first" / "sft" / "done.json").write_text(json.dumps(done | {"step": 9}))
    assert evaluation.main([str(runs / "second")]) == 0
    said = capsys.readouterr().out
    assert "first is not, or no more, the run that" in said and "its sft stage ended otherwise" in said
    assert set(scores(runs / "second")["methods"]) == {"random", "rl"}


@pytest.mark.parametrize("start", ["runs/first", "{runs}/first"], ids=["as before", "where it lies now"])
def test_it_is_resumed(moved, monkeypatch, capsys, start):
    """A checkpoint is there, so nothing is read of what it started from."""
    runs, config = moved
    (runs / "second" / "rl" / "done.json").unlink()
    start = start.format(runs=runs)
    assert run_training(changed(config, {"start_from": start})) == 0
    assert "rl: resuming from step 2\n" in capsys.readouterr().out
    assert run.read_config(runs / "second").start_from == start
    assert json.loads((runs / "second" / "start.json").read_text())["run"] == "../first"


def test_another_start_is_refused(moved, capsys):
    runs, config = moved
    for place in ("second", "nowhere"):
        assert run_training(changed(config, {"start_from": str(runs / place)})) == 2
        assert f"  - start_from: 'runs/first' -> '{runs / place}'" in capsys.readouterr().err


def test_what_is_needed_again_is_asked_for(moved, capsys):
    """The reference of a KL term is the start itself."""
    runs, config = moved
    fields = {"run_dir": str(runs / "third"), "start_from": str(runs / "first"), "rl.objective.kl_weight": 0.1}
    fields |= {"tokenizer": str(runs / "first" / "tokenizer"), "model.checkpoint": "", "model.num_kv_heads": 1}
    fields |= {"model.rope_theta": SPEC.rope_theta, "model.norm_eps": SPEC.norm_eps}  # the other sizes are tiny's
    config = changed(config, fields)
    assert run_training(config) == 0
    (runs / "third" / "rl" / "done.json").unlink()
    shutil.move(runs / "first", runs / "gone")
    assert run_training(config) == 2
    assert f"{runs / 'first'} is not a run directory" in capsys.readouterr().err
    assert run_training(changed(config, {"start_from": str(runs / "gone")})) == 0
    assert "rl: resuming from step 2\n" in capsys.readouterr().out
