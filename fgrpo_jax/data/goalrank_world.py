"""goalrank_world: a generated world of shown lists, in which the best list is not the best items.

An item has a topic and a quality, both fixed; a user likes some topics, and items within them
by a latent taste. The score of item i for user u is

    s(u, i) = liking(u, i) + QUALITY quality[i],   liking(u, i) = TASTE taste[u, topic i] + LATENT u . v_i

The history shows what is liked (drawn by liking alone, CHOICE); what is good only feedback shows. The
true gain of an item is the number of THRESHOLDS that s(u, i) reaches: 0 (not relevant) to 3.

**What is shown.** A noisy first stage scores every item that the history lacks with

    retrieval(u, i) = SEES s(u, i) + POPULAR popularity[i] + NOISE e(u, i),   e normal

and proposes the POOL best. Lists of LENGTH items were drawn from the pool by the logging policy:
the retrieval order with Gumbel noise (LOGGED_NOISE), one in EXPLORE lists uniform.

**What users do.** At position t (from 1) of a list an item is taken with probability

    P(taken) = TAKEN / log2(1 + t)  x  gain / 3  x  (1 - SATIATION)^(relevant items of its topic before it)

that is, positions are examined as nDCG discounts them, and a topic satiates. So the expected number
of items taken is alpha-DCG (`metrics.alpha_dcg`, alpha = SATIATION) times TAKEN / 3. Nothing that sees
one item at a time can know it: the best list by it is not the list of the best items.

**Training queries** know what was observed: LISTS shown lists with sampled 0/1 feedback; relevance
is 1 where an item was taken in any of them, 0 elsewhere, shown or not. Users do not return.
**Evaluation queries** have the true gain of every candidate as relevance; lists with feedback too, to
judge models of the feedback by. All of it comes from SEED, whatever the seed of the run; the constants
were chosen on other seeds than SEED.

On the 1,000 test queries, alpha-nDCG@6 (four pools hold nothing relevant): random 33.4, retrieval order
55.2, the truly best items in order 86.9, the truly best list 99.6.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from fgrpo_jax.data.builder import RankingBuilder
from fgrpo_jax.data.datasets import Item
from fgrpo_jax.data.next_item import ADJECTIVES
from fgrpo_jax.types import LoggedList, RankingExample

SEED = 22046
QUERIES = {"train": 24_000, "validation": 500, "test": 1000}
N_ITEMS, LATENT_DIM = 500, 4
POOL, LENGTH, LISTS = 50, 6, 8
HISTORY = (10, 20)  # items of a history, from and to
TASTE, QUALITY, LATENT, LIKED = 1.6, 0.7, 0.5, 2  # LIKED topics a user likes, on average
THRESHOLDS = (1.6, 2.3, 3.0)
SEES, POPULAR, NOISE = 0.7, 0.4, 0.8
LOGGED_NOISE, EXPLORE = 0.5, 4
TAKEN, SATIATION = 0.9, 0.5
CHOICE = 1.5  # how sharply the items of a history follow the score

TOPICS = "jazz poetry hiking cooking astronomy history painting cinema".split()


class World(NamedTuple):
    """topic_I, quality_I, popularity_I, latent_ID: of the items."""

    topic_I: np.ndarray
    quality_I: np.ndarray
    popularity_I: np.ndarray
    latent_ID: np.ndarray


class User(NamedTuple):
    """history: item indices. pool_C, retrieval_C, gain_C: candidates in pool order, which says nothing.

    shown_JT: places in the pool; taken_JT: 0 or 1.
    """

    history: np.ndarray
    pool_C: np.ndarray
    retrieval_C: np.ndarray
    gain_C: np.ndarray
    shown_JT: np.ndarray
    taken_JT: np.ndarray


def make_world(seed: int = SEED) -> World:
    rng = np.random.default_rng([seed, 0])
    return World(
        topic_I=rng.permutation(np.arange(N_ITEMS) % len(TOPICS)),
        quality_I=rng.normal(size=N_ITEMS),
        popularity_I=rng.normal(size=N_ITEMS),
        latent_ID=rng.normal(size=(N_ITEMS, LATENT_DIM)) / LATENT_DIM**0.5,
    )


def take_probability(gain_JT: np.ndarray, topic_JT: np.ndarray) -> np.ndarray:
    """P(taken) at every position of lists, as in the module's docstring."""
    before_TT = np.tri(gain_JT.shape[1], k=-1, dtype=bool)
    same_JTT = topic_JT[:, :, None] == topic_JT[:, None, :]
    repeats_JT = (before_TT & same_JTT & (gain_JT[:, None, :] > 0)).sum(-1)
    examined_T = TAKEN / np.log2(np.arange(gain_JT.shape[1]) + 2)
    return examined_T * gain_JT / len(THRESHOLDS) * (1 - SATIATION) ** repeats_JT


