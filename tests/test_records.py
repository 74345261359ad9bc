"""Rows with first-stage scores, topics, shown lists and missed items, from the builder to the batch."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgrpo_jax.config import Config, DataConfig, StageConfig
from fgrpo_jax.data import batches, builder, records
from fgrpo_jax.data.datasets import DataError, Dataset, in_memory
from fgrpo_jax.types import LoggedList, Missed, RankingExample

ITEMS = tuple((f"i{n}", f"item {n}") for n in range(9))


def example(number=0, **fields):
    rng = np.random.default_rng(number)
    order = rng.permutation(8)
    shown = [rng.permutation(8)[:size] for size in (3, 2)]
    whole = {
        "query_id": f"q{number}",
        "query": "",
        "candidates": tuple(ITEMS[i] for i in order),
        "relevance": tuple(float(i % 3) for i in order),
        "history": ITEMS[8:],
        "retrieval": tuple(i / 4 - 1 for i in order.tolist()),
        "topics": tuple(i // 2 for i in order.tolist()),
        "logged": tuple(
            LoggedList(tuple(s.tolist()), tuple(float(order[i] > 4) for i in s)) for s in shown[: number % 3]
        ),
        "missed": (Missed("elsewhere", 2.0, 7),) * (number % 2),
    }
    return RankingExample(**{**whole, **fields})


ROWS = [example(n) for n in range(6)]


class Shown(builder.RankingBuilder, skip_registration=True):
    optional = records.OPTIONAL

    def split_names(self):
        return ("train", "test")

    def examples(self, split):
        return iter(ROWS)

    def frozen(self, split):
        return {"seed": None, "negatives": "none"}


def test_rows_come_back_from_prepared_files(tmp_path):
    dataset = builder.load(Shown, DataConfig(name="shown", prepared_dir=str(tmp_path)), None)
    assert list(dataset.splits["train"]) == list(dataset.splits["test"]) == ROWS
    assert [len(row.logged) for row in ROWS] == [0, 1, 2, 0, 1, 2]
    last = {records.encode(row, records.OPTIONAL)[-1:] for row in ROWS}
    assert b"\0" in last, last  # NumPy's strings of bytes would have lost it


def test_rows_of_another_format_are_prepared_anew(tmp_path, monkeypatch):
    config = DataConfig(name="shown", prepared_dir=str(tmp_path))
    before = builder.load(Shown, config, None)
    monkeypatch.setattr(records, "FORMAT", "another")
    after = builder.load(Shown, config, None)
    assert len([*(tmp_path / "shown").iterdir()]) == 2
    assert after.fingerprints == before.fingerprints  # so a run that was trained on the former goes on


def test_a_builder_is_asked_once_for_a_split_which_fields_its_rows_have(tmp_path):
    """A data set may look at all of its rows to tell."""
    asked = []

    class Asked(Shown, skip_registration=True):
        @property
        def optional(self):
            asked.append(True)
            return records.OPTIONAL

    builder.load(Asked, DataConfig(name="asked", prepared_dir=str(tmp_path)), None)
    assert 0 < len(asked) < len(ROWS)


def test_fields_that_are_absent_leave_no_trace():
    plain = example(retrieval=(), topics=(), logged=(), missed=())
    assert len(records.content(plain)) == 5
    assert records.encode(plain, ()) == records.encode(plain, records.OPTIONAL)
    contents = {str(records.content(plain))}
    for name in records.OPTIONAL:
        only = dataclasses.replace(plain, **{name: getattr(example(5), name)})
        contents.add(str(records.content(only)))
        assert records.decode(records.encode(only, (name,))) == only
    assert len(contents) == 5  # each of the fields is part of the fingerprint


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
gain = st.floats(0, width=32, allow_infinity=False)


@settings(deadline=None)
@given(st.data())
def test_what_is_stored_is_what_is_read(data):
    pool = data.draw(st.lists(st.tuples(text, text), max_size=5, unique_by=lambda item: item[0]))
    shown = st.lists(st.integers(0, len(pool) - 1), max_size=len(pool), unique=True) if pool else st.just([])
    row = RankingExample(
        query_id=data.draw(text),
        query=data.draw(text),
        candidates=tuple(pool),
        relevance=tuple(data.draw(gain) for _ in pool),
        history=tuple(data.draw(st.lists(st.tuples(text, text), max_size=3))),
        retrieval=tuple(data.draw(st.floats(width=32, allow_nan=False, allow_infinity=False)) for _ in pool),
        topics=tuple(data.draw(st.integers(0, 2**31 - 1)) for _ in pool),
        logged=tuple(
            LoggedList(tuple(items), tuple(float(data.draw(st.booleans())) for _ in items))
            for items in data.draw(st.lists(shown, max_size=2))
        ),
        missed=(Missed("not there", data.draw(gain), -1),),
    )
    read = records.decode(records.encode(row, records.OPTIONAL))
    assert read == row and repr(read) == repr(row)  # numbers are of the same types and signs


def test_numbers_are_stored_as_float32():
    read = records.decode(records.encode(example(1, relevance=(0, 1, 0.1) + (0,) * 5), records.OPTIONAL))
    assert repr(read.relevance[:3]) == repr((0.0, 1.0, float(np.float32(0.1))))


@pytest.mark.parametrize(
    "fields",
    [
        {"retrieval": (1.0,)},
        {"retrieval": (float("nan"),) * 8},
        {"topics": (-1,) * 8},
        {"topics": (2**31,) * 8},
        {"logged": (LoggedList((0, 8), (1.0, 0.0)),)},
        {"logged": (LoggedList((0, 0), (1.0, 0.0)),)},
        {"logged": (LoggedList((0, 1), (1.0,)),)},
        {"logged": (LoggedList((0, 1), (1.0, 2.0)),)},
        {"missed": (Missed("i3", 1.0),)},
    ],
)
def test_fields_that_do_not_fit_the_candidates_are_refused(fields):
    with pytest.raises(ValueError, match="'q1', 8 candidates: unsound"):
        records.encode(example(1, **fields), records.OPTIONAL)
    with pytest.raises(ValueError, match="'q5' has retrieval, missed, which its data set does not declare"):
        records.encode(example(5), ("topics", "logged"))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"query_id": 5}, "query 5: an id or text is no string, 5"),
        ({"history": ((3, "text"),)}, "query 'q1': an id or text is no string, 3"),
        ({"missed": (Missed(7, 1.0),)}, "query 'q1': an id or text is no string, 7"),
        ({"query": "\ud800"}, "query 'q1': a text is not Unicode .surrogates not allowed."),
    ],
)
def test_what_is_no_text_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        records.encode(example(1, **fields), records.OPTIONAL)


def said_of_items(e):
    """Every statement of a row by item, not by place."""
    values = {e.candidates[c]: (e.relevance[c], e.retrieval[c], e.topics[c]) for c in range(len(e.candidates))}
    return values, [([e.candidates[i] for i in shown.items], shown.feedback) for shown in e.logged], e.missed


def test_what_is_said_of_candidates_follows_them():
    made = Dataset("shown", "recommendation", "", (), {"train": in_memory(ROWS), "test": in_memory(ROWS)}, False, {})
    config = Config(data=DataConfig(history_max=5))
    batch = batches.make_batches(made, config, "rl", StageConfig(batch_queries=6)).batch_at(0)
    known = {row.query_id: row for row in ROWS}
    for found in (batch, batches.evaluation_examples(made, config, "test")):
        assert any(row.candidates != known[row.query_id].candidates for row in found)
        for row in found:
            assert said_of_items(row) == said_of_items(known[row.query_id])


def test_shown_lists_stay_with_the_relevant_items_where_negatives_are_drawn():
    taken = RankingExample("q", "", ITEMS[:2], (1.0, 1.0), ITEMS[8:], logged=(LoggedList((1, 0), (1.0, 0.0)),))
    config = Config(data=DataConfig(pool_size=6))

    def first(row):
        made = Dataset("shown", "recommendation", "", ITEMS, {"train": in_memory([row])}, True, {})
        return batches.make_batches(made, config, "rl", StageConfig(batch_queries=1)).batch_at(0)[0]

    row = first(taken)
    assert len(row.candidates) == 6
    assert [row.candidates[i] for i in row.logged[0].items] == [ITEMS[1], ITEMS[0]]
    with pytest.raises(DataError, match="drawn items have neither"):
        first(dataclasses.replace(taken, topics=(0, 1)))
