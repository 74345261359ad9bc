"""ir: collections of BEIR and TREC, pools by BM25 or a run, and every way to be wrong."""

import functools
import json

import numpy as np
import pytest
from raw_files import lengths, lines, refused_in_one_line

from fgrpo_jax.config import DataConfig, IrConfig
from fgrpo_jax.data import datasets, trec
from fgrpo_jax.data.bm25 import Bm25
from fgrpo_jax.evaluation.baselines import BASELINES

COLOURS = "red blue green black white brown pink grey".split()
ANIMALS = "fox cat dog hen owl".split()


def documents():
    """40 documents, a colour and an animal each; the last has no text."""
    rows = [
        {"_id": f"d{i}", "title": f"T{i}", "text": f"the {COLOURS[i % 8]} {ANIMALS[i % 5]} sleeps\n{i}"}
        for i in range(40)
    ]
    return [*rows, {"_id": "empty", "title": "", "text": ""}]


def collection(folder):
    lines(folder / "corpus.jsonl", documents())
    lines(folder / "queries.jsonl", [{"_id": f"q{i}", "text": f"{COLOURS[i]} {ANIMALS[i % 5]}?"} for i in range(8)])
    (folder / "qrels").mkdir(exist_ok=True)
    for split, queries in (("train", range(4)), ("dev", range(4, 6)), ("test", range(6, 8))):
        rows = [f"q{q}\td{i}\t{1 + (i == q)}" for q in queries for i in range(40) if i % 8 == q]
        rows += [f"q{q}\td39\t0" for q in queries]  # of no query's colour but the last
        rows = [row for row in rows if row != "q7\td39\t0"]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(rows) + "\n")


def load(folder, prepared=None, pool_size=5, pool="open", **fields):
    place = {"manual_dir": str(folder), "prepared_dir": str(prepared or folder / "prepared")}
    return datasets.load(DataConfig(name="ir", pool_size=pool_size, pool=pool, ir=IrConfig(**fields), **place))


def relevant(example):
    return {item: gain for (item, _), gain in zip(example.candidates, example.relevance) if gain}


def retrieved(example):
    """Documents by their score, as BM25 and runs order them."""
    return [example.candidates[i][0] for i in np.argsort(-np.array(example.retrieval), kind="stable")]


def notes(dataset):
    return "\n".join(note.text for note in dataset.notes)


# ---------------------------------------------------------------------- pools


def test_pools_are_the_best_by_bm25_of_the_corpus_and_the_rest_is_missed(tmp_path):
    collection(tmp_path)
    dataset = load(tmp_path, pool_size=4)
    assert (dataset.kind, dataset.sampled_negatives, lengths(dataset)) == (
        "qa", False, {"train": 4, "validation": 2, "test": 2}
    )  # fmt: skip
    texts = {row["_id"]: f"{row['title']}: {' '.join(row['text'].split())}" for row in documents()[:-1]}
    index, names = Bm25(list(texts.values())), list(texts)
    missed = 0
    for split in dataset.splits.values():
        for e in split:
            q = int(e.query_id[1:])
            score = dict(zip(names, index.scores(e.query)))
            best = sorted(names, key=lambda name: -score[name])[:4]  # stable: ties in the order of the corpus
            assert {name for name, _ in e.candidates} == set(best) and all(texts[i] == t for i, t in e.candidates)
            np.testing.assert_allclose(e.retrieval, [score[name] for name, _ in e.candidates], rtol=1e-6)
            gains = {f"d{i}": 1.0 + (i == q) for i in range(40) if i % 8 == q}
            assert relevant(e) | {lost.item: lost.gain for lost in e.missed} == gains
            assert not {lost.item for lost in e.missed} & set(best)
            missed += len(e.missed)
    assert missed and "test: 0 of 2 pools hold nothing relevant; of 10 relevant documents" in notes(dataset)
    assert "1 of 41 documents have no text, and are in no pool" in notes(dataset)


def test_closed_pools_hold_every_relevant_document(tmp_path):
    collection(tmp_path)
    opened, closed = load(tmp_path, pool_size=8), load(tmp_path, pool_size=8, pool="closed")
    for whole, forced in zip(opened.splits["test"], closed.splits["test"], strict=True):
        assert not forced.missed and len(relevant(forced)) == 5 and len(forced.candidates) == 8
        scores = dict(zip((i for i, _ in whole.candidates), whole.retrieval))
        mine = dict(zip((i for i, _ in forced.candidates), forced.retrieval))
        assert all(mine[i] == scores[i] for i in mine.keys() & scores.keys())


