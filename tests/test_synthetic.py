"""The default world: what its documentation says of readers, pools and gains, and what can be known from what."""

import itertools
import json

import numpy as np
import pytest
from tiny import ROOT, changed

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
    """NDCG@5 and recall of ten, percent, of the Bayes ranking and of one that stays with the likeliest interest."""
    found = []
    for visit in visits:
        share = shares(articles, visit)
        worth = share * synthetic.GAINS[articles.pleasing[visit.pool_C]]
        likeliest = share == share.max()
        pair = []
        for order, slate in ((worth, share), (worth * likeliest, share * likeliest)):
            gains = visit.gain_C[np.argsort(-order, kind="stable")]
            chosen = visit.gain_C[np.argsort(-slate, kind="stable")][:10]
            pair += [metrics.ndcg(gains[:5], visit.gain_C, 5), (chosen > 0).sum() / (visit.gain_C > 0).sum()]
        found.append(pair)
    return (100 * np.mean(found, 0)).round(1).tolist()


def test_the_ceilings_in_the_documentation(articles, visits):
    ndcg, recall, committed, committed_recall = scores_of(articles, visits[1])
    text = " ".join(synthetic.__doc__.split())
    assert f"has NDCG@5 {ndcg}, one that stays with the likeliest interest {committed}" in text
    assert f"their slates have a recall of {recall} and {committed_recall}" in text
    assert ndcg > committed + 5 and recall > committed_recall + 20


def test_counting_finds_known_articles_and_no_new_ones(articles, visits):
    def example(number, visit):
        items = [(str(i), articles.names[i]) for i in range(len(articles.names))]
        return RankingExample(
            str(number), "", tuple(items[i] for i in visit.pool_C), tuple(visit.gain_C.tolist()),
            tuple(items[i] for i in visit.history),
        )  # fmt: skip

    catalogue = tuple((str(i), name) for i, name in enumerate(articles.names))
    train, test = ([example(n, v) for n, v in enumerate(part[:500])] for part in visits)
    counted = BASELINES["covisitation"](train, catalogue, "recommendation", 0)(test)
    for score, visit in zip(counted, visits[1]):
        assert not np.asarray(score)[~articles.known[visit.pool_C]].any()


def test_a_world_is_its_settings_alone(articles):
    np.random.seed(2)

    def first(config, split="train"):
        return list(itertools.islice(synthetic.make_visits(articles, config, split), 200))

    def same(a, b):
        return all(np.array_equal(x, y) for v, w in zip(a, b) for x, y in zip(v, w))

    assert same(first(DEFAULT), first(DEFAULT)) and not same(first(DEFAULT), first(SyntheticConfig(seed=1)))
    assert not same(first(DEFAULT), first(DEFAULT, "test"))
    alone = first(SyntheticConfig(interests=1, pool=20, wanted=(2, 2)))
    assert all(len(set(articles.shelf[v.history])) == 1 and (v.gain_C > 0).sum() == 2 for v in alone)


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


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(interests=0), "interests=0 must be 1 to 8: there are 16 shelves"),
        (dict(wanted=(6, 3)), "wanted=(6, 3) must be two numbers from 1 to 20, ascending"),
        (dict(pool=19), "pool=19 must be from 20, room for the wanted ones"),
        (dict(concentration=0.0), "concentration=0.0 must be above 0"),
        (dict(misplaced=1.0), "misplaced=1.0 must be in [0, 1)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_worlds_are_refused(fields, message):
    config = load_file(ROOT / "configs" / "synthetic.py")
    with pytest.raises(ValueError) as error:
        validate(changed(config, {f"data.synthetic.{name}": value for name, value in fields.items()}), KNOWN)
    assert f"data.synthetic.{message}" in str(error.value)
