"""Builders: what comes out of raw files, what is refused, and that it is prepared once.

Tests on the real files run when FGRPO_DATA names a folder with lastfm/ and musique/ in it.
"""

import gzip
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from fgrpo_jax import datasets
from fgrpo_jax.config import DataConfig
from fgrpo_jax.datasets import DataError, lastfm, synthetic

RAW = os.environ.get("FGRPO_DATA", "")
real = pytest.mark.skipif(not RAW, reason="FGRPO_DATA does not name a folder of real raw files")


def load(name, folder, prepared, catalogue=None):
    return datasets.load(DataConfig(name=name, manual_dir=str(folder), prepared_dir=str(prepared)), catalogue)


def lengths(dataset):
    return {name: len(split) for name, split in dataset.splits.items()}


def ndcg5(score_BC, relevance_BC):
    """One relevant candidate each; ties count half."""
    gold = (score_BC * relevance_BC).sum(1, keepdims=True)
    rank = (score_BC > gold).sum(1) + ((score_BC == gold).sum(1) - 1) / 2
    return 100 * np.where(rank < 5, 1 / np.log2(rank + 2), 0).mean()


# ---------------------------------------------------------------------- synthetic


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    prepared = tmp_path_factory.mktemp("prepared")
    return datasets.load(DataConfig(prepared_dir=str(prepared))), prepared


def test_synthetic_has_the_documented_shape(world):
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


def test_synthetic_needs_the_history(world):
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
    taken = synthetic.sequences()
    assert all(len(set(row)) == synthetic.LENGTH for row in taken.tolist())
    for user, example in enumerate(world[0].splits["train"][3::4]):
        assert [int(i) for i, _ in (*example.history, *example.candidates)] == taken[user].tolist()


