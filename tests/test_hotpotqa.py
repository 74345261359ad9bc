"""HotpotQA's files: one long list, read a block at a time."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_files import RAW, real

from fgrpo_jax.config import DataConfig
from fgrpo_jax.data import datasets, hotpotqa
from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.types import Missed

FILE = "hotpot_dev_distractor_v1.json"


def question(name="5a8b", needed=("A", "C"), **fields):
    context = [[title, [f"First of {title}.", " And\nmore."]] for title in "ABCD"]
    facts = [[title, n] for title in needed for n in (0, 1)]
    return {"_id": name, "question": "Who\nis it?", "context": context, "supporting_facts": facts, **fields}


def load(folder, prepared):
    return datasets.load(DataConfig(name="hotpotqa", manual_dir=str(folder), prepared_dir=str(prepared)))


def test_it_reads_the_official_files(tmp_path):
    (tmp_path / "raw" / "below").mkdir(parents=True)
    (tmp_path / "raw" / "below" / "hotpot_train_v1.1.json").write_text(json.dumps([question("a"), question("b")]))
    packed = gzip.compress(json.dumps([question("c", needed=("B", "nowhere"))]).encode())
    (tmp_path / "raw" / f"{FILE}.gz").write_bytes(packed)
    (tmp_path / "raw" / "hotpot_dev_fullwiki_v1.json").write_text("another setting")
    dataset = load(tmp_path / "raw", tmp_path / "prepared")
    assert dataset.kind == "qa" and {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 2, "validation": 1
    }  # fmt: skip
    example = dataset.splits["validation"][0]
    assert (example.query_id, example.query, example.relevance) == ("c", "Who is it?", (0.0, 1.0, 0.0, 0.0))
    assert example.candidates[1] == ("B", "B: First of B. And more.")
    assert example.missed == (Missed("nowhere", 1.0),)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None)
@given(st.lists(JSON, max_size=6), st.sampled_from([None, 1]), st.integers(1, 40), st.booleans())
def test_a_list_is_read_alike_in_blocks_of_any_size(tmp_path_factory, rows, indent, block, ascii):
    path = tmp_path_factory.mktemp("blocks") / "list.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hotpotqa, "_BLOCK", block)
        assert list(hotpotqa._rows(path)) == rows


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "question 1: not a JSON list"),
        ("{}", "question 1: not a JSON list"),
        ("[", "question 1: not a JSON list"),
        ('[{"_id": 1', "question 1: not a JSON list"),
        (json.dumps([question()])[:-1], "question 2: not a JSON list"),
        (json.dumps([question()]) + "[]x", "there is more after its list of 1 questions"),
        (json.dumps([question()]) + "]", "there is more after its list of 1 questions"),
        ("[] []", "there is more after its list of 0 questions"),
        (json.dumps([question("a"), {}]), "question 2: not a HotpotQA question"),
        (json.dumps([question("a"), 7]), "question 2: not a HotpotQA question"),
        (json.dumps([question(context=[])]), "question 1: not a HotpotQA question"),
        (json.dumps([question(context=[["A", []]] * 2)]), "different titles"),
        (json.dumps([question(question=" ")]), "must be text"),
        (json.dumps([question(context=[["A", "no list", 3]])]), "question 1: not a HotpotQA question"),
    ],
)
def test_what_is_malformed_is_named(tmp_path, text, said):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DataError, match=f"{FILE}.*{said}"):
        load(tmp_path, tmp_path / "prepared")
    assert not list((tmp_path / "prepared").rglob("*.json"))


def test_what_is_no_json_is_given_up_before_the_file_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(hotpotqa, "_LONGEST", 100)
    monkeypatch.setattr(hotpotqa, "_BLOCK", 10)
    (tmp_path / "list.json").write_text('[{"a" 1}' + " " * 1000 + "\xff")
    with pytest.raises(DataError, match="question 1: not a JSON list"):
        list(hotpotqa._rows(tmp_path / "list.json"))


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / FILE).write_bytes(b'[{"_id": "\xff"}]')
    with pytest.raises(DataError, match=f"{FILE}: not UTF-8"):
        load(tmp_path, tmp_path / "prepared")


@real
def test_real_hotpotqa(tmp_path):
    dataset = load(Path(RAW) / "hotpotqa", tmp_path)
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 220, "validation": 296}
    for split in dataset.splits.values():
        assert all(sum(example.relevance) == 2 and not example.missed for example in split)
