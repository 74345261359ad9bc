"""interactions: every way to be wrong, and values that other programs write."""

import functools

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from raw_files import refused_in_one_line
from raw_interactions import lists, load, logs, own_lists

from fgrpo_jax.data import retriever, tables
from fgrpo_jax.data.datasets import DataError


def edit(name, old, new, count=1):
    def change(folder):
        path = folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, count))

    return change


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(name):
    return lambda folder: (folder / name).unlink()


LINE_2 = "u0,0,0,1"
WRONG = [
    (remove("interactions.csv"), {}, r"holds no interactions{.csv,.tsv,.jsonl,.parquet}: put it there, or name it by"),
    (remove("items.csv"), {}, "holds no items{.csv,.* data.interactions.items_file"),
    (
        write("x", ""),
        {"items_file": "gone.csv"},
        "gone.csv is not there: put it there, or correct data.interactions.items",
    ),
    (write("items.xls", ""), {"items_file": "items.xls"}, "must end in one of .csv, .tsv, .jsonl, .parquet"),
    (write("interactions.tsv", "user\n"), {}, "several different files for the same thing"),
    (write("interactions.csv", ""), {}, "interactions.csv is empty: its first line must name the columns"),
    (write("interactions.csv", "user,item,time\n"), {}, "interactions.csv is empty: it has no rows"),
    (write("items.csv", "id,text\n"), {}, "items.csv is empty: it has no rows"),
    (
        edit("interactions.csv", "time", "when"),
        {},
        "has no column 'time', only 'user', 'item', 'when', 'stars': set data",
    ),
    (edit("interactions.csv", "stars", "user"), {}, "line 1: two columns are called 'user'"),
    (edit("items.csv", "text", "name"), {}, "items.csv has no column 'text', only .* set data.interactions.text"),
    (write("interactions.csv", b"user,item,time\nu\xff,1,2\n"), {}, "interactions.csv, line 2: not UTF-8"),
    (edit("interactions.csv", LINE_2, LINE_2 + ",9"), {}, "line 2: 5 fields for 4 columns"),
    (edit("interactions.csv", LINE_2, 'u0,"0,0,1'), {}, "not CSV .unexpected end of data.: mind the quotes"),
    (
        edit("interactions.csv", LINE_2, '"u\n0",0,0,1'),
        {},
        r"line 3, column 'user': an id is 'u\\n0'; it must be a text of",
    ),
    (edit("interactions.csv", LINE_2, " ,0,0,1"), {}, "line 2, column 'user': an id is ' '; it must"),
    (edit("interactions.csv", LINE_2, "u0,,0,1"), {}, "line 2, column 'item': an id is empty"),
    (
        edit("interactions.csv", LINE_2, "u0,77,0,1"),
        {},
        "line 2, column 'item': item '77' is not in .*items.csv .1 such",
    ),
    (edit("interactions.csv", LINE_2, "u0,0,,1"), {}, "line 2, column 'time': no time; fill it in, or remove the row"),
    (edit("interactions.csv", LINE_2, "u0,0,nan,1"), {}, "line 2, column 'time': nan is not a finite number"),
    (
        edit("interactions.csv", LINE_2, "u0,0,monday,1"),
        {},
        "column 'time': 'monday' is no time; write a number, or a date",
    ),
    (
        edit("interactions.csv", LINE_2, "u0,0,0,nan"),
        {"rating": "stars"},
        "column 'stars': 'nan' is not a finite number",
    ),
    (edit("interactions.csv", LINE_2, "u0,0,0,good"), {"rating": "stars"}, "column 'stars': 'good' is not a finite"),
    (
        edit("interactions.csv", LINE_2, "u0,0,0,0"),
        {"rating": "stars", "gain": "rating"},
        "a rating of 0 cannot be a gain",
    ),
    (edit("items.csv", "\n1,", "\n0,"), {}, "items.csv, line 3: item '0' occurs twice: keep one of its rows"),
    (edit("items.csv", "the 1th", "the 0th"), {}, "items '0' and '1' have the same text 'Item, the 0th': .* as the id"),
    (edit("items.csv", '"Item, the 1th"', ""), {}, "line 3, column 'text': item '1' has no text"),
    (write("interactions.jsonl", '{"user": "a"}\n{'), {"interactions_file": "interactions.jsonl"}, "line 2: not JSON"),
    (
        write("interactions.jsonl", "[1]"),
        {"interactions_file": "interactions.jsonl"},
        "line 1: expected an object, found list",
    ),
    (
        write("i.jsonl", '{"user": 1.5, "item": 2, "time": 3}'),
        {"interactions_file": "i.jsonl"},
        "'user': an id is 1.5; it",
    ),
    (
        write("i.jsonl", '{"user": 1, "item": 0, "time": true}'),
        {"interactions_file": "i.jsonl"},
        "'time': True is no time",
    ),
    (write("items.jsonl", '{"id": 1, "text": ["a"]}'), {"items_file": "items.jsonl"}, r"'text': \['a'\] is no text"),
    (write("i.parquet", "user,item"), {"interactions_file": "i.parquet"}, "i.parquet cannot be read as Parquet"),
    (write("x", ""), {"targets": 5}, "no user has enough interactions for a train query .of 6, the longest has 8"),
    (write("x", ""), {"kcore": 9}, "no interaction is left: lower data.interactions.kcore"),
    (write("x", ""), {"pool_size": 24}, "30 items are too few for data.pool_size=24: 6 users took so many .up to 8"),
    (lambda f: logs(f, time=lambda u, n: 7), {"split": "time"}, "times do not split by .*they go from 7 to 7, and"),
    (write("x", ""), {"candidates": "file"}, "holds no candidates{"),
    (
        write("candidates.csv", "split,user,item\n"),
        {"candidates": "file"},
        "has no column 'score'.*a list has split, user",
    ),
    (
        lambda f: lists(f, own_lists(skip={("test", 3)})),
        {"candidates": "file"},
        "no list for user 'u3' of split 'test'",
    ),
    (
        lambda f: lists(f, ["dev,u0,1,2"]),
        {"candidates": "file"},
        "line 2, column 'split': 'dev' is not one of train, val",
    ),
    (
        lambda f: lists(f, ["test,u0,99,2"]),
        {"candidates": "file"},
        "line 2, column 'item': item '99' is not in .*items.csv",
    ),
    (lambda f: lists(f, ["test,u0,1,x"]), {"candidates": "file"}, "column 'score': 'x' is not a finite number"),
    (
        lambda f: lists(f, ["test,u0,1,2", "test,u0,1,3"]),
        {"candidates": "file"},
        "line 3, .*item '1' is in this list twice",
    ),
]


