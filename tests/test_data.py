"""Batches as functions of (seed, stage, step), and training pools that give nothing away."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fgrpo_jax.config import Config, DataConfig, EvalConfig, StageConfig
from fgrpo_jax.data import batches as data
from fgrpo_jax.data import lastfm, next_item
from fgrpo_jax.data.datasets import DataError, Dataset, in_memory
from fgrpo_jax.policies.ranker.config import RankerConfig
from fgrpo_jax.types import LoggedList, RankingExample

ITEMS = tuple((str(i), f"item {i}") for i in range(40))


def example(n, relevance=(1.0,), length=12):
    rng = np.random.default_rng(n)
    answer, *history = rng.permutation(40)[: length + 1]
    return RankingExample(
        f"train-{n // 4:05d}-{n:06d}", "", (ITEMS[answer],), relevance, tuple(ITEMS[i] for i in history)
    )


def dataset(train, sampled=True, catalogue=ITEMS, **splits):
    splits = {"train": in_memory(train), **{name: in_memory(rows) for name, rows in splits.items()}}
    return Dataset("tiny", "recommendation", "Rank.", catalogue, splits, sampled, {})


def batches(made, stage="sft", size=8, seed=0, subset=(0.0, 1.0), **fields):
    config = Config(seed=seed, data=DataConfig(pool_size=10, history_max=5, **fields))
    return data.make_batches(made, config, stage, StageConfig(batch_queries=size, subset=subset))


@pytest.fixture(scope="module")
def tiny():
    return dataset([example(n) for n in range(30)])


def ids(batch):
    return [e.query_id for e in batch]


def test_a_batch_is_a_function_of_seed_stage_and_step(tiny):
    one, other = batches(tiny), batches(tiny)
    late = other.batch_at(9)
    assert one.batch_at(3) == one.batch_at(3) == other.batch_at(3)
    assert one.batch_at(9) == late
    assert ids(one.batch_at(0)) != ids(batches(tiny, seed=1).batch_at(0))
    assert ids(one.batch_at(0)) != ids(batches(tiny, stage="rl").batch_at(0))


def test_every_epoch_shows_every_query_once_in_a_new_order(tiny):
    made = batches(tiny, size=15)
    epochs = [ids(made.batch_at(2 * e)) + ids(made.batch_at(2 * e + 1)) for e in range(3)]
    assert all(sorted(epoch) == sorted(tiny.splits["train"].query_ids) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(batches(tiny, size=64).batch_at(0)) == 64  # larger than the data set


def test_other_processes_read_the_same_batch():
    """With another hash seed: nothing depends on Python's hash."""
    code = (
        "from tests.test_data import *; "
        "print(batches(dataset([example(n) for n in range(30)]), history_dropout=0.5).batch_at(7))"
    )
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=True)
    here = batches(dataset([example(n) for n in range(30)]), history_dropout=0.5).batch_at(7)
    assert out.stdout.strip() == str(here)


def test_training_pools_hold_the_answer_and_unseen_items(tiny):
    made = batches(tiny)
    known = {e.query_id: e for e in tiny.splits["train"]}
    places = []
    for step in range(40):
        for shown in made.batch_at(step):
            whole = known[shown.query_id]
            assert len(set(shown.candidates)) == 10 and sum(shown.relevance) == 1
            assert shown.candidates[shown.relevance.index(1.0)] == whole.candidates[0]
            assert not set(shown.candidates) & set(whole.history)  # the whole history, not what is shown
            assert shown.history == whole.history[-5:]
            places.append(shown.relevance.index(1.0))
    assert np.bincount(places, minlength=10).min() > 15


def test_negatives_change_with_the_epoch_and_the_seed_only(tiny):
    def pools(made, epoch, size=30):
        return {e.query_id: frozenset(e.candidates) for e in made.batch_at(epoch)}

    first = pools(batches(tiny, size=30), 0)
    assert first == pools(batches(tiny, size=30, stage="rl"), 0)
    for other in (pools(batches(tiny, size=30), 1), pools(batches(tiny, size=30, seed=5), 0)):
        assert sum(first[q] == other[q] for q in first) == 0


def test_negatives_are_uniform_over_unseen_items():
    seen = {str(i) for i in range(10)}
    counts = np.zeros(40)
    for n in range(4000):
        for item, _ in data.negatives(ITEMS, seen, 5, data.generator("t", n), "q"):
            counts[int(item)] += 1
    assert not counts[:10].any()
    expected = 4000 * 5 / 30
    chi_square = ((counts[10:] - expected) ** 2 / expected).sum()
    assert chi_square < 60  # 29 degrees of freedom


