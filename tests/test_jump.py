"""Jumping ahead of what the grammar forces: the same rollouts as token by token, in fewer steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit
from transcript_cases import CASES, make_query

from fgrpo_jax.models import decoder, packing
from fgrpo_jax.policies.llm import jump, sampling
from fgrpo_jax.types import UNTRAINED

G = 6
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def model(spec):
    """One layer, for the tokens of the cases."""
    spec = spec._replace(vocab_size=48, num_layers=1)
    return spec, quick_jit(decoder.init, static_argnums=0)(spec, jax.random.key(0))


def prompted(case):
    """The pools of a case under prompts of different lengths."""
    query = make_query(case.pools)
    rng = np.random.default_rng(0)
    prompt = jnp.asarray(rng.integers(2, 48, (len(case.pools), 6)), jnp.int32)
    return query.replace(prompt=prompt, prompt_len=jnp.array([1, 3, 6, 4], jnp.int32))


@functools.partial(quick_jit, static_argnums=(0, 1, 5))
def both(sampler, pace, params, query, key, group):
    """Rollout and lists token by token, and jumping; its steps."""
    spec, grammar, *_ = sampler
    by_token = sampling.sample(sampler._replace(ahead=False), params, query, key, group)
    *jumping, steps = jump.sample(spec, grammar, pace, params, query, key, group)
    return by_token, tuple(jumping), steps


def check(by_token, jumping):
    (rollout, lists), (other, other_lists) = by_token, jumping
    np.testing.assert_array_equal(rollout.actions, other.actions)
    np.testing.assert_array_equal(rollout.phase, other.phase)
    np.testing.assert_allclose(rollout.logp, other.logp, atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, lists, other_lists)


@pytest.mark.parametrize(
    "name, pace",
    [("characters", (4, 14)), ("merged", (3, 6)), ("unseparated", (2, 9)), ("prefixes", (5, 30)), ("trie", (8, 20))],
)
@pytest.mark.parametrize("key", [KEY, None], ids=["sampled", "greedy"])
def test_the_same_rollouts_as_token_by_token(model, name, pace, key):
    """Names of several tokens, names within names, with and without separator; paces tight and wide."""
    spec, params = model
    sampler = sampling.Sampler(spec, CASES[name].grammar, constrained=True)
    by_token, jumping, steps = both(sampler, jump.Pace(*pace), params, prompted(CASES[name]), key, G)
    check(by_token, jumping)
    rollout = by_token[0]
    assert len({tuple(row) for row in rollout.actions[0].tolist()}) > 2 or key is None
    trained = (rollout.phase != UNTRAINED).sum(-1)
    assert trained.max() < steps + 1
