"""Every transcript of a policy over a pool of four, slates and rankings of two: what expectations are summed over."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import quick_jit, random_params
from tiny_ranker import SPEC, make_params, make_query

from fgrpo_jax.algorithm import rewards
from fgrpo_jax.algorithm.advantages import make_batch
from fgrpo_jax.algorithm.credit import SCHEMES
from fgrpo_jax.algorithm.objectives import clipped_pg, with_values
from fgrpo_jax.models import decoder
from fgrpo_jax.policies.llm import masks, sampling
from fgrpo_jax.policies.llm.grammar import Grammar, render
from fgrpo_jax.policies.llm.query import Query
from fgrpo_jax.policies.ranker import generator
from fgrpo_jax.types import OK, RANK, SLATE, Credit, Lists, Rollout

POOL, SIZE = 4, 2
RANKER = SPEC._replace(two_phase=True, list_length=SIZE, num_layers=1, list_layers=1)
LLM = decoder.DecoderSpec(
    vocab_size=16, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_size=8, init_std=0.5
)
BROKEN = rewards.broken_values(-0.1, (), (OK,))
TERMS = (("slate", "recall", 1.0), ("rank", "ndcg", 0.7))
JOINT = tuple((phase, name, weight) for phase in ("slate", "rank") for _, name, weight in TERMS)
GAINS = {"one": (0.0, 1.0, 0.0, 0.0), "graded": (0.0, 2.0, 0.5, 0.0), "none": (0.0, 0.0, 0.0, 0.0)}
BY_ITEM = [name for name, scheme in SCHEMES.items() if scheme.by_item]
UNBIASED = [name for name in SCHEMES if name not in ("group", "labels")]


class Ranker:
    """Every transcript of the two-phase generator over one pool."""

    params = make_params("generator", RANKER)

    def __init__(self, gains):
        query = make_query(batch=1, pool=POOL, spec=RANKER, full=True)
        self.query = query.replace(relevance=jnp.asarray([gains], jnp.float32))
        slates = list(itertools.permutations(range(POOL), SIZE))
        lists = [(*slate, *ranking) for slate in slates for ranking in itertools.permutations(slate)]
        self.actions = np.asarray(lists, np.int32)
        self.slate, self.ranking = self.actions[:, :SIZE], self.actions[:, SIZE:]
        self.phase = np.tile([SLATE, SLATE, RANK, 0], (len(lists), 1)).astype(np.int32)  # the last item is forced

    def turns(self, query, rollout):
        return generator.turns(RANKER, query, rollout)

    def choices(self, params, query, rollout):
        return generator.choices(RANKER, generator.encode(RANKER, params, query), rollout)


class Llm:
    """Every transcript of 1 or 2 items and a ranking of 1 or 2, names of two tokens; some share the first."""

    names = ((10, 12), (10, 13), (11, 12), (14, -1))
    grammar = Grammar((3, 4), (3, 5), (3, 6), eos=1, slate_min=1, slate_max=SIZE, rank_min=1, rank_max=SIZE)

    def __init__(self, gains):
        self.params, prompt = random_params(LLM), jnp.asarray([[7, 8, 9]], jnp.int32)
        names, gains, count = jnp.asarray([self.names]), jnp.asarray([gains], jnp.float32), jnp.asarray([POOL])
        self.query = Query(prompt, jnp.asarray([3]), names, gains, count)
        slates = [slate for n in (1, 2) for slate in itertools.permutations(range(POOL), n)]
        lists = [(s, r) for s in slates for n in range(1, len(s) + 1) for r in itertools.permutations(s, n)]
        of_size = [np.asarray([[*x, -1][:SIZE] for x in one], np.int32) for one in zip(*lists, strict=True)]
        self.slate, self.ranking = of_size
        self.actions = np.asarray(render(self.grammar, self.query, *(jnp.asarray(x)[None] for x in of_size))[0][0])
        options = masks.choices(self.grammar, self.query)
        parsed = quick_jit(masks.parse, static_argnums=0)(self.grammar, self.query, options, self.actions[None])
        self.phase = np.asarray(jnp.where(parsed[2].allowed.sum(-1) > 1, parsed[1], 0)[0])
        np.testing.assert_array_equal(parsed[0].outcome, 0)

    def turns(self, query, rollout):
        return masks.turns(self.grammar, query, rollout)

    def choices(self, params, query, rollout):
        return sampling.choices(sampling.Sampler(LLM, self.grammar, True), params, query, rollout)


WORLDS = {("ranker", gains): (Ranker, GAINS[gains]) for gains in GAINS}
WORLDS[("llm", "graded")] = Llm, GAINS["graded"]


@functools.cache
def world(name):
    kind, gains = WORLDS[name]
    made = kind(gains)
    every = rollout_of(made, np.arange(len(made.actions))[None])

    def choices(params):
        return made.choices(params, made.query, every)

    made.logp, made.share = (np.asarray(x[0]) for x in quick_jit(choices)(made.params))
    made.pull = quick_jit(lambda slopes: jax.vjp(choices, made.params)[1](slopes))
    made.probability = np.exp(np.asarray(made.logp, np.float64).sum(-1))
    np.testing.assert_allclose(made.probability.sum(), 1, rtol=1e-5)
    return made


def rollout_of(made, index_BG):
    phase = jnp.asarray(made.phase)[index_BG]
    return Rollout(jnp.asarray(made.actions)[index_BG], phase, jnp.zeros(phase.shape))


@functools.partial(quick_jit, static_argnums=(0, 1))
def groups_of(made, credit, index_BG):
    """The batch of these groups of transcripts, weights 1; each was credited beside another query's group."""

    def one(index_G):
        index_2G = jnp.stack([index_G, (5 + 7 * jnp.arange(len(index_G))) % len(made.actions)])
        query = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, *x.shape[1:])), made.query)
        rollout, outcome = rollout_of(made, index_2G), jnp.zeros(index_2G.shape, jnp.int32)
        lists = Lists(jnp.asarray(made.slate)[index_2G], jnp.asarray(made.ranking)[index_2G], outcome)
        reward = rewards.term_rewards(credit, lists, query, {}, SIZE, BROKEN)
        batch = make_batch(query, rollout, reward, credit, "constant")
        turns = made.turns(query, rollout)
        credited = SCHEMES[credit.scheme].assign(credit, SIZE, BROKEN, batch, lists, turns)
        return jax.tree.map(lambda x: x[0], credited)

    batch = jax.vmap(one)(jnp.asarray(index_BG))
    return batch.replace(weight=(batch.rollout.phase > 0).astype(jnp.float32))