def test_pools_that_cannot_be_made_are_refused(tiny):
    with pytest.raises(DataError, match="'q': only 20 of 40 items are unseen, 21 negatives are needed"):
        data.negatives(ITEMS, {str(i) for i in range(20)}, 21, data.generator(0), "q")
    crowd = RankingExample("many", "", ITEMS[:11], (1.0,) * 11)
    with pytest.raises(DataError, match="'many' has 11 relevant items, more than data.pool_size=10"):
        batches(dataset([crowd])).batch_at(0)


# ------------------------------------------------------------- the history-free look-up


def look_up(train_pools, train_answers, pools, answers, n_items):
    """R@1 and mean rank of "whose training pools overlap this pool most", in percent of chance.

    A candidate's score is the overlap of the pool with the training pools it was the answer
    of, less what chance gives and in its standard deviations, so that being a frequent
    answer gives nothing away.
    """
    together = np.zeros((n_items, n_items))
    times = np.bincount(train_answers, minlength=n_items)
    for pool, answer in zip(train_pools, train_answers, strict=True):
        together[answer, pool] += 1
    together[np.arange(n_items), np.arange(n_items)] = 0
    overlap_BC = together[pools[:, :, None], pools[:, None, :]].sum(2)
    times_BC = times[pools]
    typical = overlap_BC.sum() / times_BC.sum()
    score_BC = (overlap_BC - typical * times_BC) / np.sqrt(np.maximum(times_BC, 1))
    gold_B1 = np.take_along_axis(score_BC, np.argmax(pools == answers[:, None], 1)[:, None], 1)
    above = (score_BC > gold_B1).sum(1) + ((score_BC == gold_B1).sum(1) - 1) / 2
    return 100 * np.mean(above < 0.5), np.mean(above)


def test_training_pools_give_nothing_away():
    """The look-up finds the answer in S-DPO's training pools, and only chance in ours."""
    items = tuple((str(i), f"item {i}") for i in range(next_item.N_ITEMS))
    taken = next_item.sequences()
    train, held_out = taken[:4000], taken[4000:5000]
    rows = [
        RankingExample(f"train-{n:05d}-0", "", (items[s[-1]],), (1.0,), tuple(items[i] for i in s[:-1]))
        for n, s in enumerate(train)
    ]
    stage = StageConfig(batch_queries=len(rows))
    made = data.make_batches(dataset(rows, catalogue=items), Config(), "sft", stage)
    batch = made.batch_at(0)
    ours = np.array([[int(i) for i, _ in e.candidates] for e in batch])
    our_answers = np.array([int(e.candidates[e.relevance.index(1.0)][0]) for e in batch])
    recipe = np.array([lastfm.sdpo_pool(s[:-1].tolist(), int(s[-1]), len(items)) for s in train])
    pools = np.array([lastfm.sdpo_pool(s[:-1].tolist(), int(s[-1]), len(items)) for s in held_out])
    answers = held_out[:, -1]

    found, rank = look_up(recipe, train[:, -1], pools, answers, len(items))
    assert found > 60, "the look-up itself does not work"
    found, rank = look_up(ours, our_answers, pools, answers, len(items))
    assert found < 5 + 3 * 0.7, found  # chance: 5 %, standard error 0.7 over 1,000 queries
    assert abs(rank - 9.5) < 3 * 0.19, rank  # chance: 9.5, standard error 5.8 / sqrt(1000)


# ------------------------------------------------------------- subsets, skipping, history


def test_subsets_split_by_sequence():
    rows = [example(n) for n in range(400)]
    low = batches(dataset(rows), subset=(0.0, 0.6))
    high = batches(dataset(rows), subset=(0.6, 1.0))
    assert sorted([*low.rows, *high.rows]) == list(range(400))
    of = [{data.subset_key(rows[i].query_id) for i in part.rows} for part in (low, high)]
    assert not of[0] & of[1] and 40 < len(of[0]) < 80
    assert data.subset_key("train-00012-000345") == "train-00012"
    assert data.subset_key("2hop__1-2") == "2hop__1-2"


def test_queries_without_a_relevant_candidate_are_skipped_and_counted():
    rows = [example(n, relevance=(float(n % 3 > 0),)) for n in range(12)]
    made = batches(dataset(rows), size=8)
    assert made.skipped == 4 and len(made.rows) == 8
    assert set(ids(made.batch_at(0))) == {rows[n].query_id for n in range(12) if n % 3}
    with pytest.raises(DataError, match="nothing to train on.*3 of them without a relevant"):
        batches(dataset([example(n, relevance=(0.0,)) for n in range(3)]))
    with pytest.raises(DataError, match="no training split"):
        made = dataset(rows)
        batches(made._replace(splits={}))


