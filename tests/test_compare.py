"""`eval.py --compare`: the same queries, and each policy is shown them as its own run did."""

import json
import shutil

import pytest
from helpers import quick_runs
from raw_files import lines
from tiny import changed, run_training, tiny_config, write_world

import eval as evaluation
from fgrpo_jax.data import jsonl
from fgrpo_jax.policies.llm import system


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_runs():
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on the same data that differ in all that a policy sees."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data").mkdir()
    write_world(folder / "data")
    short = tiny_config(folder / "data", folder / "prepared", folder / "short", sft_steps=8)
    short = changed(short, {"data.history_max": 1, "eval.baselines": ("random", "bm25")})
    fields = {
        "run_dir": str(folder / "long"),
        "seed": 1,
        "data.history_max": 3,
        "data.prompt_buckets": (24,),
        "prompt.instruction": "Other words.",
        "transcript.separator": ";",
        "transcript.constrained": False,
        "transcript.rank_min": 1,
    }
    for config in (short, changed(short, fields)):
        assert run_training(config) == 0
    return folder


def rows(run_dir, method, split="validation"):
    """Query id -> what a method said and scored."""
    lines = (run_dir / "eval" / split / "per_query.jsonl").read_text().splitlines()
    return {row["query_id"]: row["methods"][method] for row in map(json.loads, lines)}


def test_a_compared_run_scores_what_it_scores_alone(runs, capsys):
    alone = {name: rows(runs / name, "sft") for name in ("short", "long")}
    heard = rows(runs / "short", "bm25")
    assert alone["short"] != alone["long"] and any(row["slate"] for row in alone["long"].values())
    assert evaluation.main([str(runs / "short"), "--compare", str(runs / "long")]) == 0
    assert rows(runs / "short", "long.sft") == alone["long"]
    assert rows(runs / "short", "sft") == alone["short"]
    assert rows(runs / "short", "bm25") == heard  # whose queries are histories: those of RUN_DIR
    assert evaluation.main([str(runs / "long"), "--compare", str(runs / "short")]) == 0
    assert rows(runs / "long", "short.sft") == alone["short"]
    assert rows(runs / "long", "bm25") != heard
    capsys.readouterr()


def test_the_judged_data_may_be_others_and_what_a_policy_sees_may_not(runs, tmp_path, capsys):
    """Other raw files, another place for prepared data, longer buckets: the same scores."""
    alone = {name: rows(runs / name, "sft") for name in ("short", "long")}
    shutil.copytree(runs / "data", tmp_path / "data")
    flags = ["--data.manual-dir", str(tmp_path / "data"), "--data.prepared-dir", str(tmp_path / "prepared")]
    flags += ["--data.prompt-buckets", "40"]
    assert evaluation.main([str(runs / "short"), "--compare", str(runs / "long"), *flags]) == 0
    assert rows(runs / "short", "sft") == alone["short"] and rows(runs / "short", "long.sft") == alone["long"]
    with pytest.raises(SystemExit):
        evaluation.main([str(runs / "short"), "--data.history-max", "3"])
    assert "--data.history-max" in capsys.readouterr().err


def test_other_data_do_not_change_the_template(runs, tmp_path, monkeypatch, capsys):
    """MuSiQue's own instruction and order are not those this run was trained on."""
    told, make = [], system.make

    def spy(config, spec, tokenizer, kind, instruction, run_dir):
        told.append((kind, instruction))
        return make(config, spec, tokenizer, kind, instruction, run_dir)

    monkeypatch.setattr(system, "make", spy)
    paragraphs = [{"idx": i, "title": "T", "paragraph_text": f"{i}", "is_supporting": i < 2} for i in range(4)]
    question = {"id": "q", "question": "Who?", "paragraphs": paragraphs}
    lines(tmp_path / "musique_ans_v1.0_dev.jsonl", [question])
    command = [str(runs / "short"), "--data.name", "musique", "--data.manual-dir", str(tmp_path)]
    command += ["--data.prepared-dir", str(tmp_path / "prepared")]
    assert evaluation.main(command) == 2
    assert "query 'q': the tokenizer has no token for" in capsys.readouterr().err
    assert told == [("recommendation", jsonl.Jsonl.instruction)]


def test_runs_whose_lists_have_other_lengths_are_refused(runs, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(runs / "long", other)
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"slate_max": 3', '"slate_max": 4'))
    assert evaluation.main([str(runs / "short"), "--compare", str(other)]) == 2
    assert "its slates and rankings hold up to (4, 2) items, those of this run (3, 2)" in capsys.readouterr().err