@pytest.mark.parametrize("harm, fields, message", WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_what_cannot_be_used_is_named_in_one_line(tmp_path, harm, fields, message):
    logs(tmp_path)
    harm(tmp_path)
    refused_in_one_line(tmp_path, message, functools.partial(load, tmp_path, tmp_path / "prepared", **fields))


# ---------------------------------------------------------------------- values that other programs write


def test_times_in_nanoseconds_are_cut(tmp_path):
    moments = pyarrow.array([1_700_000_000_000_000_001, 1_700_000_000_000_001_999], pyarrow.timestamp("ns"))
    pyarrow.parquet.write_table(pyarrow.table({"time": moments}), tmp_path / "t.parquet")

    found = tables.read(tmp_path / "t.parquet", {"time": "data.interactions.time"}).columns["time"]
    assert [moment.microsecond for moment in found] == [0, 1]


def test_half_a_character_is_named_by_its_line(tmp_path):
    (tmp_path / "items.jsonl").write_text('{"id": "a", "text": "fine \\u00e9"}\n{"id": "b", "text": "smile \\ud83d"}\n')
    with pytest.raises(DataError, match="items.jsonl, line 2: not JSON .*surrogates not allowed"):
        tables.read(tmp_path / "items.jsonl", {"id": "x", "text": "y"})


def test_a_pool_that_is_closed_has_its_size_whatever_it_must_hold():
    for targets in (3, 25):
        pool, missed = retriever.pool_of(np.arange(targets), np.linspace(1, 0, 500), 20, "closed")
        assert len(pool) == max(20, targets) and not len(missed) and set(range(targets)) <= set(pool.tolist())
