"""goalrank_ml1m and goalrank_book: splits by order, what the first stage knows, pools and shown lists."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import quick_runs
from raw_files import RAW, lengths, real
from tiny import changed, run_training
from tiny_lists import tiny_ranker

import eval as evaluation
from fgrpo_jax.config import DataConfig
from fgrpo_jax.data import datasets, goalrank, published, retriever
from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.stages import stages

USERS, MOVIES = 30, 60


def write_movielens(folder, users=USERS, shortest=32):
    """Rows sorted by user and not by time; users of even number take even movies first."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, sequences, rows = np.random.default_rng(0), {}, []
    for user in range(1, users + 1):
        movies = rng.permutation(np.arange(1, MOVIES + 1))
        movies = movies[np.argsort((movies + user) % 2, kind="stable")][: rng.integers(shortest, 46)]
        sequences[str(user)] = [str(movie) for movie in movies]
        times = 1000 + 5 * np.arange(len(movies))
        rows += [f"{user}::{m}::{rng.integers(1, 6)}::{t}" for m, t in rng.permutation(list(zip(movies, times)))]
    movies = [f"{m}::Amélie {m} (2001)::{published.GENRES[m % 18]}|Drama" for m in range(1, MOVIES + 1)]
    (folder / "movies.dat").write_bytes("\n".join(movies).encode("latin-1") + b"\n")
    (folder / "ratings.dat").write_text("\n".join(rows) + "\n")
    return sequences


def load(folder, prepared, name="goalrank_ml1m", **fields):
    chosen = {"kcore": 5, "retrieved": 12, **fields}
    return datasets.load(DataConfig(name=name, manual_dir=str(folder), prepared_dir=str(prepared), **chosen))


def ids(items):
    return [item for item, _ in items]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ml")
    sequences = write_movielens(folder / "raw" / "ml-1m")
    made = {kind: load(folder / "raw", folder / "prepared", pool=kind) for kind in ("open", "closed")}
    return sequences, made, folder


@pytest.mark.parametrize("kind", ["open", "closed"])
def test_targets_are_windows_of_six_with_all_before_them_as_history(small, kind):
    sequences, made, _ = small
    assert lengths(made[kind])["validation"] == lengths(made[kind])["test"] == USERS
    assert len(made[kind].catalogue) == MOVIES and made[kind].catalogue[1] == ("2", "Amélie 2 (2001)")
    walks = list(sequences.values())
    for split, rows in made[kind].splits.items():
        seen = set()
        for e in rows:
            name, user, offset = e.query_id.split("-")
            end = len(walks[int(user)]) - 6 * int(offset)
            assert name == split and ids(e.history) == walks[int(user)][: end - 6]
            targets = walks[int(user)][end - 6 : end]
            relevant = [item for (item, _), gain in zip(e.candidates, e.relevance) if gain]
            assert sorted(relevant + [lost.item for lost in e.missed if lost.gain == 1]) == sorted(targets)
            assert not set(ids(e.candidates)) & set(ids(e.history)) and len(set(e.candidates)) == len(e.candidates)
            assert e.topics == tuple(int(item) % 18 for item in ids(e.candidates))
            assert all(lost.topic == int(lost.item) % 18 for lost in e.missed)
            seen.add((int(user), int(offset)))
        offsets = {"test": {0}, "validation": {1}, "train": {2, 3, 4, 5}}[split]
        assert {offset for _, offset in seen} == offsets and len(seen) == len(rows)