def test_shown_lists_teach_those_who_read_them():
    """A ranker; a language model is trained on what is relevant, so that a query without is nothing to it."""
    logged = (LoggedList((0,), (0.0,)),)
    rows = [dataclasses.replace(example(n, relevance=(float(n % 3 > 0),)), logged=logged) for n in range(12)]
    made = dataset(rows)
    assert batches(made).skipped == 4
    data_config = DataConfig(pool_size=10, history_max=5)
    ranker = data.make_batches(made, RankerConfig(data=data_config), "evaluator", StageConfig(batch_queries=8))
    assert ranker.skipped == 0 and len(ranker.rows) == 12


def test_history_dropout_keeps_the_newest_and_is_for_training_only():
    rows = [example(n) for n in range(64)]
    made = dataset(rows, test=rows)
    known = {e.query_id: e.history[-5:] for e in rows}
    lengths = []
    for e in batches(made, size=64, history_dropout=0.5).batch_at(0):
        whole = known[e.query_id]
        assert e.history[-1] == whole[-1] and [i for i in whole if i in e.history] == list(e.history)
        lengths.append(len(e.history))
    assert 2.5 < np.mean(lengths) < 3.5  # 1 + 4 / 2
    config = Config(data=DataConfig(history_max=5, history_dropout=0.5))
    assert all(e.history == known[e.query_id] for e in data.evaluation_examples(made, config, "test"))


def test_given_pools_are_shown_whole_in_a_new_order():
    pool = ITEMS[:6]
    rows = [RankingExample(f"q{n}", "what?", pool, (0.0, 2.0, 0.0, 1.0, 0.0, 0.0)) for n in range(8)]
    made = batches(dataset(rows, sampled=False, catalogue=()))
    orders = set()
    for e in made.batch_at(0) + made.batch_at(1):
        assert dict(zip(e.candidates, e.relevance, strict=True)) == dict(zip(pool, rows[0].relevance, strict=True))
        orders.add(e.candidates)
    assert len(orders) > 12


# ------------------------------------------------------------- evaluation, hosts, buckets


def test_evaluation_order_depends_on_seed_and_query_only():
    pool = ITEMS[:20]
    rows = [RankingExample(f"q{n}", "", pool, (0.0,) * 20, ITEMS[20:28]) for n in range(5)]
    rows[0] = RankingExample("q0", "", pool, (0.0, 3.0) + (0.0,) * 18)
    made = dataset([example(0)], test=rows, validation=rows[::-1])
    shown = data.evaluation_examples(made, Config(), "test")
    assert ids(shown) == [f"q{n}" for n in range(5)]  # kept, although nothing is relevant
    assert shown[0].candidates[shown[0].relevance.index(3.0)] == pool[1]
    assert len({e.candidates for e in shown}) == 5 and all(set(e.candidates) == set(pool) for e in shown)
    assert data.evaluation_examples(made, Config(), "validation") == shown[::-1]
    assert data.evaluation_examples(made, Config(seed=1), "test") != shown
    with pytest.raises(DataError, match="no split 'dev', only train, test, validation"):
        data.evaluation_examples(made, Config(), "dev")


def test_a_sample_of_a_split_is_one_for_all_seeds_and_its_first_are_a_sample_too():
    """Of a split sorted by kind, as MuSiQue's is: first 300 of one kind, then 100 of another."""
    rows = [RankingExample(f"{2 + n // 300}hop__{n}", "what?", ITEMS[:3], (1.0, 0.0, 0.0)) for n in range(400)]
    made = dataset([example(0)], validation=rows)

    def sample(count, seed=0):
        return ids(data.evaluation_examples(made, Config(seed=seed, eval=EvalConfig(queries=count)), "validation"))

    chosen = sample(80)
    assert chosen == sample(80, seed=1) == sample(200)[:80] and len(set(chosen)) == 80
    assert 40 < sum(name.startswith("2hop") for name in chosen[:64]) < 60  # of 48
    assert sorted(sample(1000)) == sorted(ids(rows)) and sample(0) == ids(rows)


def test_buckets():
    assert [data.bucket(n, (40, 64), "q") for n in (1, 40, 41, 64)] == [40, 40, 64, 64]
    with pytest.raises(DataError, match=r"'q7' has a prompt of 65 tokens, longer than .*\(40, 64\)"):
        data.bucket(65, (40, 64), "q7")
