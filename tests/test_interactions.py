"""interactions: tables in every format, splits, pools, what is noted of times."""

import dataclasses
import datetime
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from raw_files import lengths
from raw_interactions import ITEMS, csv_file, ids, lists, load, logs, own_lists, relevant, walk

from fgrpo_jax.config import DataConfig, InteractionsConfig
from fgrpo_jax.data import retriever, tables
from fgrpo_jax.data.batches import make_batches, negatives, subset_key

# ---------------------------------------------------------------------- splits


@pytest.mark.parametrize("targets", [1, 2])
def test_the_last_items_are_held_out_and_all_before_is_history(tmp_path, targets):
    logs(tmp_path, order=lambda row: (row[1] * 7 % 5, row))  # in no order
    dataset = load(tmp_path, targets=targets, history=3, windows=2)
    assert (dataset.kind, dataset.sampled_negatives, len(dataset.catalogue)) == ("recommendation", True, ITEMS)
    for split, back in (("test", 0), ("validation", targets)):
        for user, e in enumerate(dataset.splits[split]):
            items = [str(i) for i in walk(user)]
            end = len(items) - back
            assert e.query_id == f"{split}-u{user}" and ids(e.history) == items[: end - targets][-3:]
            assert relevant(e) == dict.fromkeys(items[end - targets : end], 1.0)
            assert len(e.candidates) == len(set(e.candidates)) == 6
            assert not (set(ids(e.candidates)) - set(relevant(e))) & set(items)  # no negative that the user took
            assert e.candidates[0][1].startswith("Item, the ")
    rows = list(dataset.splits["train"])
    each = {1: 2, 2: 1}[targets]  # a second list of two would have no history
    assert len(rows) == 6 * each
    for number, e in enumerate(rows):
        items, back = walk(number // each), targets * (1 + each - number % each)
        assert ids(e.candidates) == [str(i) for i in items[8 - targets - back :][:targets]]
    assert len({subset_key(e.query_id) for e in rows}) == 6


def test_splits_by_time_learn_nothing_of_later(tmp_path):
    def when(user, n):
        return 100 * n + 37 * user + 2000 * (user == 19)  # the last user comes late

    logs(tmp_path, users=20, length=10, time=when)
    dataset = load(tmp_path, split="time", held_out=(0.2, 0.1), targets=2)
    time = {(f"u{u}", str(i)): when(u, n) for u in range(20) for n, i in enumerate(walk(u, 10))}
    every = sorted(time.values())
    low, high = every[int(200 * 0.7)], every[int(200 * 0.9)]
    assert lengths(dataset)["test"] > 5 and lengths(dataset)["validation"] > 5
    for split, first, last in (("validation", low, high), ("test", high, np.inf)):
        for e in dataset.splits[split]:
            user = e.query_id.removeprefix(f"{split}-")
            span = sorted((t, i) for (u, i), t in time.items() if u == user and first <= t < last)
            assert set(relevant(e)) == {i for _, i in span[:2]}
            assert ids(e.history) == [
                i for t, i in sorted((t, i) for (u, i), t in time.items() if u == user and t < first)
            ]
    for e in dataset.splits["train"]:
        user = f"u{int(e.query_id.split('-')[1])}"
        assert all(time[user, item] < low for item in (*relevant(e), *ids(e.history)))
    assert any("left out: of users with a history of fewer" in note.text for note in dataset.notes)


def test_ratings_are_gains_or_a_threshold(tmp_path):
    logs(tmp_path)
    stars = {str(i): 1.0 + i % 5 for i in range(ITEMS)}
    dataset = load(tmp_path, rating="stars", gain="rating", targets=2)
    assert all(relevant(e) == {i: stars[i] for i in relevant(e)} for split in dataset.splits.values() for e in split)
    kept = load(tmp_path, rating="stars", min_rating=3.0)
    assert all(stars[i] >= 3 for e in kept.splits["test"] for i in (*relevant(e), *ids(e.history)))
    assert any("left out: rated below data.interactions.min_rating=3" in note.text for note in kept.notes)
    assert set(ids(kept.catalogue)) == {i for i in stars if stars[i] >= 3}


# ---------------------------------------------------------------------- formats


def test_all_formats_and_column_names_are_read_alike(tmp_path):
    logs(tmp_path / "csv")
    expected = load(tmp_path / "csv")
    raw = [line.split(",") for line in (tmp_path / "csv" / "interactions.csv").read_text().splitlines()[1:]]
    items = [{"id": i, "text": f"Item, the {i}th", "genre": f"G{i % 3}"} for i in range(ITEMS)]
    rows = [{"who": u, "what": int(i), "when": int(t), "x": None} for u, i, t, _ in raw]
    names = {"user": "who", "item": "what", "time": "when"}

    def same(folder, **fields):
        found = load(folder, **names, **fields)
        assert found.fingerprints == expected.fingerprints and found.catalogue == expected.catalogue

    (tmp_path / "jsonl").mkdir()
    for name, values in (("interactions", rows), ("items", items)):
        (tmp_path / "jsonl" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, values)) + "\n\n")
    same(tmp_path / "jsonl")
    (tmp_path / "parquet").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), tmp_path / "parquet" / "things.parquet")
    zone = datetime.UTC
    moments = [{**row, "when": datetime.datetime.fromtimestamp(row["when"], zone)} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(moments), tmp_path / "parquet" / "interactions.parquet")
    same(tmp_path / "parquet", items_file="things.parquet")
    tabs = "\n".join("\t".join(map(str, row.values())) for row in rows)
    (tmp_path / "tsv").mkdir()
    (tmp_path / "tsv" / "interactions.tsv").write_bytes(b"\xef\xbb\xbf" + f"who\twhat\twhen\tx\r\n{tabs}\r\n".encode())
    (tmp_path / "tsv" / "items.csv").write_text((tmp_path / "csv" / "items.csv").read_text())
    same(tmp_path / "tsv")


