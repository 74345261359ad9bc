"""A run directory: who may enter it, and what stays in its files when a run is killed."""

import json
import os
from pathlib import Path

import pytest
from tiny import changed, run_training, tiny_config

import eval as evaluation
from fgrpo_jax.config import ConfigError
from fgrpo_jax.config_files import to_json
from fgrpo_jax.files import StorageError, read_rows
from fgrpo_jax.policies.llm.files import saved_spec
from fgrpo_jax.run import directory as run
from fgrpo_jax.run import log as log_lib


@pytest.fixture
def config(tmp_path):
    return tiny_config(tmp_path / "data", tmp_path / "prepared", tmp_path / "run", sft_steps=1)


def test_a_new_directory_is_made_and_entered_again(config, tmp_path):
    assert run.check(config) == tmp_path / "run" and not (tmp_path / "run").exists()
    with run.locked(tmp_path / "run"):
        assert run.enter(config) == tmp_path / "run"
    assert run.read_config(tmp_path / "run") == config
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    run.enter(config)
    (tmp_path / "run").rename(tmp_path / "moved")
    run.enter(changed(config, {"run_dir": str(tmp_path / "moved")}))  # where it lies does not count
    assert sorted(p.name for p in (tmp_path / "moved").iterdir()) == [".lock", "config.json", "metrics.jsonl"]


def test_another_configuration_is_refused_naming_the_fields(config, tmp_path):
    (tmp_path / "run").mkdir()
    run.enter(config)
    other = changed(config, {"seed": 1, "reward.k": 3})
    for entrance in (run.check, run.enter):
        with pytest.raises(ConfigError) as error:
            entrance(other)
        message, *differing = str(error.value).splitlines()
        assert message.endswith("belongs to another configuration; choose another run_dir, or restore:")
        assert differing == ["  - seed: 0 -> 1", "  - reward.k: 2 -> 3"]
    assert run.read_config(run.check(config)) == config


def test_a_directory_with_other_contents_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".config.json.partial", ".lock"):
        (tmp_path / "run" / name).write_text("{")  # of a run killed at once
    run.enter(config)
    (tmp_path / "run" / "config.json").rename(tmp_path / "run" / "thesis.tex")
    with pytest.raises(ConfigError, match="not empty, and no run: it holds no config.json; choose another"):
        run.enter(config)
    (tmp_path / "run" / "config.json").write_text(to_json(config).replace('"seed"', '"sed"'))
    with pytest.raises(ConfigError, match="config.json is not a configuration of this version .*unknown field.s. sed"):
        run.enter(config)


@pytest.mark.parametrize("place", ["file", "file/below", "closed/run"])
def test_a_place_that_cannot_be_written_is_refused(config, tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir()
    os.chmod(tmp_path / "closed", 0o500)
    if place.startswith("closed") and os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(StorageError, match=f"{place} could not be written .*: what was complete before is whole"):
        with run.locked(tmp_path / place):
            pass


def test_what_is_no_run_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="is not a run directory: it holds no config.json"):
        run.read_config(tmp_path)
    with pytest.raises(ConfigError, match="holds no data.json: nothing was trained in it yet"):
        run.read_catalogue(tmp_path)


def test_files_that_were_damaged_are_named(config, tmp_path):
    """By a copy that was cut short, or by hand."""
    where = tmp_path / "run"
    (where / "sft").mkdir(parents=True)
    model = config.model
    for name, read, texts in (
        ("config.json", run.read_config, (to_json(config).replace('"seed": 0', '"seed": "0"'), to_json(config)[:99])),
        ("sft/done.json", lambda path: run.read_done(path, "sft"), ("", '{"step": 3}', "[]")),
        ("data.json", run.read_kind, ("{}", '{"kind": "qa"')),
        ("start.json", lambda path: run.lacking_start(path, config), ("{", "{}")),
        ("model.json", lambda path: saved_spec(path, model), ("{}", "nonsense")),
    ):
        for text in texts:
            (where / name).write_text(text)
            with pytest.raises(ConfigError, match=f"{where / name} is "):
                read(where)
    with pytest.raises(ConfigError, match=r"config.json is no configuration: seed='0' must be of type int$"):
        (where / "config.json").write_text(to_json(config).replace('"seed": 0', '"seed": "0"'))
        run.read_config(where)