def test_a_data_set_is_prepared_once_and_its_pools_are_recorded(world):
    dataset, prepared = world
    files = {p: p.stat().st_mtime_ns for p in prepared.rglob("*")}
    again = datasets.load(DataConfig(prepared_dir=str(prepared)))
    assert {p: p.stat().st_mtime_ns for p in prepared.rglob("*")} == files
    assert again.fingerprints == dataset.fingerprints and set(again.fingerprints) == set(again.splits)
    (home,) = (prepared / "synthetic").iterdir()
    record = json.loads((home / "candidates.json").read_text())
    assert set(record) == {"validation", "test"}
    assert record["test"]["seed"] == synthetic.SEED and len(record["test"]["hash"]) == 64
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
    with pytest.raises(DataError, match="one of synthetic, lastfm, musique, jsonl"):
        datasets.load(DataConfig(name="netflix"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="set data.prepared_dir"):
        datasets.load(DataConfig(prepared_dir=str(tmp_path / "file")))


# ---------------------------------------------------------------------- lastfm

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


# ---------------------------------------------------------------------- musique


def question(name="2hop__1_2", n=4, **fields):
    paragraphs = [
        {"idx": i, "title": f"T{i}", "paragraph_text": f"text\n{i}", "is_supporting": i in (1, 3)}
        for i in range(n)
    ]
    return {"id": name, "question": "Who?", "paragraphs": paragraphs, "answer": "me", **fields}


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


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


@real
def test_real_musique(tmp_path):
    dataset = load("musique", Path(RAW) / "musique", tmp_path)
    assert lengths(dataset) == {"train": 111, "validation": 238}
    for split in dataset.splits.values():
        for example in split:
            assert len(example.candidates) in (19, 20)
            assert sum(example.relevance) == int(example.query_id[0])  # as many as hops


# ---------------------------------------------------------------------- jsonl


def item(n):
    return {"id": f"i{n}", "text": f"Item {n}"}


def ranking(query_id="q1", **fields):
    row = {"query_id": query_id, "query": "what?", "candidates": [item(0), item(1)], "relevance": [0, 2.5]}
    return {**row, **fields}


def test_jsonl_reads_what_its_documentation_shows(tmp_path):
    from fgrpo_jax.datasets import jsonl

    shown = jsonl.__doc__.split("A line:")[1].split("query_id    text")[0]
    lines(tmp_path / "test.jsonl", [" ".join(shown.split())])
    (example,) = load("jsonl", tmp_path, tmp_path / "prepared").splits["test"]
    assert example.query_id == "q17" and example.relevance == (0.0, 2.5)
    assert example.candidates == (("p1", "First passage."), ("p2", "Second."))
    assert example.history == (("p9", "Seen before."),)


def test_jsonl_kinds_splits_and_queries_without_a_relevant_candidate(tmp_path):
    lines(tmp_path / "train.jsonl", [ranking("a", relevance=[0, 0]), ranking("b")])
    lines(tmp_path / "validation.jsonl.gz", [ranking("a", query=" two\n words ")])
    dataset = load("jsonl", tmp_path, tmp_path / "prepared")
    assert dataset.kind == "qa" and set(dataset.splits) == {"train", "validation"}
    assert dataset.splits["train"].trainable == (False, True)
    assert dataset.splits["validation"][0].query == "two words"
    lines(tmp_path / "validation.jsonl.gz", [ranking("a", query="", history=[item(5)])])
    assert load("jsonl", tmp_path, tmp_path / "prepared").kind == "recommendation"


MALFORMED = [
    ("{", "not JSON"),
    ("", "the line is empty"),
    ("[" * 100_000, "not JSON"),
    ("[1]", "expected an object, found list"),
    ('{"query_id": "\\ud800"}', "not JSON"),
    ({"query_id": "q"}, "missing field(s) query, candidates, relevance"),
    (ranking(label=1), "unknown field(s) label"),
    (ranking(query_id=3), "query_id must be a text"),
    (ranking(query_id=" "), "query_id must be a text"),
    (ranking(query=None), "query must be a text"),
    (ranking(query=" "), "query is empty and there is no history"),
    (ranking(candidates={}), "candidates must be a list"),
    (ranking(candidates=[], relevance=[]), "candidates is empty"),
    (ranking(candidates=["a", "b"]), "candidates[0] must be an object with id and text"),
    (ranking(candidates=[item(0), {"id": "i1"}]), "candidates[1] must be an object with id and text"),
    (ranking(candidates=[item(0), {**item(1), "score": 1}]), "candidates[1] must be an object"),
    (ranking(candidates=[item(0), {"id": "i1", "text": "\t"}]), "candidates[1]: id and text must be texts"),
    (ranking(candidates=[item(0), {"id": 1, "text": "x"}]), "candidates[1]: id and text must be texts"),
    (ranking(candidates=[item(0), {"id": "i0", "text": "x"}]), "two candidates have the id 'i0'"),
    (ranking(candidates=[item(0), {"id": "x", "text": "Item  0"}]), "two candidates have the text 'Item 0'"),
    (ranking(history=[{}]), "history[0] must be an object"),
    (ranking(history=None), "history must be a list"),
    (ranking(relevance=1), "relevance must be a list"),
    (ranking(relevance=[1]), "relevance has 1 numbers for 2 candidates"),
    (ranking(relevance=[1, -0.5]), "relevance[1] is negative"),
    (ranking(relevance=[1, float("nan")]), "relevance[1] is nan, not finite"),
    (ranking(relevance=[float("inf"), 1]), "relevance[0] is inf, not finite"),
    (ranking(relevance=[True, 1]), "relevance[0] is not a number"),
    (ranking(relevance=["1", 1]), "relevance[0] is not a number"),
    (ranking(relevance=[10**400, 1]), "relevance[0] is above"),
    (ranking(query_id="first"), "query_id 'first' was already used in line 1"),
    (ranking(query=1, relevance=[1], candidates="x"), "query must be a text; candidates must be a list"),
]


def test_jsonl_reports_every_malformed_line_of_every_file(tmp_path):
    lines(tmp_path / "train.jsonl", [ranking("first"), *(row for row, _ in MALFORMED), ranking("last")])
    lines(tmp_path / "test.jsonl", ["{}"])
    with pytest.raises(DataError) as error:
        load("jsonl", tmp_path, tmp_path / "prepared")
    head, *reports = str(error.value).splitlines()
    assert head.startswith(f"{len(MALFORMED) + 1} malformed line(s), nothing was prepared")
    assert len(reports) == len(MALFORMED) + 1
    for number, (report, (_, reason)) in enumerate(zip(reports, MALFORMED, strict=False), 2):
        assert f"train.jsonl, line {number}: " in report and reason in report, report
    assert "test.jsonl, line 1: missing" in reports[-1]
    assert not list((tmp_path / "prepared" / "jsonl").iterdir())


@pytest.mark.parametrize(("content", "message"), [(b"", "the file is empty"), (b"\xff\xfe\n", "not JSON")])
def test_jsonl_refuses_empty_and_binary_files(tmp_path, content, message):
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load("jsonl", tmp_path, tmp_path / "prepared")