def test_texts_are_joined_and_line_breaks_in_quotes_are_spaces(tmp_path):
    logs(tmp_path)
    rows = [f'{i},"Item\n""{i}""",{"" if i == 1 else "G"}' for i in range(ITEMS)]
    csv_file(tmp_path / "items.csv", "id,text,genre", rows)
    texts = dict(load(tmp_path, text=("text", "genre")).catalogue)
    assert texts["0"] == 'Item "0", G' and texts["1"] == 'Item "1"'


@pytest.mark.parametrize(
    "value, seconds",
    [
        ("12", 12.0), ("1e3", 1000.0), (7, 7.0), ("1970-01-02", 86400.0), ("1970-01-01T01:00:00+01:00", 0.0),
        ("1970-01-01 00:00:01.5", 1.5), ("1970-01-01T00:00:02Z", 2.0), (datetime.date(1970, 1, 2), 86400.0),
    ],
)  # fmt: skip
def test_times(value, seconds):
    assert tables.moment(value, "here") == seconds


# ---------------------------------------------------------------------- pools


def test_popularity_draws_by_counts_of_the_training_span_alone(tmp_path):
    logs(tmp_path, users=40)
    dataset = load(tmp_path, candidates="popularity")
    known = [str(i) for user in range(40) for i in walk(user)[:-2]]
    assert dataset.weights == tuple(1.0 + known.count(item) for item in ids(dataset.catalogue))
    assert load(tmp_path).weights == () and load(tmp_path).fingerprints["train"] != dataset.fingerprints["train"]


def test_weighted_draws_have_the_shares_of_their_weights():
    """The first of two draws is by weight; the second by weight among the others: both in closed form."""
    items, weights = [(str(i), str(i)) for i in range(4)], np.array([4, 3, 2, 1]) / 10
    rng, n = np.random.default_rng(0), 20_000
    drawn = np.array([[int(i) for i, _ in negatives(items, {"3"}, 2, rng, "q", weights)] for _ in range(n)])
    share = weights[:3] / 0.9
    expected = np.array([[a * b / (1 - a) * (i != j) for j, b in enumerate(share)] for i, a in enumerate(share)])
    found = np.histogram2d(*drawn.T, bins=[range(4)] * 2)[0] / n
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / n)


def test_training_pools_are_drawn_by_weight(tmp_path):
    logs(tmp_path, users=40)
    dataset = load(tmp_path, candidates="popularity")
    heavy = dataset._replace(weights=tuple(1e9 if item == "29" else 1.0 for item in ids(dataset.catalogue)))
    from fgrpo_jax.config import Config, StageConfig

    config = Config(data=DataConfig(pool_size=6))
    batch = make_batches(heavy, config, "sft", StageConfig(batch_queries=40)).batch_at(0)
    assert all("29" in ids(e.candidates + e.history) for e in batch)


