"""What all builders share, and two without a catalogue to read: next_item and musique."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from raw_files import RAW, lengths, lines, load, real

from fgrpo_jax.config import DataConfig
from fgrpo_jax.data import datasets, next_item, raw_files
from fgrpo_jax.data.datasets import DataError


def ndcg5(score_BC, relevance_BC):
    """One relevant candidate each; ties count half."""
    gold = (score_BC * relevance_BC).sum(1, keepdims=True)
    rank = (score_BC > gold).sum(1) + ((score_BC == gold).sum(1) - 1) / 2
    return 100 * np.where(rank < 5, 1 / np.log2(rank + 2), 0).mean()


# ---------------------------------------------------------------------- next_item


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    prepared = tmp_path_factory.mktemp("prepared")
    return datasets.load(DataConfig(name="next_item", prepared_dir=str(prepared))), prepared


def test_next_item_has_the_documented_shape(world):
    dataset, _ = world
    assert (dataset.kind, dataset.sampled_negatives) == ("recommendation", True)
    assert len(dict(dataset.catalogue)) == len({text for _, text in dataset.catalogue}) == 500
    assert lengths(dataset) == {"train": 16_000, "validation": 1_000, "test": 1_000}
    row = dataset.splits["train"][5]
    assert row.query_id == "train-00001-1" and len(row.history) == 8 and row.relevance == (1.0,)
    known = set(dataset.catalogue)
    for example in dataset.splits["test"]:
        assert len(set(example.candidates)) == 20 and sum(example.relevance) == 1
        assert set(example.candidates) | set(example.history) <= known
        assert not set(example.candidates) & set(example.history)
    positions = [example.relevance.index(1.0) for example in dataset.splits["test"]]
    assert np.bincount(positions, minlength=20).min() > 25  # the frozen order says nothing


def test_next_item_needs_the_history(world):
    """Popularity beats random (14.7), and is far below what the history gives."""
    dataset, _ = world
    train = [[int(i) for i, _ in (*e.history, *e.candidates)] for e in dataset.splits["train"][3::4]]
    counts = np.zeros(500)
    together = np.zeros((500, 500))
    for items in train:
        counts[items] += 1
        together[np.ix_(items, items)] += 1
    cosine = together / np.sqrt(np.outer(counts, counts))
    test = list(dataset.splits["test"])
    pool_BC = np.array([[int(i) for i, _ in e.candidates] for e in test])
    history_BH = np.array([[int(i) for i, _ in e.history] for e in test])
    relevance_BC = np.array([e.relevance for e in test])
    popularity = ndcg5(counts[pool_BC], relevance_BC)
    covisitation = ndcg5(cosine[history_BH[:, :, None], pool_BC[:, None]].sum(1), relevance_BC)
    assert 25 < popularity < 42, popularity
    assert covisitation > popularity + 30, (popularity, covisitation)


def test_the_world_does_not_depend_on_global_random_state(world):
    np.random.seed(2)
    taken = next_item.sequences()
    assert all(len(set(row)) == next_item.LENGTH for row in taken.tolist())
    for user, example in enumerate(world[0].splits["train"][3::4]):
        assert [int(i) for i, _ in (*example.history, *example.candidates)] == taken[user].tolist()


def test_a_data_set_is_prepared_once_and_its_pools_are_recorded(world):
    dataset, prepared = world
    files = {p: p.stat().st_mtime_ns for p in prepared.rglob("*")}
    again = datasets.load(DataConfig(name="next_item", prepared_dir=str(prepared)))
    assert {p: p.stat().st_mtime_ns for p in prepared.rglob("*")} == files
    assert again.fingerprints == dataset.fingerprints and set(again.fingerprints) == set(again.splits)
    (home,) = (prepared / "next_item").iterdir()
    record = json.loads((home / "candidates.json").read_text())
    assert set(record) == {"validation", "test"}
    assert record["test"]["seed"] == next_item.SEED and len(record["test"]["hash"]) == 64
    assert "uniform" in record["test"]["negatives"]
    example = dataset.splits["test"][17]
    assert record["test"]["pools"][example.query_id] == [i for i, _ in example.candidates]
    assert again.splits["test"][17] == example


def test_splits_read_like_lists(world):
    split = world[0].splits["validation"]
    rows = list(split)
    assert len(rows) == len(split) == 1000 and split[-1] == rows[999] and split[3:9:2] == rows[3:9:2]
    assert split.rows([5, 3, 5]) == [rows[5], rows[3], rows[5]]
    assert tuple(row.query_id for row in rows) == split.query_ids
    with pytest.raises(IndexError):
        split[1000]


def test_unknown_names_and_unwritable_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="one of synthetic, next_item, lastfm, musique, hotpotqa, jsonl"):
        datasets.load(DataConfig(name="netflix"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="set data.prepared_dir"):
        datasets.load(DataConfig(name="next_item", prepared_dir=str(tmp_path / "file")))


def damage_rows(home):
    for path in home.rglob("*test*record*"):
        path.write_bytes(path.read_bytes()[:100])


def empty_meta(home):
    (home / "meta.json").write_text("")


def lose_features(home):
    next(home.rglob("features.json")).unlink()


@pytest.mark.parametrize("harm", [damage_rows, empty_meta, lose_features])
def test_prepared_data_that_are_damaged_are_named(world, tmp_path, harm):
    shutil.copytree(world[1], tmp_path / "prepared")
    (home,) = (tmp_path / "prepared" / "next_item").iterdir()
    harm(home)
    message = f"prepared data in {home} are damaged or gone .*: remove what is left of that folder, and give the same"
    with pytest.raises(DataError, match=message) as error:
        list(datasets.load(DataConfig(name="next_item", prepared_dir=str(tmp_path / "prepared"))).splits["test"])
    assert "\n" not in str(error.value)


def test_prepared_data_for_which_there_is_no_room(tmp_path, monkeypatch):
    def refuse(self, **options):
        raise RuntimeError("write() failed: No space left on device; writing /somewhere")  # as array_record does

    monkeypatch.setattr(next_item.NextItem, "download_and_prepare", refuse)
    with pytest.raises(DataError, match="cannot write to .*next_item .No space left on device.: set data.prepared_dir"):
        datasets.load(DataConfig(name="next_item", prepared_dir=str(tmp_path)))
    assert not list((tmp_path / "next_item").iterdir())


# ---------------------------------------------------------------------- musique


def question(name="2hop__1_2", n=4, **fields):
    paragraphs = [
        {"idx": i, "title": f"T{i}", "paragraph_text": f"text\n{i}", "is_supporting": i in (1, 3)} for i in range(n)
    ]
    return {"id": name, "question": "Who?", "paragraphs": paragraphs, "answer": "me", **fields}


def test_musique_reads_the_official_files(tmp_path):
    raw = tmp_path / "raw"
    lines(raw / "data" / "musique_ans_v1.0_train.jsonl", [question("a"), question("b")])
    lines(raw / "musique_ans_v1.0_dev.sample1.jsonl.gz", [question("c")])
    lines(raw / "musique_ans_v1.0_dev.all_questions_without_paragraphs.jsonl", [{"id": "d"}])
    unlabelled = question("e")
    for paragraph in unlabelled["paragraphs"]:
        del paragraph["is_supporting"]
    lines(raw / "musique_ans_v1.0_test.jsonl", [unlabelled])
    dataset = load("musique", raw, tmp_path / "prepared")
    assert (dataset.kind, dataset.catalogue, dataset.sampled_negatives) == ("qa", (), False)
    assert lengths(dataset) == {"train": 2, "validation": 1}
    example = dataset.splits["validation"][0]
    assert (example.query_id, example.query, example.relevance) == ("c", "Who?", (0.0, 1.0, 0.0, 1.0))
    assert example.candidates[1] == ("1", "T1: text 1")
    lines(raw / "musique_ans_v1.0_test.jsonl", [question("e")])
    assert len(load("musique", raw, tmp_path / "prepared").splits["test"]) == 1


@pytest.mark.parametrize(
    "row",
    [
        "{",
        {"id": "x", "question": "Who?"},
        question(question=""),
        question(paragraphs=[]),
        question(paragraphs=[{"idx": 0, "title": "T", "paragraph_text": "t"}]),
        question(paragraphs=question()["paragraphs"] * 2),
    ],
)
def test_musique_names_the_malformed_line(tmp_path, row):
    lines(tmp_path / "musique_ans_v1.0_dev.jsonl", [question("a"), row])
    with pytest.raises(DataError, match="musique_ans_v1.0_dev.jsonl, line 2: not a MuSiQue question"):
        load("musique", tmp_path, tmp_path / "prepared")


def test_query_ids_must_be_unique(tmp_path):
    lines(tmp_path / "musique_ans_v1.0_dev.jsonl", [question("a"), question("a")])
    with pytest.raises(DataError, match="query ids of split 'validation' are not unique"):
        load("musique", tmp_path, tmp_path / "prepared")


@pytest.mark.parametrize("name", ["lastfm", "musique", "jsonl"])
@pytest.mark.parametrize("harm", ["truncated", "plain", "flipped"])
def test_a_gz_that_is_none_or_is_damaged_is_named(tmp_path, name, harm):
    """The last two bytes gone, never compressed, a byte turned over: one line, whatever the data set."""
    file = tmp_path / "raw" / {
        "lastfm": "train_data.jsonl.gz", "musique": "musique_ans_v1.0_dev.jsonl.gz", "jsonl": "train.jsonl.gz"
    }[name]  # fmt: skip
    lines(file, [question(f"q{n}") for n in range(50)])
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes({
        "truncated": whole[:-2],
        "plain": gzip.decompress(whole),
        "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
    }[harm])  # fmt: skip
    with pytest.raises(DataError) as error:
        load(name, tmp_path / "raw", tmp_path / "prepared")
    message = str(error.value)
    assert message.startswith(f"{file} is truncated, damaged or not compressed (") and "\n" not in message
    assert message.endswith("copy it again, or take .gz off the name of a plain file")
    assert not list((tmp_path / "prepared").rglob("*"))


def test_a_raw_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match="gone.jsonl cannot be read .No such file or directory.: restore it"):
        list(raw_files.numbered_lines(tmp_path / "gone.jsonl"))


@real
def test_real_musique(tmp_path):
    dataset = load("musique", Path(RAW) / "musique", tmp_path)
    assert lengths(dataset) == {"train": 111, "validation": 238}
    for split in dataset.splits.values():
        for example in split:
            assert len(example.candidates) in (19, 20)
            assert sum(example.relevance) == int(example.query_id[0])  # as many as hops
