"""lastfm: LLaRA's rows, S-DPO's pools, and what is refused."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from raw_files import RAW, lengths, load, real

from fgrpo_jax.data import lastfm
from fgrpo_jax.data.datasets import DataError

N = 60
NAMES = [f"Artist {n}" for n in range(N - 2)] + ["Florence + the Machine", "+44"]
SPOKEN = {new: old for old, new in lastfm.ALIASES.items()}  # as S-DPO's files write them


def steps(sequences):
    """LLaRA's rows of whole sequences."""
    for sequence in sequences:
        for n, answer in enumerate(sequence):
            history = sequence[:n][-10:]
            padded = history + [N] * (10 - len(history))
            yield {"seq": padded, "len_seq": max(1, len(history)), "next": answer}


def sdpo(rows):
    """S-DPO's file of LLaRA's rows, by the recipe as it is published: the global `random`."""
    for row in rows:
        history, answer = [i for i in row["seq"] if i != N], row["next"]
        if len(history) < 3:
            continue
        pool = [i for i in range(N) if i not in history and i != answer]
        random.seed(answer)
        pool = random.sample(pool, 19) + [answer]
        random.seed(answer)
        random.shuffle(pool)
        say = [SPOKEN.get(name, name) for name in NAMES]
        yield {
            "historyList": "::".join(say[i] for i in history),
            "itemList": [say[i] for i in pool],
            "trueSelection": say[answer],
        }