@pytest.mark.parametrize(
    "value, now, message",
    [
        ('"keep": 2', '"keep": 0', "checkpoint.keep=0 must be at least 1"),
        ('"learning_rate": 0.03', '"learning_rate": NaN', "sft.optim.learning_rate=nan must be positive"),
        ('"versus": "sft"', '"versus": "als"', "eval.versus: 'als' is not one of bm25, random, sft"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(config, tmp_path, capsys, value, now, message):
    """Edited by hand, it is of the right types."""
    (tmp_path / "run").mkdir()
    text = to_json(config)
    assert value in text
    (tmp_path / "run" / "config.json").write_text(text.replace(value, now))
    assert evaluation.main([str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'run' / 'config.json'} is no configuration: {message}\n"
    with pytest.raises(ConfigError, match="config.json is no configuration: "):
        run.check(config)


def test_no_start_is_not_the_run_in_the_working_directory(config, tmp_path, monkeypatch):
    start = tmp_path / "start"
    (start / "sft").mkdir(parents=True)
    (start / "config.json").write_text(to_json(config))
    (start / "sft" / "done.json").write_text('{"step": 1, "best_step": 1}')
    fields = {"start_from": str(start), "sft.steps": 0, "rl.steps": 1}
    config = changed(config, fields)
    (tmp_path / "run").mkdir()
    run.enter(config)
    run.record_start(tmp_path / "run", config)
    monkeypatch.chdir(start)
    run.check(changed(config, {"start_from": "."}))  # the same, called otherwise
    with pytest.raises(ConfigError, match=f"start_from: '{start}' -> ''"):
        run.check(changed(config, {"start_from": ""}))


def test_mistakes_leave_no_directory_behind(config, tmp_path, capsys):
    """So that the command can be given again, corrected, without clearing anything away."""
    (tmp_path / "data").mkdir()
    line = {"query_id": "q", "query": "", "candidates": [{"id": "1", "text": "a"}], "relevance": [1, 0]}
    line["history"] = [{"id": "2", "text": "b"}]
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(line) + "\n")
    assert run_training(config) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: 1 malformed line(s), nothing was prepared:")
    assert "train.jsonl, line 1: relevance has 2 numbers for 1 candidates" in err

    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(line | {"relevance": [1]}) + "\n")
    for fields, message in (
        ({}, "eval.split='validation': the run ends on it, and data set 'jsonl' has only train: add"),
        ({"sft.patience": 1}, "sft.patience needs a validation split, and data set 'jsonl' has only train"),
        ({"eval.split": "train", "sft.batch_queries": 7, "mesh.fsdp": 3}, "3 does not divide the 1 device"),
        ({"eval.split": "train", "data.prompt_buckets": (3,)}, "'q' has a prompt of .* longer than the largest"),
        ({"eval.split": "train", "tokenizer": "nope"}, "tokenizer='nope' is not a directory"),
        ({"eval.split": "train", "model.checkpoint": "nope"}, "nope"),
        ({"sft.steps": 0, "rl.steps": 1, "start_from": "nope", "eval.split": "train"}, "nope is not a run directory"),
    ):
        assert run_training(changed(config, fields)) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        with pytest.raises(ConfigError, match=message):
            raise ConfigError(err)
    assert not Path(config.run_dir).exists()


def test_other_data_under_the_same_name_are_refused(tmp_path):
    catalogue = (("1", "one"), ("2", "two"))
    run.check_data(tmp_path, "qa", {"train": "aa", "validation": "bb"}, catalogue)
    run.check_data(tmp_path, "qa", {"train": "aa", "test": "cc"}, catalogue)  # a split that was not there before
    assert run.read_fingerprints(tmp_path) == {"train": "aa", "validation": "bb", "test": "cc"}
    assert run.read_catalogue(tmp_path) == catalogue
    before = (tmp_path / "data.json").read_bytes()
    with pytest.raises(ConfigError, match="the validation split is not the one .*fingerprint dd, was bb.: restore"):
        run.check_data(tmp_path, "qa", {"train": "aa", "validation": "dd"}, catalogue)
    with pytest.raises(ConfigError, match="was started with qa prompts, and its data now make recommendation ones"):
        run.check_data(tmp_path, "recommendation", {"train": "aa"}, catalogue)
    assert (tmp_path / "data.json").read_bytes() == before


def test_a_log_forgets_what_came_after_a_checkpoint(tmp_path):
    log = log_lib.MetricsLog(tmp_path, (), is_main=True)
    log.forget_after("rl", -1)  # there is none yet
    for stage, step in (("sft", 0), ("sft", 2), ("sft", 4), ("rl", 0), ("rl", 2), ("rl", 4)):
        log.write(stage, step, {"loss": step / 4})
    with log.path.open("a") as file:
        file.write('{"stage": "rl", "st')  # killed while writing
    assert [row["step"] for row in log.rows("rl")] == [0, 2, 4]
    log_lib.MetricsLog(tmp_path, (), is_main=False).forget_after("rl", 2)  # another host
    assert [row["step"] for row in log.rows("rl")] == [0, 2, 4]
    log.forget_after("rl", 2)
    log.write("rl", 4, {"loss": 5.0})
    assert log.rows("rl") == [{"stage": "rl", "step": s, "loss": x} for s, x in ((0, 0.0), (2, 0.5), (4, 5.0))]
    log.forget_after("rl", -1)
    assert [row["step"] for row in log.rows("sft")] == [0, 2, 4] and log.rows("rl") == []


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"[]",
        b'{"stage": "rl"}',
        b'{"stage": "rl", "step": "2"}',
        b"\xff",
        b"",
        b'{"stage": "rl", "step": 3, ',
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    """By all who read it; at its end a run does, too late to say so first."""
    log = log_lib.MetricsLog(tmp_path, (), is_main=True)
    log.write("rl", 2, {"loss": 1.0})
    log.path.write_bytes(log.path.read_bytes() + line + b"\n" + log.path.read_bytes())
    before = log.path.read_bytes()
    readers = (lambda: log.rows("sft"), lambda: log.forget_after("rl", 1), lambda: read_rows(log.path))
    for read in readers:
        with pytest.raises(ConfigError) as error:
            read()
        assert str(error.value).startswith(
            f"{log.path}, line 2, is not a row of metrics: {line!r}; copy the file again"
        )
    assert log.path.read_bytes() == before
