"""`python train.py` and `python eval.py` as a user meets them, on the embedded data set, with a tiny model."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from helpers import quick_runs
from tiny import changed, contents, rows, run_training, tiny_config

import eval as evaluation
import train
from fgrpo_jax.config import DataConfig, TranscriptConfig
from fgrpo_jax.run import experiment

QUERIES = 1000  # of each evaluation split
PROGRAMS = ("validation", "rollouts", "the update")  # of a stage, in the order of their first use


class Run(NamedTuple):
    config: object
    directory: Path
    said: str
    compiled: list[str]  # names of the programs, in order


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_runs(curves=True):
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """SFT and F-GRPO, then the table of the test split; shared and never changed."""
    folder = tmp_path_factory.mktemp("next_item")
    data = DataConfig(name="next_item", prepared_dir=str(folder / "prepared"), prompt_buckets=(40,))
    fields = {
        "data": data,
        "transcript": TranscriptConfig(slate_min=4, slate_max=5, rank_min=2, rank_max=3),
        "sft.optim.learning_rate": 0.05,
        "sft.batch_queries": 32,
        "eval.batch_queries": 256,
        "eval.train_queries": 64,
        "eval.baselines": ("random", "popularity", "covisitation"),
    }
    config = changed(tiny_config("", "", folder / "run", sft_steps=24, rl_steps=3), fields)
    with contextlib.redirect_stdout(io.StringIO()) as said, programs_compiled() as compiled:
        assert run_training(config, "--eval.split", "test", "--rl.eval-every", "2") == 0
    fields = {"eval.split": "test", "rl.eval_every": 2}
    return Run(changed(config, fields), folder / "run", said.getvalue(), compiled)


@contextlib.contextmanager
def programs_compiled():
    """The names of all programs compiled (or read from the cache on disk) meanwhile."""
    names = []

    def note(event, duration, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def test_each_stage_compiles_its_step_once(run):
    """27 steps and 9 evaluations over one prompt bucket: no array changes its shape, type or place."""
    for name in ("collect", "update"):
        assert sum(name in program for program in run.compiled) == 2, run.compiled
    assert len(run.compiled) < 20, run.compiled


def test_the_run_directory(run):
    found = {str(path.relative_to(run.directory)) for path in run.directory.iterdir()}
    assert found == {
        ".lock", "config.json", "data.json", "model.json", "tokenizer", "prompt_begins.json", "metrics.jsonl",
        "samples.jsonl", "sft", "rl", "eval",
    }  # fmt: skip
    data = json.loads((run.directory / "data.json").read_text())
    assert set(data["fingerprints"]) == {"train", "validation", "test"} and len(data["catalogue"]) == 500
    for stage, steps in (("sft", 24), ("rl", 3)):
        done = json.loads((run.directory / stage / "done.json").read_text())
        assert done["step"] == steps and 0 <= done["best_step"] <= steps
        assert (run.directory / stage / "checkpoints" / str(done["best_step"])).is_dir()
    assert {path.name for path in (run.directory / "eval" / "test").iterdir()} == {
        "metrics.json", "per_query.jsonl", "manifest.json", "table.txt", "qrels.trec", "report.html",
        *(f"{m}.run.trec" for m in ("random", "popularity", "covisitation", "sft", "rl")),
    }  # fmt: skip


def test_what_was_logged(run):
    sft, rl = rows(run.directory, "sft"), rows(run.directory, "rl")
    assert [row["step"] for row in sft if "loss" in row] == list(range(3, 25, 3))
    assert [row["step"] for row in sft if "eval/ndcg@2" in row] == [0, 4, 8, 12, 16, 20, 24]
    assert [row["step"] for row in rl] == [0, 2, 3, 3]
    losses = [row["loss"] for row in sft if "loss" in row]
    assert losses[-1] < losses[0] - 0.1, losses  # 20 candidates: ln 20 = 3.0 for the first one
    (row,) = (row for row in rl if "loss" in row)
    assert {"grad_norm", "nonfinite", "drift", "tokens_trained", "outcome/ok", "dead_groups/rank"} <= row.keys()
    assert 0 < row["entropy/slate"] < np.log(20) and 0 < row["entropy/rank"] < np.log(5)
    assert 4 <= row["slate_length"] <= 5 and 2 <= row["rank_length"] <= 3
    assert rl[0]["eval/slate_recall"] == max(row["eval/slate_recall"] for row in sft if is_best(run, row))


def is_best(run, row):
    """The evaluation of the SFT checkpoint that reinforcement learning starts from."""
    best = json.loads((run.directory / "sft" / "done.json").read_text())["best_step"]
    return row["step"] == best and "eval/slate_recall" in row


def test_what_was_said(run):
    """The plan before, a line per log interval and evaluation meanwhile, the table at the end."""
    lines = run.said.splitlines()
    plan = {line.split()[0]: line for line in lines[:8]}
    assert list(plan) == ["devices", "model", "data", "sft", "memory", "rl", "output"]
    assert "mesh data 1 x fsdp 1 x tensor 1" in plan["devices"] and "vocabulary 509" in plan["model"]
    assert plan["data"].endswith("next_item: train 16,000, validation 1,000, test 1,000 queries")
    tokens = 8 * (40 + 4 * 11)
    assert f"3 steps of [B 8, G 4, S 40, T 11], {tokens:,} tokens a step (sampled, clipped_pg)" in plan["rl"]
    assert any(line.startswith("sft 3/24  loss ") and " tokens/s  ETA 0:" in line for line in lines)
    assert any(line.startswith("rl 3/3  reward/slate 0.") and " queries/s  " in line for line in lines)
    assert any(line.startswith("rl 2: validation ndcg@2 0.") for line in lines)
    compiling = [line for line in lines if "compiling" in line]
    assert compiling == [f"{stage}: compiling {what} ..." for stage in ("sft", "rl") for what in PROGRAMS]
    table = (run.directory / "eval" / "test" / "table.txt").read_text()
    assert run.said.endswith(table + "\n") and table.startswith(f"{QUERIES} queries, percent")
    assert "difference to sft, paired" in table


def test_the_table_holds_known_numbers(run):
    """Random within its closed form: 1 relevant among 20; and the models above it after a few steps."""
    summary = json.loads((run.directory / "eval" / "test" / "metrics.json").read_text())
    random = summary["methods"]["random"]
    assert summary["queries"] == QUERIES and list(summary["methods"]) == sorted(summary["methods"])
    for name, expected in (("recall@2", 2 / 20), ("slate_recall", 5 / 20)):
        assert abs(random[name]["mean"] - expected) < 4 * np.sqrt(expected / QUERIES)
    assert summary["methods"]["covisitation"]["recall@1"]["mean"] > 0.4
    assert summary["errors"]["rl"]["malformed"] == summary["errors"]["sft"]["malformed"] == 0


def test_the_same_command_does_not_train_again(run, monkeypatch, capsys):
    before = contents(run.directory)
    monkeypatch.setattr(train, "train_stage", None)
    assert run_training(run.config) == 0
    assert contents(run.directory) == before
    assert run.said.endswith(capsys.readouterr().out.split("\n", 8)[-1])


# --------------------------------------------------------------------- eval.py


def test_the_same_evaluation_gives_the_same_bytes(run, tmp_path, capsys):
    """On another split, beside another run: which is this one under another name."""
    other = tmp_path / "other"
    shutil.copytree(run.directory, other)
    command = [str(run.directory), "--split", "validation", "--compare", str(other), "--eval.versus", "other.rl"]
    folder = run.directory / "eval" / "validation"
    found = []
    for _ in range(2):
        assert evaluation.main([*command, "--eval.baselines", "random"]) == 0
        found.append((contents(folder), capsys.readouterr().out))
    assert found[0] == found[1] and found[0][1] == (folder / "table.txt").read_text() + "\n"
    summary = json.loads((folder / "metrics.json").read_text())
    assert set(summary["methods"]) == {"random", "sft", "rl", "other.sft", "other.rl"}
    assert summary["methods"]["rl"] == summary["methods"]["other.rl"]
    assert set(summary["paired"]["rl"]["recall@1"].values()) == {0.0}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["config"]["eval"]["split"] == "validation" and list(manifest["data"]) == ["validation"]
    shutil.rmtree(folder)


def test_bad_evaluations_are_refused(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiment, "Predictor", None)  # all of it before anything is decoded
    before = contents(run.directory)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run.directory, unfinished)
    for stage in ("sft", "rl"):
        (unfinished / stage / "done.json").unlink()
    here, same, random = str(run.directory), tmp_path / "b" / "unfinished", ["--eval.baselines", "random"]
    for arguments, message in (
        ([], "give the run directory first: python eval.py RUN_DIR"),
        ([str(tmp_path)], "is not a run directory: it holds no config.json"),
        ([str(unfinished)], "has no finished stage yet: let train.py run to its end"),
        ([here, "--split", "dev"], "data set 'next_item' has no split 'dev', only train, validation, test"),
        ([here, "--eval.baselines", "als"], "eval.baselines: 'als' is not one of bm25, covisitation"),
        ([here, "--eval.versus", "bm25", *random], "eval.versus='bm25' is not evaluated here; choose one of random"),
        ([here, "--data.name", "jsonl"], "data.name='jsonl' reads files: set data.manual_dir"),
        ([here, "--compare", str(unfinished), str(same)], "rename it, to something unique without spaces"),
        ([here, "--mesh.fsdp", "3", *random], "3 does not divide the 1 device"),
    ):
        assert evaluation.main(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err, err
    assert contents(run.directory) == before
    with pytest.raises(SystemExit):
        evaluation.main([here, "--split"])
