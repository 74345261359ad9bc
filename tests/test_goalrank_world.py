"""The generated world of shown lists: what is known of it, and that the best items are not the best list."""

import numpy as np
import pytest
from raw_files import lengths

from fgrpo_jax import metrics
from fgrpo_jax.config import DataConfig
from fgrpo_jax.data import datasets, goalrank_world

TRAIN = 600


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """With fewer training queries: each is a function of its number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(goalrank_world.QUERIES, "train", TRAIN)
        return _load(tmp_path_factory)


def _load(tmp_path_factory):
    return datasets.load(DataConfig(name="goalrank_world", prepared_dir=str(tmp_path_factory.mktemp("prepared"))))


def arrays(split):
    rows = list(split)
    return (np.array([getattr(e, name) for e in rows]) for name in ("relevance", "topics", "retrieval"))


def best_lists(score_QC, topics_QC):
    """Six items one after the other, each by its score halved for every item of its topic before it."""
    lists = np.zeros((len(score_QC), 6), int)
    for score_C, topics_C, chosen in zip(score_QC.copy(), topics_QC, lists):
        for t in range(6):
            chosen[t] = score_C.argmax()
            score_C[topics_C == topics_C[chosen[t]]] *= 0.5
            score_C[chosen[t]] = -1
    return lists


def test_the_documented_shape(world):
    assert (world.kind, world.sampled_negatives) == ("recommendation", False)
    assert lengths(world) == {"train": TRAIN, "validation": 500, "test": 1000}
    assert len(dict(world.catalogue)) == len({text for _, text in world.catalogue}) == 500
    topic = {}
    for split in world.splits.values():
        for e in split.rows(range(0, 500, 5)):
            assert len(set(e.candidates)) == len(e.retrieval) == 50 and 10 <= len(e.history) <= 20
            assert not set(e.candidates) & set(e.history)
            assert set(e.candidates) | set(e.history) <= set(world.catalogue)
            assert [len(shown.items) for shown in e.logged] == [6] * 8
            for item, number in zip(e.candidates, e.topics):
                assert topic.setdefault(item, number) == number


def test_training_relevance_is_what_was_observed(world):
    for e in world.splits["train"].rows(range(200)):
        taken = {i for shown in e.logged for i, f in zip(shown.items, shown.feedback) if f}
        assert e.relevance == tuple(float(i in taken) for i in range(50))
    assert all(world.splits["train"].trainable)  # also where nothing was taken of what was shown
    assert {g for e in world.splits["test"].rows(range(50)) for g in e.relevance} == {0, 1, 2, 3}


def test_the_best_list_is_not_the_list_of_the_best_items(world):
    gain_QC, topics_QC, retrieval_QC = arrays(world.splits["test"])

    def found(lists_QK):
        listed = metrics.take_gains(gain_QC, lists_QK), gain_QC, 6, metrics.take_topics(topics_QC, lists_QK), topics_QC
        return 100 * np.mean(metrics.alpha_ndcg(*listed))

    by_gain = found(np.argsort(-gain_QC, axis=1, kind="stable")[:, :6])
    by_retrieval = found(np.argsort(-retrieval_QC, axis=1)[:, :6])
    pool_order = found(np.tile(np.arange(6), (len(gain_QC), 1)))
    ceiling = found(best_lists(gain_QC, topics_QC))
    assert ceiling > 99  # some pools hold nothing relevant
    assert by_gain < 0.9 * ceiling
    assert pool_order + 10 < by_retrieval < 0.6 * ceiling


def test_feedback_follows_the_documented_probability(world):
    """Summed over lists, what was taken is alpha-DCG times a constant; positions and topics matter."""
    expected, taken, again = [], [], []
    for e in world.splits["test"].rows(range(500)):
        gain_C, topics_C = np.array(e.relevance), np.array(e.topics)
        for shown in e.logged:
            items = np.array(shown.items)
            chance_JT = goalrank_world.take_probability(gain_C[items][None], topics_C[items][None])
            ours = metrics.alpha_dcg(gain_C[items], topics_C[items])
            assert chance_JT.sum() == pytest.approx(goalrank_world.TAKEN / 3 * ours)
            expected.append(chance_JT[0])
            taken.append(shown.feedback)
            repeats = [(topics_C[items[:t]] == topics_C[items[t]])[gain_C[items[:t]] > 0].sum() for t in range(6)]
            again.append(np.array(repeats) > 0)
    expected, taken, again = np.array(expected), np.array(taken), np.array(again)
    np.testing.assert_allclose(taken.mean(0), expected.mean(0), atol=0.025)
    assert taken.mean(0)[0] > 1.5 * taken.mean(0)[-1]
    assert taken[again].mean() == pytest.approx(expected[again].mean(), abs=0.02)


def test_the_world_does_not_depend_on_global_random_state(world):
    np.random.seed(3)
    made = goalrank_world.make_world()
    user = goalrank_world.make_user(made, goalrank_world.SEED, 2, 17)
    e = world.splits["test"][17]
    assert [int(i) for i, _ in e.candidates] == user.pool_C.tolist()
    assert e.relevance == tuple(user.gain_C)
    np.testing.assert_allclose(e.retrieval, user.retrieval_C, rtol=1e-6)
