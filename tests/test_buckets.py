"""Prompt buckets chosen from the data: which, when, and that a run keeps them."""

import json
from pathlib import Path

import pytest
from helpers import quick_runs
from hypothesis import given
from hypothesis import strategies as st
from tiny import ITEMS, changed, rows, run_training, tiny_config, write_world

from fgrpo_jax import policies
from fgrpo_jax.config import ConfigError
from fgrpo_jax.data import datasets
from fgrpo_jax.data.batches import evaluation_examples, make_batches
from fgrpo_jax.data.datasets import DataError, Dataset, in_memory
from fgrpo_jax.policies.llm import buckets
from fgrpo_jax.run import directory
from fgrpo_jax.run.sharding import make_mesh
from fgrpo_jax.types import RankingExample


def test_half_and_nine_tenths_of_the_prompts_and_the_longest():
    assert buckets.choose([10] * 5 + [100] * 4 + [400], 900) == (16, 104, 960)
    assert buckets.choose([31] * 10, 31) == (32,)
    assert buckets.choose([250, 251, 252], 300) == (256, 320)
    assert buckets.choose([240], 250) == (256,)  # 240 saves too little
    assert buckets.choose([5000] * 9, 5001) == (5120,)


@given(st.lists(st.integers(1, 10_000), min_size=1), st.integers(0, 5000))
def test_buckets_ascend_and_hold_everything(lengths, more):
    found = buckets.choose(lengths, max(lengths) + more)
    assert list(found) == sorted(set(found)) and max(lengths) + more <= found[-1] <= 1.3 * (max(lengths) + more) + 8
    assert len(found) <= 3


def sizes(dataset):
    """Lines of a prompt are the tokens of a catalogue: instruction, headings, items, the slate's opening."""

    def lengths(examples):
        return [len(e.history) + len(e.candidates) + 4 for e in examples]

    return lengths


ITEM = tuple((str(i), text) for i, text in enumerate(ITEMS))


@pytest.mark.parametrize("sampled, longest", [(False, 9 + 2 + 4), (True, 12 + 7 + 4)])
def test_the_longest_prompt_is_that_of_all_splits_or_of_any_pool_that_may_be_drawn(tmp_path, sampled, longest):
    """Histories are cut to history_max=7; drawn pools have pool_size=12."""
    train = [RankingExample(f"t{n}", "", ITEM[:3], (1.0, 0.0, 0.0), ITEM[4 : 4 + n]) for n in range(1, 5)]
    test = [RankingExample("long", "", ITEM[:9], (1.0,) * 9, ITEM[10:12])]
    dataset = Dataset(
        "x", "recommendation", "", ITEM, {"train": in_memory(train), "test": in_memory(test)}, sampled, {}
    )
    config = changed(tiny_config(tmp_path, tmp_path, tmp_path), {"data.history_max": 7, "data.pool_size": 12})
    seen, most = buckets.measure(config, sizes(dataset), dataset)
    pool = 12 if sampled else 3
    assert sorted(seen) == [n + pool + 4 for n in range(1, 5)] and most == longest
    only = dataset._replace(splits={"test": in_memory(test)}, sampled_negatives=False)
    assert buckets.measure(config, sizes(only), only) == ([15], 15)


def test_the_longest_prompt_need_not_have_the_longest_text(tmp_path):
    """As rare words have more tokens: every query is measured, not those with the most characters."""
    rows = [RankingExample(f"q{n}", "x" * (1000 - n), ITEM[:3], (1.0, 0.0, 0.0)) for n in range(900)]
    dataset = Dataset("x", "qa", "", ITEM, {"train": in_memory(rows[:1]), "test": in_memory(rows)}, False, {})
    config = tiny_config(tmp_path, tmp_path, tmp_path)
    _, most = buckets.measure(config, lambda examples: [int(e.query_id[1:]) + 1 for e in examples], dataset)
    assert most == 900


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The same run with "auto", and with the buckets that it chose."""
    folder = tmp_path_factory.mktemp("auto")
    write_world(folder, train=24, validation=6, test=4)
    config = tiny_config(folder, folder / "prepared", folder / "auto", sft_steps=2)
    config = changed(config, {"data.prompt_buckets": "auto", "eval.split": "test"})
    with quick_runs():
        assert run_training(config) == 0
        chosen = json.loads((folder / "auto" / "prompt_buckets.json").read_text())["prompt_buckets"]
        given = {"data.prompt_buckets": tuple(chosen), "run_dir": str(folder / "given")}
        assert run_training(changed(config, given)) == 0
    return config, tuple(chosen)


def test_a_run_with_chosen_buckets_is_the_run_that_was_given_them(run):
    config, chosen = run
    given = Path(config.run_dir).with_name("given")
    assert rows(config.run_dir) == rows(given) and not (given / "prompt_buckets.json").exists()
    assert directory.read_config(Path(config.run_dir)).data.prompt_buckets == "auto"
    assert chosen == (16,) or len(chosen) > 1


def test_every_prompt_has_a_bucket(run):
    config, chosen = run
    dataset = datasets.load(config.data)
    policy = policies.make(config, dataset, Path("/nowhere"))["llm"]
    every = [e for split in dataset.splits for e in evaluation_examples(dataset, config, split)]
    lengths = policy.encode([*every, *make_batches(dataset, config, "sft", config.sft).batch_at(0)]).prompt_len
    assert max(lengths) <= chosen[-1]


def test_a_run_keeps_its_buckets(run, tmp_path):
    config, _ = run
    dataset = datasets.load(config.data)
    (tmp_path / "prompt_buckets.json").write_text('{"prompt_buckets": [48]}')
    policy = policies.make(config, dataset, tmp_path)["llm"]
    assert policy.encode(dataset.splits["test"][:2]).prompt.shape == (2, 48)
    policy.files.save(tmp_path)
    assert json.loads((tmp_path / "prompt_buckets.json").read_text()) == {"prompt_buckets": [48]}
    (tmp_path / "prompt_buckets.json").write_text('{"prompt_buckets": ["48"]}')
    with pytest.raises(
        ConfigError, match="prompt_buckets.json holds no prompt buckets: restore it, or set data.prompt"
    ):
        policies.make(config, dataset, tmp_path)


def test_queries_are_checked_with_the_history_that_is_shown(tmp_path):
    """Data may hold more of it than prompts do."""
    rows = [RankingExample(f"q{n}", "", ITEM[:6], (1.0,) + (0.0,) * 5, ITEM[6:20]) for n in range(3)]
    splits = {"train": in_memory(rows), "test": in_memory(rows)}
    dataset = Dataset("x", "recommendation", "Choose.", ITEM, splits, False, {})
    config = tiny_config(tmp_path, tmp_path, tmp_path)
    config = changed(config, {"data.history_max": 3, "data.prompt_buckets": "auto"})
    policy = policies.make(config, dataset, tmp_path)["llm"]
    policy.check(make_mesh(1, 1, 1), dataset, "test")
    assert policy.encode(make_batches(dataset, config, "sft", config.sft).batch_at(0)).prompt.shape[1] == 16
    with pytest.raises(DataError, match="has a prompt of 24 tokens"):
        policy.encode(rows)
