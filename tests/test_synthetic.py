"""The default world: what its documentation says of readers, pools and gains, and what can be known from what."""

import itertools
import json

import numpy as np
import pytest
from tiny import ROOT, changed, run_training

from fgrpo_jax import metrics
from fgrpo_jax.config import DataConfig, SyntheticConfig
from fgrpo_jax.config_files import load_file
from fgrpo_jax.data import datasets, synthetic
from fgrpo_jax.data.category_words import CATEGORIES
from fgrpo_jax.evaluation.baselines import BASELINES
from fgrpo_jax.policies.llm import prompts, tokenizers
from fgrpo_jax.run.experiment import KNOWN
from fgrpo_jax.run.validation import validate
from fgrpo_jax.types import RankingExample

DEFAULT = SyntheticConfig()


@pytest.fixture(scope="module")
def articles():
    return synthetic.make_articles(DEFAULT.seed)


@pytest.fixture(scope="module")
def visits(articles):
    """The first 1,000 training visits, and all test visits."""
    train = itertools.islice(synthetic.make_visits(articles, DEFAULT, "train"), 1000)
    return list(train), list(synthetic.make_visits(articles, DEFAULT, "test"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The world with fewer queries, as it is read back."""
    prepared = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "QUERIES", {"train": 400, "validation": 20, "test": 300})
        return datasets.load(DataConfig(prepared_dir=str(prepared))), prepared


def test_shelves_share_no_word(articles):
    shelves = [[w for name in names for w in synthetic.words_of(name)] for names in synthetic.SHELVES]
    words = [word for shelf in shelves for word in shelf]
    assert len(set(words)) == len(words) == 16 * 3 * synthetic.WORDS
    assert set(itertools.chain(*synthetic.SHELVES)) <= set(CATEGORIES)
    assert len(set(articles.names)) == len(articles.names) == 16 * (synthetic.KNOWN + synthetic.NEW)
    for name, shelf in zip(articles.names, articles.shelf):
        first, second = name.split()
        assert first in shelves[shelf] and second in shelves[shelf] and first != second
    as_pleasing = {(name.split()[0], pleasing) for name, pleasing in zip(articles.names, articles.pleasing)}
    assert len(as_pleasing) == len({first for first, _ in as_pleasing})  # as the word does that it begins with
    known_words = {w for name, known in zip(articles.names, articles.known) if known for w in name.split()}
    assert known_words == set(words)  # a new article is made of words that training sees


def test_pools_and_gains_are_as_documented(articles, visits):
    for part, found in zip(("train", "test"), visits):
        relevant, new, new_relevant = [], [], []
        for visit in found:
            pool, gain = visit.pool_C, visit.gain_C
            assert len({*pool, *visit.history}) == 80 + 10
            (shelf,) = set(articles.shelf[pool[gain > 0]])
            of_shelf = articles.shelf[pool] == shelf
            np.testing.assert_array_equal(gain, of_shelf * synthetic.GAINS[articles.pleasing[pool]])
            for read in set(articles.shelf[visit.history]):
                assert 3 <= (articles.shelf[pool] == read).sum() <= 6
            assert len(set(articles.shelf[visit.history])) <= 3
            assert articles.known[visit.history].all()
            relevant.append(of_shelf.sum())
            new.append(1 - articles.known[pool].mean())
            new_relevant.append(1 - articles.known[pool[of_shelf]].mean())
        assert set(relevant) == {3, 4, 5, 6}
        if part == "train":
            assert max(new) == 0
        else:
            assert abs(np.mean(new) - 1 / 3) < 0.01 and abs(np.mean(new_relevant) - 1 / 3) < 0.03
    places = [np.flatnonzero(v.gain_C).mean() / 79 for v in visits[1]]
    assert 0.47 < np.mean(places) < 0.53  # the frozen order says nothing


def test_what_is_read_pleases_and_pools_are_drawn_evenly(articles, visits):
    """Histories by exp(TASTE x pleasing), of a third of each kind; pools whatever it pleases, on every shelf."""
    weight = np.exp(synthetic.TASTE * np.arange(3))
    history = np.concatenate([visit.history for visit in visits[1]])
    pool = np.concatenate([visit.pool_C for visit in visits[1]])
    of_reader = np.concatenate([np.isin(articles.shelf[v.pool_C], articles.shelf[v.history]) for v in visits[1]])
    for numbers, expected in ((history, weight), (pool[of_reader], np.ones(3)), (pool[~of_reader], np.ones(3))):
        found = np.bincount(articles.pleasing[numbers], minlength=3) / len(numbers)
        np.testing.assert_allclose(found, expected / expected.sum(), atol=0.02)


def shares(articles, visit):
    """Of every candidate: the probability that its shelf is meant, given the history."""
    read = np.bincount(articles.shelf[visit.history], minlength=len(synthetic.SHELVES))
    total = synthetic.HISTORY + DEFAULT.interests * DEFAULT.concentration
    return np.where(read > 0, (read + DEFAULT.concentration) / total, 0.0)[articles.shelf[visit.pool_C]]


def test_the_history_tells_how_likely_an_interest_is_and_no_more(articles, visits):
    """Predicted shares are as often right as they say; the order of the history adds nothing."""
    predicted, happened, last = [], [], []
    for visit in visits[1]:
        share = shares(articles, visit)
        shelf = articles.shelf[visit.pool_C]
        for s in set(shelf[share > 0]):
            predicted.append(share[shelf == s][0])
            happened.append(visit.gain_C[shelf == s].max() > 0)
            last.append(articles.shelf[visit.history[-1]] == s)
    predicted, happened, last = (np.array(x, float) for x in (predicted, happened, last))
    for low, high in ((0.2, 0.3), (0.3, 0.4), (0.4, 0.6)):
        chosen = (predicted >= low) & (predicted < high)
        assert abs((happened - predicted)[chosen].mean()) < 3.5 * (0.25 / chosen.sum()) ** 0.5
    assert abs((happened - predicted)[last == 1].mean()) < 3.5 * (0.25 / last.sum()) ** 0.5


def scores_of(articles, visits):
    """NDCG@5 and recall of ten, percent, of the ranking and slate that are best given the history, and of the ones
    that stay with the likeliest shelf. Both metrics are parts of what a shelf has, so what it has divides."""
    found = []
    for visit in visits:
        shelf, gains = articles.shelf[visit.pool_C], synthetic.GAINS[articles.pleasing[visit.pool_C]]
        share = shares(articles, visit)
        of_shelf_CC = shelf[:, None] == shelf
        ideal = metrics.dcg(-np.sort(-gains * of_shelf_CC, -1), 5)
        worth, find = share * gains / ideal, share / of_shelf_CC.sum(-1)
        stay = shelf == shelf[share.argmax()]
        pair = []
        for order, slate in ((worth, find), (worth * stay, find * stay)):
            ranked = visit.gain_C[np.argsort(-order, kind="stable")]
            chosen = visit.gain_C[np.argsort(-slate, kind="stable")][:10]
            pair += [metrics.ndcg(ranked[:5], visit.gain_C, 5), (chosen > 0).sum() / (visit.gain_C > 0).sum()]
        found.append(pair)
    return (100 * np.mean(found, 0)).round(1).tolist()


def test_the_references_in_the_documentation(articles, visits):
    ndcg, recall, committed, committed_recall = scores_of(articles, visits[1])
    text = " ".join(synthetic.__doc__.split())
    assert f"gets an NDCG@5 of {ndcg} and a slate recall of {recall}" in text
    assert f"the likeliest shelf gets {committed} and {committed_recall}" in text
    assert ndcg > committed + 10 and recall > committed_recall + 30


def test_nothing_but_the_history_tells_what_is_meant(articles, visits):
    """Of the shelves that were read, those that are meant have as many articles, as new, as pleasing, as early."""
    sizes, means = {True: [], False: []}, {True: [], False: []}
    for visit in visits[1]:
        shelf = articles.shelf[visit.pool_C]
        for read in set(articles.shelf[visit.history]):
            at = np.flatnonzero(shelf == read)
            meant, of = bool(visit.gain_C[at[0]]), visit.pool_C[at]
            sizes[meant].append(len(at))
            means[meant].append((articles.known[of].mean(), articles.pleasing[of].mean(), at.mean()))
    for meant, other in zip(
        np.column_stack([sizes[True], means[True]]).T, np.column_stack([sizes[False], means[False]]).T
    ):
        error = (meant.var() / len(meant) + other.var() / len(other)) ** 0.5
        assert abs(meant.mean() - other.mean()) < 4 * error


def test_counting_finds_known_articles_and_no_new_ones(articles, visits):
    """Co-visitation orders the known ones well, and is far below who knows words."""
    catalogue = [(str(i), name) for i, name in enumerate(articles.names)]

    def example(number, visit):
        pool, history = (tuple(catalogue[i] for i in numbers) for numbers in (visit.pool_C, visit.history))
        return RankingExample(str(number), "", pool, tuple(visit.gain_C.tolist()), history)

    train, test = ([example(n, v) for n, v in enumerate(part)] for part in visits)
    counted = BASELINES["covisitation"](train, tuple(catalogue), "recommendation", 0)(test)
    found, above = [], []
    for score, visit in zip(counted, visits[1]):
        known, relevant = articles.known[visit.pool_C], visit.gain_C > 0
        assert not score[~known].any()
        found.append(metrics.ndcg(visit.gain_C[np.argsort(-score, kind="stable")][:5], visit.gain_C, 5))
        if (known & relevant).any():
            above.append((score[known & relevant].mean(), score[known & ~relevant].mean()))
    wanted, others = np.mean(above, 0)
    assert wanted > 3 * others and np.mean(found) < scores_of(articles, visits[1])[0] / 100 - 0.15


def test_a_world_is_its_settings_alone(articles):
    np.random.seed(2)

    def first(config, split="train"):
        return list(itertools.islice(synthetic.make_visits(articles, config, split), 200))

    def same(a, b):
        return all(np.array_equal(x, y) for v, w in zip(a, b) for x, y in zip(v, w))

    assert same(first(DEFAULT), first(DEFAULT)) and not same(first(DEFAULT), first(SyntheticConfig(seed=1)))
    assert not same(first(DEFAULT), first(DEFAULT, "test"))
    alone = first(SyntheticConfig(interests=1, pool=20, wanted=(2, 2)))
    for visit in alone:
        (read,) = set(articles.shelf[visit.history])
        assert (articles.shelf[visit.pool_C[visit.gain_C > 0]] == read).all() and (visit.gain_C > 0).sum() == 2


def test_misplaced_gains_are_those_of_training(articles):
    """Nothing else changes: the same visits, the same gains, a share of them on other candidates."""
    noisy, plain = SyntheticConfig(misplaced=0.3), DEFAULT
    for split in ("train", "test"):
        pairs = zip(*(itertools.islice(synthetic.make_visits(articles, c, split), 300) for c in (noisy, plain)))
        moved = []
        for wrong, right in pairs:
            assert np.array_equal(wrong.history, right.history) and np.array_equal(wrong.pool_C, right.pool_C)
            assert sorted(wrong.gain_C) == sorted(right.gain_C)
            moved += (wrong.gain_C[right.gain_C > 0] == 0).tolist()
        assert 0.25 < np.mean(moved) < 0.35 if split == "train" else not any(moved)


def test_it_is_read_back_as_it_was_made(small, articles):
    dataset, prepared = small
    assert not dataset.sampled_negatives and dataset.kind == "recommendation"
    for example, visit in zip(dataset.splits["validation"], synthetic.make_visits(articles, DEFAULT, "validation")):
        assert [int(i) for i, _ in example.candidates] == visit.pool_C.tolist()
        assert [int(i) for i, _ in example.history] == visit.history.tolist()
        assert list(example.relevance) == visit.gain_C.tolist()
    (home,) = (prepared / "synthetic").iterdir()
    assert json.loads((home / "candidates.json").read_text())["test"]["seed"] == DEFAULT.seed


def test_prompts_fill_their_bucket(small):
    """All prompts have one length, that of the default's bucket: a single program, no padding."""
    dataset, _ = small
    config = load_file(ROOT / "configs" / "synthetic.py")
    validate(config, KNOWN)
    tokenizer = tokenizers.load(config.tokenizer, dataset, config.transcript, config.prompt)
    texts = [
        prompts.render(e, dataset.kind, dataset.instruction, "text", config.transcript.slate_open)
        for e in dataset.splits["test"][:20]
    ]
    lengths = {len(ids) for ids in prompts.encode_prompts(tokenizer, texts, False, [str(i) for i in range(20)])}
    assert lengths == set(config.data.prompt_buckets)


def test_other_settings_and_constants_are_other_folders(small, monkeypatch):
    _, prepared = small
    before = {home.name for home in (prepared / "synthetic").iterdir()}
    monkeypatch.setattr(synthetic, "QUERIES", {"train": 3, "validation": 2, "test": 2})
    for changes in ({}, {"pool": 60}):
        made = datasets.load(DataConfig(prepared_dir=str(prepared), synthetic=SyntheticConfig(**changes)))
        assert len(made.splits["train"]) == 3 and len(made.splits["test"][0].candidates) == changes.get("pool", 80)
    assert len({home.name for home in (prepared / "synthetic").iterdir()} - before) == 2


def test_the_default_trains_and_ends_with_its_table(small, tmp_path, monkeypatch):
    """As it is configured, with fewer queries and steps and a smaller model: graded gains, names of two words."""
    monkeypatch.setattr(synthetic, "QUERIES", {"train": 400, "validation": 20, "test": 300})
    sizes = {"model.hidden_size": 8, "model.num_layers": 1, "model.mlp_size": 8, "model.head_dim": 4}
    short = {"sft.steps": 2, "rl.steps": 2, "sft.batch_queries": 8, "rl.batch_queries": 4, "rl.group_size": 2}
    places = {"run_dir": str(tmp_path / "run"), "data.prepared_dir": str(small[1]), "eval.batch_queries": 100}
    config = changed(load_file(ROOT / "configs" / "synthetic.py"), sizes | short | places)
    assert run_training(config) == 0
    found = json.loads((tmp_path / "run" / "eval" / "test" / "metrics.json").read_text())["methods"]
    assert set(found) == {"random", "popularity", "covisitation", "bm25", "sft", "rl"}
    for method in ("sft", "rl"):
        assert found[method]["slate_ndcg@5"]["mean"] >= found[method]["ndcg@5"]["mean"] > 0


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(interests=0), "interests=0 must be 1 to 8: there are 16 shelves"),
        (dict(wanted=(6, 3)), "wanted=(6, 3) must be two numbers from 1 to 20, ascending"),
        (dict(pool=19), "pool=19 must be from 20, room for the wanted ones"),
        (dict(concentration=0.0), "concentration=0.0 must be above 0"),
        (dict(misplaced=1.0), "misplaced=1.0 must be in [0, 1)"),
        (dict(misplaced=-0.1), "misplaced=-0.1 must be in [0, 1)"),
        (dict(misplaced=0.5, interests=1, wanted=(20, 20), pool=22), "misplaced needs room for 20 gains"),
        (dict(interests=9, pool=90), "interests=9 must be 1 to 8"),
        (dict(wanted=(0, 3)), "wanted=(0, 3) must be two numbers"),
        (dict(pool=1001), "pool=1001 must be from 20"),
        (dict(pool=9, interests=1), "pool=9 is smaller than the lists, of up to 10 items"),
        (dict(seed=-1), "seed=-1 must not be negative"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_worlds_are_refused(fields, message):
    config = load_file(ROOT / "configs" / "synthetic.py")
    with pytest.raises(ValueError) as error:
        validate(changed(config, {f"data.synthetic.{name}": value for name, value in fields.items()}), KNOWN)
    assert f"data.synthetic.{message}" in str(error.value)


def test_settings_of_others_are_refused():
    config = load_file(ROOT / "configs" / "synthetic.py")
    with pytest.raises(ValueError, match="data.pool_size=50: data.name='synthetic' does not read it; leave it"):
        validate(changed(config, {"data.pool_size": 50}), KNOWN)
    with pytest.raises(ValueError, match="data.synthetic.seed: 20263 -> 1: data.name='next_item' does not read it"):
        validate(changed(config, {"data.name": "next_item", "data.synthetic.seed": 1}), KNOWN)