def per_query(run_dir):
    lines = (run_dir / "eval" / "validation" / "per_query.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_is_evaluated_on_either_pools(small, tmp_path, capsys):
    """Trained on open ones; on closed ones nothing is missed, and baselines count in what it was trained on."""
    like = tiny_ranker(small[2] / "raw", small[2] / "prepared", tmp_path / "run", steps=2)
    fields = {"data.name": "goalrank_ml1m", "data.kcore": 5, "data.retrieved": 12, "network.list_length": 6}
    fields |= {f"{name}.steps": 0 for name in stages(like) if name != "pointwise"}
    fields |= {"eval.baselines": ("popularity",), "network.labels": "relevance"}
    config = changed(like, fields)
    with quick_runs():
        assert run_training(config) == 0
        found = {"open": per_query(tmp_path / "run")}
        assert evaluation.main([str(tmp_path / "run"), "--data.pool", "closed"]) == 0
        found["closed"] = per_query(tmp_path / "run")
    assert any("missed" in row for row in found["open"]) and not any("missed" in row for row in found["closed"])
    assert [row["candidates"] for row in found["open"]] != [row["candidates"] for row in found["closed"]]
    capsys.readouterr()
    assert evaluation.main([str(tmp_path / "run"), "--data.pool", "closed", "--data.name", "jsonl"]) == 2
    assert (
        "data.pool='closed': data.name='jsonl' does not read it; leave it at its default, 'open'"
        in capsys.readouterr().err
    )


def test_open_pools_are_what_was_retrieved_and_closed_ones_hold_every_target(small):
    _, made, _ = small
    missed = 0
    for split in ("train", "validation", "test"):
        for whole, forced in zip(made["open"].splits[split], made["closed"].splits[split], strict=True):
            assert whole.query_id == forced.query_id and len(whole.candidates) == len(forced.candidates) <= 12
            assert sum(forced.relevance) == 6 and forced.missed == ()
            missed += len(whole.missed)
            scores = dict(zip(ids(whole.candidates), whole.retrieval))
            mine = dict(zip(ids(forced.candidates), forced.retrieval))
            inserted = set(mine) - set(scores)
            assert inserted == {lost.item for lost in whole.missed}
            assert all(mine[item] <= min(scores.values()) for item in inserted)  # what the docstring warns of
            out = set(scores) - set(mine)
            kept = [scores[i] for i, r in zip(ids(whole.candidates), whole.relevance) if i not in out and not r]
            assert len(out) == len(inserted) and all(scores[i] <= min(kept, default=np.inf) for i in out)
    assert missed > 100


def test_shown_lists_are_pages_of_the_pool(small):
    """Every candidate is shown once; where the order may show, the first stage's better ones are on the first page."""
    _, made, _ = small
    first = {"open": [], "closed": []}
    for kind, e in [(pool, e) for pool in first for e in made[pool].splits["train"]]:
        rank = np.argsort(np.argsort(-np.array(e.retrieval), kind="stable"))
        assert [len(page.items) for page in e.logged[:-1]] == [6] * (len(e.logged) - 1)
        assert sorted(i for page in e.logged for i in page.items) == list(range(len(e.candidates)))
        for page in e.logged:
            assert page.feedback == tuple(e.relevance[i] for i in page.items)
        first[kind].append(rank[list(e.logged[0].items)].mean() / rank.mean())
    assert 0.4 < np.mean(first["open"]) < 0.9 and 0.95 < np.mean(first["closed"]) < 1.05


def test_the_first_stage_never_sees_a_target(small, tmp_path, monkeypatch):
    sequences, _, folder = small
    fitted, embedded = [], []

    class Spy(retriever.Retriever):
        def __init__(self, walks, n_items):
            fitted.append({tuple(walk) for walk in walks})
            super().__init__(walks, n_items)

        def scores(self, histories):
            embedded.append((len(fitted), {tuple(history) for history in histories}))
            return super().scores(histories)

    monkeypatch.setattr(retriever, "Retriever", Spy)
    load(folder / "raw", tmp_path)
    known = [tuple(int(item) - 1 for item in items[:-12]) for items in sequences.values()]
    assert fitted[-1] == set(known) and len(fitted) == retriever.FOLDS + 1
    for fold in range(retriever.FOLDS):
        assert fitted[fold] == {walk for user, walk in enumerate(known) if user % retriever.FOLDS != fold}
        at, histories = embedded[fold]
        mine = [walk for user, walk in enumerate(known) if user % retriever.FOLDS == fold]
        assert at == fold + 1 and histories == {
            walk[: len(walk) - 6 * n] for walk in mine for n in range(1, 5) if len(walk) > 6 * n
        }


def test_a_zip_is_read_as_its_files_and_the_same_data_are_prepared_again(small, tmp_path):
    _, made, folder = small
    (tmp_path / "zip").mkdir()
    with zipfile.ZipFile(tmp_path / "zip" / "ml-1m-whole.zip", "w") as archive:
        for name in ("ratings.dat", "movies.dat"):
            archive.write(folder / "raw" / "ml-1m" / name, f"ml-1m/{name}")
    again = load(tmp_path / "zip", tmp_path / "prepared")
    assert again.fingerprints == made["open"].fingerprints != made["closed"].fingerprints
    assert len(list((folder / "prepared" / "goalrank_ml1m").iterdir())) == 2  # one for each kind of pool


def test_core_keeps_users_and_items_that_keep_each_other():
    sequences = {"a": ["x", "y"], "b": ["y", "x", "z"], "c": ["z", "w"], "d": ["w"]}
    assert retriever.core(sequences, 2) == {"a": ["x", "y"], "b": ["y", "x"]}
    assert retriever.core(sequences, 1) == sequences and retriever.core(sequences, 3) == {}


def test_users_with_too_few_interactions_are_dropped_and_counted(tmp_path, caplog):
    sequences = write_movielens(tmp_path / "raw", shortest=12)
    short = sum(len(items) < goalrank.SHORTEST for items in sequences.values())
    dataset = load(tmp_path / "raw", tmp_path / "prepared")
    assert 0 < short and lengths(dataset)["test"] == USERS - short
    assert f"{short} of the {USERS} users that data.kcore=5 leaves have fewer than 19 interactions" in caplog.text
    with pytest.raises(DataError, match="of 30 users none is left with data.kcore=50 .*: lower data.kcore"):
        load(tmp_path / "raw", tmp_path / "prepared", kcore=50)
    with pytest.raises(DataError, match="60 items are left, too few to retrieve data.retrieved=55"):
        load(tmp_path / "raw", tmp_path / "prepared", retrieved=55)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("ratings.dat", "1::61::5::9", "movie '61' is not in movies.dat: the two files do not belong together"),
        ("ratings.dat", "1::6::5", "expected `UserID::MovieID::Rating::Timestamp`, found '1::6::5'"),
        ("ratings.dat", "1::6::5::soon", "expected `UserID::MovieID::Rating::Timestamp`"),
        ("ratings.dat", "99::6::5::1\n99::6::4::2", "user '99' rated movie '6' before"),
        ("movies.dat", "61::Amélie 3 (2001)::Drama", "expected `MovieID::Title"),
        ("movies.dat", "61::New (2001)::Opera", "a genre of MovieLens"),
    ],
)
def test_malformed_lines_are_named(tmp_path, name, line, message):
    write_movielens(tmp_path / "raw")
    with open(tmp_path / "raw" / name, "a", encoding="latin-1") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=f"{name}, line [0-9]+: .*{message}"):
        load(tmp_path / "raw", tmp_path / "prepared")


