"""`python -m fgrpo_jax.data check`: what it prints of each kind of data set, and what it refuses."""

import json
import re

import pytest
from bpe import train_bpe
from test_interactions import logs
from test_ir import collection
from tiny import changed, config_file, run_training, tiny_config, write_world

from fgrpo_jax import policies
from fgrpo_jax.config import Config
from fgrpo_jax.config_files import load_file
from fgrpo_jax.data import datasets
from fgrpo_jax.data.batches import make_batches
from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.policies.llm import encode, prompts
from fgrpo_jax.policies.ranker.config import RankerConfig
from fgrpo_jax.run import data_check


def check(capsys, *flags):
    code = data_check.main(["check", *map(str, flags)])
    out, err = capsys.readouterr()
    return code, out, err


def flags(folder, name, *more):
    here = ("--data.manual-dir", folder, "--data.prepared-dir", folder / "prepared", "--data.name", name)
    return (*here, "--tokenizer", "catalogue", "--data.prompt-buckets", "auto", *more)


def test_interactions(tmp_path, capsys):
    logs(tmp_path, users=24, time=lambda u, n: n // 2)
    code, out, err = check(capsys, *flags(tmp_path, "interactions", "--data.interactions.text", "text", "genre"))
    assert code == 0 and not err
    assert "note: 96 of 168 neighbours of a user (57.1%) have equal times" in out
    table = [line.split() for line in out.splitlines() if line.startswith(("train", "validation", "test"))]
    assert [row[:4] for row in table] == [
        ["train", "120", "1", "1"],
        ["validation", "24", "20", "1"],
        ["test", "24", "20", "1"],
    ]
    assert [row[-1] for row in table] == ["1-3-5", "6", "7"]
    assert re.search(r"^covisitation +\d+\.\d +\d+\.\d +\d+\.\d$", out, re.M)
    assert "retrieval: no first stage has scored these pools" in out
    assert "suspicions\ntime: 96 of 168 neighbours" in out
    assert (
        "half up to 27, nine tenths up to 29, the longest that may occur 34" in out
        and "--data.prompt-buckets 32 40" in out
    )


def test_ir(tmp_path, capsys):
    collection(tmp_path)
    small = (
        "--transcript.slate-min",
        1,
        "--transcript.rank-min",
        1,
        "--transcript.slate-max",
        4,
        "--transcript.rank-max",
        4,
    )
    code, out, err = check(capsys, *flags(tmp_path, "ir", "--data.pool-size", 4, *small))
    assert code == 2 and "the tokenizer has no token for 'Question: " in err  # questions are no catalogue
    assert "note: train: 0 of 4 pools hold nothing relevant; of 20 relevant documents 4 are missed" in out
    assert "covisitation: needs items shared between queries" in out and "2 queries of validation, percent" in out
    assert re.search(r"^train +4 +4 +4 +0\.0% +20\.0% +0$", out, re.M)


@pytest.mark.parametrize("system", [Config, RankerConfig])
def test_prompts_are_those_of_the_policy(tmp_path, capsys, system):
    write_world(tmp_path)
    config = tiny_config(tmp_path, tmp_path / "prepared", tmp_path / "run", sft_steps=2)
    if system is RankerConfig:
        config = RankerConfig(data=config.data)
    code, out, err = check(capsys, config_file(config, tmp_path / "config.py"))
    assert code == 0 and not err
    if system is RankerConfig:
        assert out.splitlines()[-3] == "a ranker reads items, not text: there are none"
        return
    dataset = datasets.load(config.data)
    seen = policies.preview(config, dataset, 3)
    assert "identifiers: up to 1 token\n" in out
    assert policies.preview(changed(config, {"tokenizer": "words"}), dataset, 3).widest == 2  # item a
    for example, (prompt, transcript) in zip(
        make_batches(dataset, config, "preview", config.sft).batch_at(0), seen.shown
    ):
        assert prompt == prompts.render(example, "recommendation", dataset.instruction, "text", "<SLATE>")
        assert f"{prompt}\n--- its target, with fill: {transcript}" in out
        slate, ranking = transcript.removesuffix("</RANK>").split("</SLATE><RANK>")
        gains = dict(zip([text for _, text in example.candidates], example.relevance))
        ranked = [gains[text] for text in ranking.split(" | ")]
        assert set(ranking.split(" | ")) <= set(slate.split(" | ")) <= set(gains) and len(slate.split(" | ")) == 3
        assert ranked == sorted(gains.values(), reverse=True)[:2]


def test_texts_that_are_cut_are_counted(tmp_path, capsys):
    write_world(tmp_path)
    train_bpe(["item", "Candidates:"], 300).save_pretrained(tmp_path / "tokenizer")
    fields = {
        "tokenizer": str(tmp_path / "tokenizer"),
        "transcript.identifier": "index",
        "transcript.separator": ">",
        "prompt.text_tokens": 1,
    }
    config = changed(tiny_config(tmp_path, tmp_path / "prepared", tmp_path / "run", sft_steps=2), fields)
    code, out, _ = check(capsys, config_file(config, tmp_path / "config.py"))
    dataset = datasets.load(config.data)
    texts = {text for split in dataset.splits.values() for e in split for _, text in (*e.candidates, *e.history)}
    assert code == 0 and f"texts: {len(texts)} of {len(texts)} are cut to prompt.text_tokens=1\n" in out
    assert "\n[1] item\n[2] item\n" in out  # of "item a", of which "item" is a token
    config = changed(config, {"prompt.text_tokens": 3})
    seen = policies.preview(config, dataset, 3)
    assert (seen.cut, seen.of) == (0, len(texts))


def test_a_name_that_would_widen_every_transcript_is_refused(tmp_path, monkeypatch):
    write_world(tmp_path)
    config = changed(tiny_config(tmp_path, tmp_path / "prepared", tmp_path / "run"), {"tokenizer": "words"})
    monkeypatch.setattr(encode, "LONGEST_NAME", 1)
    with pytest.raises(
        DataError, match="the text of candidate '.*', which names it, has 2 tokens, more than 1: shorten"
    ):
        policies.preview(config, datasets.load(config.data), 3)


def test_names_that_are_the_same_are_refused_before_anything_is_trained(tmp_path, capsys):
    """In whatever split: not when that is evaluated, after the training."""
    write_world(tmp_path)
    with (tmp_path / "test.jsonl").open("r+") as file:
        *lines, last = file.readlines()
        row = json.loads(last)
        row["candidates"][2]["text"] = row["candidates"][0]["text"]
        file.seek(0)
        file.writelines([*lines, json.dumps(row) + "\n"])
        file.truncate()
    config = tiny_config(tmp_path, tmp_path / "prepared", tmp_path / "run", sft_steps=2)
    first, second = row["candidates"][0]["id"], row["candidates"][2]["id"]
    told = f"split 'test', query 'test-8': candidates '{first}' and '{second}' have the same text"
    code, _, err = check(capsys, config_file(config, tmp_path / "config.py"))
    assert code == 2 and told in err
    assert run_training(config) == 2 and told in capsys.readouterr().err
    assert not (tmp_path / "run" / "sft").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "error: give the command: python -m fgrpo_jax.data check"),
        (["look"], "error: give the command: python -m fgrpo_jax.data check"),
        (["check", "nowhere.py"], "error: no config file at nowhere.py"),
        (["check", "--data.name", "ir"], "data.name='ir' reads files: set data.manual_dir"),
        (["check", "--data.name", "ir", "--data.manual-dir", "/nowhere"], "data.manual_dir=/nowhere is not a folder"),
        (["check", "--data.interactions.targets", "2"], "data.name='synthetic' does not read it"),
    ],
)
def test_what_is_refused(arguments, message, capsys):
    assert data_check.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_rest_of_a_configuration_does_not_matter(tmp_path, capsys):
    """Steps, batches and the like are for training to refuse."""
    write_world(tmp_path)
    config = tiny_config(tmp_path, tmp_path / "prepared", tmp_path / "run")
    path = config_file(changed(config, {"rl.group_size": 1, "sft.steps": 0, "rl.steps": 0}), tmp_path / "config.py")
    assert load_file(path).rl.steps == 0
    assert check(capsys, path)[0] == 0


def test_data_without_a_training_split(tmp_path, capsys):
    """Are looked at as they would be evaluated."""
    write_world(tmp_path)
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").unlink()
    code, out, err = check(capsys, *flags(tmp_path, "jsonl"))
    assert code == 0 and not err and "--data.prompt-buckets" in out