def test_als_pools_are_retrieved_from_the_history_by_what_came_before(tmp_path, monkeypatch):
    logs(tmp_path, users=12, length=9)
    fitted = []

    class Spy(retriever.Retriever):
        def __init__(self, walks, n_items):
            fitted.append([[int(i) for i in walk] for walk in walks])
            super().__init__(walks, n_items)

    monkeypatch.setattr(retriever, "Retriever", Spy)
    dataset = load(tmp_path, candidates="als", pool_size=10, targets=2)
    assert fitted[-1] == [walk(user, 9)[:-4] for user in range(12)] and len(fitted) == retriever.FOLDS + 1
    missed = 0
    for split in dataset.splits.values():
        for e in split:
            assert len(e.retrieval) == len(e.candidates) == 10 and not set(ids(e.candidates)) & set(ids(e.history))
            assert len(relevant(e)) + len(e.missed) == 2
            missed += len(e.missed)
    assert missed and not dataset.sampled_negatives
    closed = load(tmp_path, candidates="als", pool_size=10, targets=2, pool="closed")
    for whole, forced in zip(dataset.splits["test"], closed.splits["test"]):
        assert len(relevant(forced)) == 2 and {lost.item for lost in whole.missed} <= set(relevant(forced))


def test_lists_of_a_retriever_are_pools_without_the_history(tmp_path):
    logs(tmp_path)
    lists(tmp_path, own_lists(skip={("train", 0)}))
    dataset = load(tmp_path, candidates="file", pool_size=5)
    for user, e in enumerate(dataset.splits["test"]):
        proposed = {str((user + n) % ITEMS): 9.0 - n for n in range(9)}
        left = [item for item in proposed if item not in ids(e.history)][:5]
        assert dict(zip(ids(e.candidates), e.retrieval)) == {item: proposed[item] for item in left}
        assert {*relevant(e), *(lost.item for lost in e.missed)} == {str(walk(user)[-1])}
    assert any("train queries are left out: candidates_file has no list for them" in n.text for n in dataset.notes)
    closed = load(tmp_path, candidates="file", pool_size=5, pool="closed")
    for e in closed.splits["test"]:
        (target,) = relevant(e)
        assert np.isfinite(e.retrieval).all() and not e.missed and target in ids(e.candidates)


# ---------------------------------------------------------------------- time


@pytest.mark.parametrize(
    "time, order, said",
    [
        (lambda u, n: 1000 * n, None, []),
        (lambda u, n: 1000 * n, lambda row: -row[1], ["rows of 6 of 6 users are not in order of time"]),
        (lambda u, n: 1000 * (n // 2), None, ["24 of 42 neighbours of a user (57.1%) have equal times: they stay in",
                                            "6 of 12 held-out queries have a target at the time of"]),
        (lambda u, n: 5 if u == 0 else n, None, ["7 of 42 neighbours of a user (16.7%) have equal times; 1 users have",
                                                 "2 of 12 held-out queries"]),
        (lambda u, n: 0, None, ["all 48 times are 0: the order of the file is taken", "12 of 12 held-out queries"]),
    ],
)  # fmt: skip
def test_doubtful_times_are_noted(tmp_path, time, order, said):
    logs(tmp_path, time=time, order=order)
    notes = [note.text for note in load(tmp_path).notes if note.about == "time" or "sorted" in note.text]
    assert len(notes) == len(said) and all(text in note for note, text in zip(notes, said)), notes


def test_notes_are_kept_with_the_prepared_data(tmp_path):
    logs(tmp_path, time=lambda u, n: n // 2)
    (tmp_path / "interactions.csv").write_text((tmp_path / "interactions.csv").read_text() + "u0,0,9999,1\n")
    first = load(tmp_path)
    assert load(tmp_path).notes == first.notes
    assert any("1 of 49 interactions are left out: an item that its user took before" in n.text for n in first.notes)


def test_the_core_is_kept(tmp_path):
    logs(tmp_path, users=9)
    dataset = load(tmp_path, kcore=3, split="leave_one_out")
    rows = {str(user): [str(i) for i in walk(user)] for user in range(9)}
    kept = retriever.core(rows, 3)
    assert set(ids(dataset.catalogue)) == {item for items in kept.values() for item in items}
    assert 0 < sum(map(len, kept.values())) < 72
    assert any("outside of the core of data.interactions.kcore=3" in note.text for note in dataset.notes)


def test_options_are_part_of_what_is_prepared(tmp_path):
    logs(tmp_path)
    default = load(tmp_path)
    assert load(tmp_path, targets=2).fingerprints["test"] != default.fingerprints["test"]
    assert load(tmp_path, windows=1).fingerprints["train"] != default.fingerprints["train"]
    names = {field.name for field in dataclasses.fields(InteractionsConfig)}
    from fgrpo_jax.data.interactions import Interactions

    made = set(Interactions.options_of(DataConfig()))
    assert names - made == {"interactions_file", "items_file", "candidates_file"}  # their content is hashed