def test_bm25_finds_the_best_with_ties_in_their_order():
    index = Bm25(["a b", "c", "a b", "a", "d"])
    best, score = index.search("a b", 3)
    assert best.tolist()[:2] == [0, 2] and score[0] == score[2] > score[3] > score[1] == 0
    assert index.search("nothing", 2)[0].tolist() == [0, 1] and index.search("a", 9)[0].tolist()[-2:] == [1, 4]
    assert Bm25(["", "?"]).scores("a").tolist() == [0, 0]


def run_lines(queries=range(8), size=6):
    """Document (5 q + n) at rank n + 1."""
    return [f"q{q} Q0 d{(5 * q + n) % 40} {n + 1} {10 - n}.5 mine" for q in queries for n in range(size)]


def test_pools_of_a_run_are_its_best_by_rank(tmp_path):
    collection(tmp_path)
    rows = run_lines()
    lines(tmp_path / "mine.trec", rows[::-1])  # in any order of lines
    dataset = load(tmp_path, first_stage="run", run_file="mine.trec", pool_size=4)
    for e in dataset.splits["train"]:
        q = int(e.query_id[1:])
        assert retrieved(e) == [f"d{(5 * q + n) % 40}" for n in range(4)] and sorted(e.retrieval) == [
            7.5,
            8.5,
            9.5,
            10.5,
        ]
    (scores,) = BASELINES["retrieval"]([], (), "qa", 0)(dataset.splits["train"][:1])
    assert scores.argmax() == [i for i, _ in dataset.splits["train"][0].candidates].index("d0")
    closed = load(tmp_path, first_stage="run", run_file="mine.trec", pool_size=6, pool="closed")
    for e in closed.splits["train"]:
        inserted = set(relevant(e)) - {f"d{(5 * int(e.query_id[1:]) + n) % 40}" for n in range(6)}
        assert inserted and all(e.retrieval[[i for i, _ in e.candidates].index(item)] == 4.5 for item in inserted)
    more = load(tmp_path, first_stage="run", run_file="mine.trec", pool_size=9)
    assert "test: 2 of 2 pools are smaller than data.pool_size=9" in notes(more)


def test_qrels_of_beir_and_trec_are_read_alike(tmp_path):
    lines(tmp_path / "a.tsv", ["query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td2\t0", "", "q2\td1\t1"])
    lines(tmp_path / "b.qrels", ["q1 0 d1 2", "q1 0 d2 0", "q2 0 d1 1"])
    found = [trec.read_qrels(tmp_path / name, {"q1", "q2"}, {"d1", "d2"}) for name in ("a.tsv", "b.qrels")]
    assert found[0] == found[1] == {"q1": {"d1": 2.0, "d2": 0.0}, "q2": {"d1": 1.0}}


# ---------------------------------------------------------------------- what is wrong