def test_files_that_are_absent_or_damaged_are_named(tmp_path):
    with pytest.raises(DataError, match="do not hold MovieLens-1M: ml-1m.zip, or ratings.dat and movies.dat"):
        load(tmp_path, tmp_path / "prepared")
    (tmp_path / "ml-1m.zip").write_text("no zip")
    with pytest.raises(DataError, match="ml-1m.zip is damaged or not a zip file .*: download it again"):
        load(tmp_path, tmp_path / "prepared")
    with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
        archive.writestr("ml-1m/movies.dat", "")
    with pytest.raises(DataError, match="ml-1m.zip holds 0 files called ratings.dat, not one"):
        load(tmp_path, tmp_path / "prepared")
    (tmp_path / "ml-1m-other.zip").write_text("another")
    with pytest.raises(DataError, match="several different files for the same thing"):
        load(tmp_path, tmp_path / "prepared")


def write_kgat(folder, extra=""):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    walks = [rng.permutation(40)[:24] for _ in range(20)]
    for name, part in (("train", slice(0, 20)), ("test", slice(20, 24))):
        lines = [f"{user} {' '.join(map(str, walk[part]))}\n" for user, walk in enumerate(walks)]
        (folder / f"{name}.txt").write_text("".join(lines) + extra * (name == "test"))
    items = [f"B{item:04d} {item} m.{item}\n" for item in range(40)]
    (folder / "item_list.txt").write_text("org_id remap_id freebase_id\n" + "".join(items))
    return walks


def test_books_are_read_in_the_form_of_kgat(tmp_path):
    walks = write_kgat(tmp_path / "raw")
    dataset = load(tmp_path / "raw", tmp_path / "prepared", "goalrank_book", pool="closed")
    assert lengths(dataset) == {"train": 20, "validation": 20, "test": 20}
    for user, e in enumerate(dataset.splits["test"]):
        relevant = {int(item) for (item, _), gain in zip(e.candidates, e.relevance) if gain}
        assert relevant == set(walks[user][-6:].tolist()) and e.topics == ()
        assert e.history[0] == (str(walks[user][0]), f"B{walks[user][0]:04d}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("20 41", "item '41' is not in item_list.txt"),
        ("3 1", "user and items not used before"),
        ("21 1 1", "user and items not used before"),
    ],
)
def test_malformed_lines_of_books_are_named(tmp_path, line, message):
    write_kgat(tmp_path / "raw", extra=line + "\n")
    with pytest.raises(DataError, match=f"test.txt, line 21: .*{message}"):
        load(tmp_path / "raw", tmp_path / "prepared", "goalrank_book")


@real
def test_real_movielens(tmp_path, monkeypatch):
    monkeypatch.setattr(goalrank, "_OFFSETS", {**goalrank._OFFSETS, "train": range(2, 3)})  # less to write
    (tmp_path / "raw").mkdir()
    os.symlink(Path(RAW) / "ml-1m" / "ml-1m-first200k.zip", tmp_path / "raw" / "ml-1m-first200k.zip")
    dataset = load(tmp_path / "raw", tmp_path / "prepared", kcore=20, retrieved=50)
    assert lengths(dataset) == dict.fromkeys(("train", "validation", "test"), 1209) and len(dataset.catalogue) == 2023
    found = [np.mean([sum(e.relevance) for e in split]) / 6 for split in dataset.splits.values()]
    assert all(0.25 < share < 0.32 for share in found), found  # the first stage is no better in training


@real
def test_real_books():
    folder = Path(RAW) / "amazon-book"
    read = published.read_kgat(published.find_files(folder, published.KGAT, "amazon-book"))
    assert (len(read.sequences), len(read.texts)) == (70_679, 24_915)
    assert sum(map(len, read.sequences.values())) == 846_434
    assert len(retriever.core(read.sequences, 20)) == 3_194