@functools.partial(quick_jit, static_argnums=2)
def slopes(batch, scores, value_by):
    """Gradient of what the update maximises by (logp_BGT, probability_BGTC)."""
    plain = clipped_pg()
    objective = with_values(plain, value_by) if value_by else lambda scores, batch: plain(scores[0], batch)
    return jax.grad(lambda scores: -objective(scores, batch)[0])(scores)


def expected_slopes(made, credit):
    """Of every transcript, over all pairs, each by its probability; summed in float64."""
    pairs = np.stack(np.meshgrid(*[np.arange(len(made.actions))] * 2, indexing="ij"), -1).reshape(-1, 2)
    batch, scores = groups_of(made, credit, pairs), (made.logp[pairs], made.share[pairs])
    weight = made.probability[pairs].prod(-1) / 2  # of a rollout: half of its group
    found = []
    for slope in slopes(batch, scores, SCHEMES[credit.scheme].value_by):
        total = np.zeros((len(made.actions), *slope.shape[2:]))
        by_rollout = weight.reshape(-1, *[1] * (slope.ndim - 1)) * np.asarray(slope, np.float64)
        np.add.at(total, pairs, by_rollout)
        found.append(total)
    return found


def enumerated_slopes(made, terms):
    """Of sum over transcripts of p * (reward of each phase * log-probability of its actions)."""
    batch = groups_of(made, Credit(terms), np.arange(len(made.actions))[:, None])
    reward = np.asarray(batch.reward[:, 0], np.float64)
    by_phase = {"slate": made.phase == SLATE, "rank": made.phase == RANK}
    returned = sum(w * reward[:, r, None] * by_phase[p] for r, (p, _, w) in enumerate(terms))
    return [made.probability[:, None] * returned, np.zeros((*made.actions.shape, POOL))]


def gradient(made, slopes):
    """Of the parameters; linear in the slopes."""
    return made.pull(tuple(jnp.asarray(x, jnp.float32)[None] for x in slopes))[0]


def difference(made, a, b):
    return size(gradient(made, [x - y for x, y in zip(a, b, strict=True)]))


def size(tree):
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))