def edit(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def ranked(*rows):
    return lambda folder: lines(folder / "run.trec", rows)


RUN = {"first_stage": "run"}
WRONG = [
    (lambda f: (f / "corpus.jsonl").unlink(), {}, "holds no corpus.jsonl: corpus.jsonl, queries.jsonl and qrels/"),
    (lambda f: (f / "queries.jsonl").unlink(), {}, "holds no queries.jsonl"),
    (
        lambda f: [path.unlink() for path in (f / "qrels").iterdir()],
        {},
        "qrels holds none of train.tsv, dev.tsv and test",
    ),
    (lambda f: None, RUN, "holds no run.trec"),
    (write("qrels/validation.tsv", "q1\td1\t1\n"), {}, "several different files for the same thing"),
    (write("corpus.jsonl", ""), {}, "corpus.jsonl is empty"),
    (write("qrels/test.tsv", "query-id\tcorpus-id\tscore\n"), {}, "test.tsv is empty"),
    (write("corpus.jsonl", b'{"_id": "d\xff"}'), {}, "corpus.jsonl, line 1: not UTF-8"),
    (edit("corpus.jsonl", "}\n", "}}\n"), {}, "corpus.jsonl, line 1: not JSON"),
    (edit("corpus.jsonl", "_id", "id"), {}, "corpus.jsonl, line 1: no field '_id', only 'id', 'title', 'text'"),
    (edit("corpus.jsonl", '"d1"', '"d0"'), {}, "corpus.jsonl, line 2: _id 'd0' occurs twice"),
    (edit("corpus.jsonl", '"d0"', '""'), {}, "corpus.jsonl, line 1, _id: an id is empty"),
    (edit("corpus.jsonl", '"T0"', "[1]"), {}, "corpus.jsonl, line 1, title: .1. is no text"),
    (write("corpus.jsonl", json.dumps({"_id": "d1"}) + "\n"), {}, "document 'd0' is not in the corpus"),
    (edit("queries.jsonl", "red fox?", " "), {}, "queries.jsonl, line 1: query 'q0' has no text"),
    (edit("qrels/test.tsv", "q6\td6\t2", "q6\td6"), {}, "test.tsv, line 2: expected `query-id corpus-id score`"),
    (edit("qrels/test.tsv", "q6\td6\t2", "q6\td6\tgood"), {}, "test.tsv, line 2, gain: 'good' is not a finite number"),
    (edit("qrels/test.tsv", "q6\td6\t2", "q6\td6\tnan"), {}, "test.tsv, line 2, gain: 'nan' is not a finite number"),
    (edit("qrels/test.tsv", "q6\td6\t2", "q6\td6\t-1"), {}, "test.tsv, line 2: a gain of -1; it must be 0"),
    (edit("qrels/test.tsv", "q6\td6\t2", "q9\td6\t2"), {}, "test.tsv, line 2: query 'q9' is not in the queries"),
    (edit("qrels/test.tsv", "q6\td6\t2", "q6\tx\t2"), {}, "test.tsv, line 2: document 'x' is not in the corpus"),
    (
        edit("qrels/test.tsv", "q6\td14\t1", "q6\td6\t1"),
        {},
        "line 3: query 'q6' and document 'd6' were judged in a line",
    ),
    (ranked(), RUN, "run.trec is empty"),
    (ranked("q0 Q0 d0 1 9.5"), RUN, "run.trec, line 1: 5 fields; expected `query Q0 document rank score tag`"),
    (ranked("q9 Q0 d0 1 9.5 t"), RUN, "run.trec, line 1: query 'q9' is not in the queries"),
    (ranked("q0 Q0 x 1 9.5 t"), RUN, "run.trec, line 1: document 'x' is not in the corpus"),
    (ranked("q0 Q0 d0 1.0 9.5 t"), RUN, "run.trec, line 1: rank '1.0' is not a whole number"),
    (ranked("q0 Q0 d0 1 high t"), RUN, "run.trec, line 1, score: 'high' is not a finite number"),
    (ranked("q0 Q0 d0 1 9 t", "q0 Q0 d0 2 8 t"), RUN, "line 2: document 'd0' occurs twice for query 'q0'"),
    (ranked("q0 Q0 d0 1 9 t", "q0 Q0 d1 1 8 t"), RUN, "line 2: query 'q0' has rank 1 twice"),
    (
        ranked("q0 Q0 d0 1 8 t", "q0 Q0 d1 2 9 t"),
        RUN,
        "line 2: document 'd1' of query 'q0' scores 9, above the one ranked",
    ),
    (ranked(*run_lines(range(7))), RUN, "run.trec: no line for query 'q7', which the qrels judge"),
    (ranked(*run_lines(range(7)), "q7 Q0 empty 1 2 t"), RUN, "no document of query 'q7' has a text: its pool is empty"),
]


@pytest.mark.parametrize("harm, fields, message", WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_what_cannot_be_used_is_named_in_one_line(tmp_path, harm, fields, message):
    collection(tmp_path)
    harm(tmp_path)
    refused_in_one_line(tmp_path, message, functools.partial(load, tmp_path, tmp_path / "prepared", **fields))


def test_ids_of_beir_may_hold_blanks(tmp_path):
    """Tabs part them; the last word of one is no document of its own."""
    (tmp_path / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq 1\tdoc 2\t1\n")
    assert trec.read_qrels(tmp_path / "test.tsv", {"q 1", "q"}, {"doc 2", "2"}) == {"q 1": {"doc 2": 1.0}}
    (tmp_path / "test.tsv").write_text("q1 0 d2 3\n")
    assert trec.read_qrels(tmp_path / "test.tsv", {"q1"}, {"d2"}) == {"q1": {"d2": 3.0}}