def make_user(world: World, seed: int, split: int, number: int) -> User:
    """A function of (seed, split, number) alone."""
    rng = np.random.default_rng([seed, 1, split, number])
    taste_Z = np.where(rng.random(len(TOPICS)) < LIKED / len(TOPICS), rng.uniform(0.5, 1.5, len(TOPICS)), 0.0)
    latent_D = rng.normal(size=LATENT_DIM)
    liking_I = TASTE * taste_Z[world.topic_I] + LATENT * world.latent_ID @ latent_D
    score_I = liking_I + QUALITY * world.quality_I
    size = rng.integers(HISTORY[0], HISTORY[1] + 1)
    history = np.argsort(-(CHOICE * liking_I + rng.gumbel(size=N_ITEMS)))[:size]
    history = rng.permutation(history)
    found_I = SEES * score_I + POPULAR * world.popularity_I + NOISE * rng.normal(size=N_ITEMS)
    found_I[history] = -np.inf
    pool_C = rng.permutation(np.argsort(-found_I)[:POOL])
    gain_C = (score_I[pool_C, None] >= np.array(THRESHOLDS)).sum(1)
    explore_J = rng.random((LISTS, 1)) < 1 / EXPLORE
    order_JC = np.where(explore_J, 0.0, found_I[pool_C] / LOGGED_NOISE) + rng.gumbel(size=(LISTS, POOL))
    shown_JT = np.argsort(-order_JC, axis=1)[:, :LENGTH]
    chance_JT = take_probability(gain_C[shown_JT], world.topic_I[pool_C][shown_JT])
    taken_JT = rng.random(chance_JT.shape) < chance_JT
    return User(history, pool_C, found_I[pool_C], gain_C, shown_JT, taken_JT)


class GoalrankWorld(RankingBuilder, skip_registration=True):
    instruction = "Choose and rank the items this user takes, none too like the others."
    optional = ("retrieval", "topics", "logged")

    def split_names(self) -> tuple[str, ...]:
        return tuple(QUERIES)

    @cached_property
    def _world(self) -> World:
        return make_world()

    def catalogue(self) -> tuple[Item, ...]:
        """Named by topic: `amber jazz 3`; a name occurs once."""
        met, items = Counter(), []
        for i, topic in enumerate(self._world.topic_I.tolist()):
            number, adjective = divmod(met[topic], len(ADJECTIVES))
            met[topic] += 1
            items.append((str(i), f"{ADJECTIVES[adjective]} {TOPICS[topic]} {number + 1}"))
        return tuple(items)

    def frozen(self, split: str) -> dict[str, Any]:
        return {"seed": SEED, "negatives": f"the {POOL} items that a noisy first stage scores best; pool shuffled"}

    def examples(self, split: str) -> Iterator[RankingExample]:
        items, world, part = self.catalogue(), self._world, tuple(QUERIES).index(split)
        for number in range(QUERIES[split]):
            user = make_user(world, SEED, part, number)
            gain_C = user.gain_C
            if split == "train":
                gain_C = np.zeros(POOL)
                gain_C[user.shown_JT[user.taken_JT]] = 1.0
            shown = zip(user.shown_JT.tolist(), user.taken_JT.astype(float).tolist(), strict=True)
            yield RankingExample(
                query_id=f"{split}-{number:05d}",
                query="",
                candidates=tuple(items[i] for i in user.pool_C),
                relevance=tuple(gain_C.astype(float).tolist()),
                history=tuple(items[i] for i in user.history),
                retrieval=tuple(user.retrieval_C.tolist()),
                topics=tuple(world.topic_I[user.pool_C].tolist()),
                logged=tuple(LoggedList(tuple(places), tuple(taken)) for places, taken in shown),
            )