@pytest.fixture
def raw(tmp_path):
    """Raw LastFM files: train and validation rows, and the catalogue."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "raw" / "lastfm" / "llara-sdpo"
    folder.mkdir(parents=True)
    text = "".join(f"{i}::{name}\n" for i, name in enumerate(NAMES))
    (folder / "id2name.txt").write_text(text, encoding="utf-8")
    for short, count in (("train", 6), ("val", 4)):
        sequences = [rng.permutation(N)[: rng.integers(2, 16)].tolist() for _ in range(count)]
        rows = list(steps([*sequences, [59, 58, 57, 56, 55]]))
        (folder / f"{short}_data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{short}.rows").write_text(json.dumps(rows))
    return folder


def write_pools(path, rows):
    data = json.dumps(list(rows)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def rows_of(folder, short):
    return json.loads((folder / f"{short}.rows").read_text())


def test_lastfm_training_rows_know_their_sequence(raw, tmp_path):
    dataset = load("lastfm", tmp_path / "raw", tmp_path / "prepared")
    rows = [row for row in rows_of(raw, "train") if sum(i != N for i in row["seq"]) >= 3]
    assert len(dataset.splits["train"]) == len(rows) > 20
    sequence, ids = -1, []
    for number, (row, example) in enumerate(zip(rows, dataset.splits["train"], strict=True)):
        sequence += sum(i != N for i in row["seq"]) == 3  # every sequence shows length 3 once
        ids.append(f"train-{sequence:05d}-{number:06d}")
        assert [int(i) for i, _ in example.history] == [i for i in row["seq"] if i != N]
        assert example.candidates == ((str(row["next"]), NAMES[row["next"]]),) and example.relevance == (1.0,)
    assert list(dataset.splits["train"].query_ids) == ids


def test_lastfm_pools_are_the_same_from_the_rows_and_from_the_file(raw, tmp_path):
    by_recipe = load("lastfm", tmp_path / "raw", tmp_path / "prepared")
    write_pools(raw / "lastfm-val.json.gz", sdpo(rows_of(raw, "val")))
    by_file = load("lastfm", tmp_path / "raw", tmp_path / "prepared")
    assert list(by_recipe.splits["validation"]) == list(by_file.splits["validation"])
    assert by_recipe.fingerprints == by_file.fingerprints
    example = by_file.splits["validation"][0]
    assert example.query_id == "val-000000" and len(example.candidates) == 20 and sum(example.relevance) == 1


def test_lastfm_test_file_alone_is_read_with_the_catalogue_of_a_run(raw, tmp_path):
    trained = load("lastfm", tmp_path / "raw", tmp_path / "prepared")
    hidden = tmp_path / "hidden"
    write_pools(hidden / "deep" / "lastfm-test.json.gz", sdpo(rows_of(raw, "val")))
    alone = load("lastfm", hidden, tmp_path / "prepared", trained.catalogue)
    assert set(alone.splits) == {"test"} and alone.splits["test"].query_ids[1] == "test-000001"
    same = [(e.candidates, e.relevance, e.history) for e in trained.splits["validation"]]
    assert [(e.candidates, e.relevance, e.history) for e in alone.splits["test"]] == same
    with pytest.raises(DataError, match="no id2name.txt"):
        load("lastfm", hidden, tmp_path / "prepared")
    (hidden / "id2name.txt").write_text("".join(f"{i}::{name}\n" for i, name in enumerate(NAMES[::-1])))
    with pytest.raises(DataError, match="not the catalogue this run was trained with"):
        load("lastfm", hidden, tmp_path / "prepared", trained.catalogue)


def test_lastfm_test_rows_are_given_pools(raw, tmp_path):
    (raw / "val_data.jsonl").rename(raw / "Test_data.jsonl")
    dataset = load("lastfm", tmp_path / "raw", tmp_path / "prepared")
    assert set(dataset.splits) == {"train", "test"}
    for example in dataset.splits["test"]:
        answer = example.candidates[example.relevance.index(1.0)]
        history = [int(i) for i, _ in example.history]
        assert tuple(int(i) for i, _ in example.candidates) == lastfm.sdpo_pool(history, int(answer[0]), N)


def test_files_without_queries_are_refused(raw, tmp_path):
    write_pools(raw / "lastfm-val.json", [])
    with pytest.raises(DataError, match="lastfm-val.json: there are no queries in it"):
        load("lastfm", tmp_path / "raw", tmp_path / "prepared")


def _change(**fields):
    return lambda row: {**row, **fields}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change(historyList="Artist 1::Nobody"), r"row 1: artist 'Nobody' is not in the catalogue"),
        (_change(trueSelection="Artist  x"), r"row 1: artist 'Artist  x' is not"),
        (_change(itemList=["Artist 1", 7]), r"row 1: artist 7 is not in the catalogue"),
        (_change(itemList=["Artist 1", "Artist 1"]), "no artist twice"),
        (_change(itemList="Artist 1"), "row 1: itemList is not a list"),
        (_change(historyList=["Artist 1"]), "row 1: not an object with historyList"),
        (lambda row: "Artist 1", "row 1: not an object with historyList"),
        (lambda row: {k: v for k, v in row.items() if k != "trueSelection"}, "row 1: .*trueSelection"),
    ],
)
def test_lastfm_refuses_malformed_pools(raw, tmp_path, change, message):
    rows = list(sdpo(rows_of(raw, "val")))
    rows[1] = change(rows[1])
    write_pools(raw / "lastfm-test.json", rows)
    with pytest.raises(DataError, match=message) as error:
        load("lastfm", tmp_path / "raw", tmp_path / "prepared")
    assert "lastfm-test.json" in str(error.value)
    assert not list((tmp_path / "prepared" / "lastfm").iterdir())  # nothing half-prepared


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"seq": [60], "next": 1}',
        '{"seq": [60, 1], "len_seq": 1, "next": 2}',
        '{"seq": [1, 2, 60], "len_seq": 3, "next": 3}',
        '{"seq": [1, 2, 60], "len_seq": 2, "next": 61}',
        '{"seq": [1, 2, 60], "len_seq": 2, "next": 2}',
        '{"seq": [1, -2, 60], "len_seq": 2, "next": 5}',
        '{"seq": [1, "2", 60], "len_seq": 2, "next": 5}',
    ],
)
def test_lastfm_refuses_malformed_rows(raw, tmp_path, line):
    path = raw / "train_data.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=rf"train_data.jsonl, line {len(path.read_text().splitlines())}: "):
        load("lastfm", tmp_path / "raw", tmp_path / "prepared")


@pytest.mark.parametrize("line", ["61::Skipped", "60:One colon", "60::", "60::Artist 3", ""])
def test_lastfm_refuses_a_malformed_catalogue(raw, tmp_path, line):
    path = raw / "id2name.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match="id2name.txt, line 61"):
        load("lastfm", tmp_path / "raw", tmp_path / "prepared")


def test_missing_and_doubtful_files_are_refused(raw, tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        load("lastfm", tmp_path / "nowhere", tmp_path / "prepared")
    with pytest.raises(DataError, match="data.manual_dir is not set"):
        load("lastfm", "", tmp_path / "prepared")
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("lastfm", "musique", "jsonl"):
        with pytest.raises(DataError, match="expected|holds none"):
            load(name, empty, tmp_path / "prepared")
    text = (raw / "train_data.jsonl").read_bytes()
    (raw / "train_data.jsonl.gz").write_bytes(gzip.compress(text))
    load("lastfm", tmp_path / "raw", tmp_path / "prepared")  # the same twice is one
    (raw / "train_data.jsonl.gz").write_bytes(gzip.compress(text + b"\n"))
    with pytest.raises(DataError, match="several different files"):
        load("lastfm", tmp_path / "raw", tmp_path / "prepared")


@real
def test_real_lastfm(tmp_path):
    """The recipe gives back all 2,767 pools of S-DPO's validation file."""
    folder = Path(RAW) / "lastfm" / "llara-sdpo"
    items = lastfm.read_catalogue(folder / "id2name.txt")
    position = {text: n for n, (_, text) in enumerate(items)}
    published = list(lastfm.read_pools(folder / "lastfm-val.json.gz", position))
    steps = lastfm.read_steps(folder / "val_data.jsonl.gz", len(items))
    remade = [
        row._replace(pool=lastfm.sdpo_pool(row.history, row.answer, len(items)))
        for row in steps
        if len(row.history) >= 3
    ]
    assert len(remade) == 2767 and remade == published
    dataset = load("lastfm", Path(RAW) / "lastfm", tmp_path)
    assert lengths(dataset) == {"train": 47872, "validation": 2767}
    sequences = {query_id.rpartition("-")[0] for query_id in dataset.splits["train"].query_ids}
    rows = lastfm.read_steps(folder / "train_data.jsonl.gz", len(items))
    assert len(sequences) == sum(len(row.history) == 3 for row in rows)
