"""Sampling against all transcripts there are: the pools of the tests allow 620 at most."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from fgrpo_jax.models import draw
from fgrpo_jax.policies.llm import masks, sampling, transcript
from fgrpo_jax.policies.llm.transcript import OUTCOMES
from fgrpo_jax.types import RANK, SLATE, UNTRAINED, Rollout

B, G = 3, 620
KEY = jax.random.key(3)
sample = quick_jit(sampling.sample, static_argnums=(0, 4))


def all_lists(grammar, n):
    """Every slate and ranking over a pool of n, padded with -1."""
    for size in range(min(grammar.slate_min, n), min(grammar.slate_max, n) + 1):
        for slate in itertools.permutations(range(n), size):
            for k in range(grammar.rank_min, min(grammar.rank_max, size) + 1):
                for ranking in itertools.permutations(slate, k):
                    yield (
                        slate + (-1,) * (grammar.slate_max - size),
                        ranking + (-1,) * (grammar.rank_max - k),
                    )


@pytest.fixture(scope="module", params=[True, False], ids=["constrained", "free"])
def sampler(request, spec, grammar):
    return sampling.Sampler(spec, grammar, constrained=request.param)


@pytest.fixture(scope="module")
def constrained(spec, grammar):
    return sampling.Sampler(spec, grammar, constrained=True)


def read(sampler, query, actions):
    """Lists, labels and, when constrained, the number of allowed tokens [B,G,T]."""

    def parse(query, actions):
        options = masks.choices(sampler.grammar, query)
        lists, label, decided = masks.parse(sampler.grammar, query, options, actions)
        return lists, label, decided.allowed.sum(-1)

    return jax.device_get(quick_jit(parse)(query, actions))


@pytest.fixture(scope="module")
def sampled(sampler, params, query):
    return jax.device_get(sample(sampler, params, query, KEY, G))


@pytest.fixture(scope="module")
def trainer():
    """Log-probabilities and the gradient of the weighted sum of the rollouts' probabilities."""

    def logprobs(sampler, params, query, rollout, weight_BG):
        def total(params):
            logp_BGT = sampling.logprobs(sampler, params, query, rollout)
            return (weight_BG * jnp.exp(logp_BGT.sum(-1))).sum(), logp_BGT

        gradient, logp_BGT = jax.grad(total, has_aux=True)(params)
        return logp_BGT, gradient

    return quick_jit(logprobs, static_argnums=0)


@pytest.fixture(scope="module")
def everything(constrained, params, query, trainer):
    """Per query, each possible transcript (as its lists) and its probability; and the gradient."""
    grammar = constrained.grammar
    lists = [list(all_lists(grammar, n)) for n in query.n_candidates.tolist()]
    padded = [some + some[:1] * (G - len(some)) for some in lists]
    slate, ranking = (np.array([[x[i] for x in some] for some in padded], np.int32) for i in (0, 1))
    actions, _ = quick_jit(transcript.render, static_argnums=0)(grammar, query, slate, ranking)
    _, label, n_allowed = read(constrained, query, actions)
    phase = np.where(n_allowed == 1, UNTRAINED, label)
    rollout = Rollout(actions, jnp.asarray(phase), jnp.zeros(phase.shape))
    once = np.array([[g < len(some) for g in range(G)] for some in lists], np.float32)
    logp, gradient = trainer(constrained, params, query, rollout, once)
    probability = np.exp(np.asarray(logp, np.float64).sum(-1))
    return [dict(zip(some, p, strict=False)) for some, p in zip(lists, probability, strict=True)], gradient


# --------------------------------------------------------------------- probabilities


def test_sampler_and_trainer_agree(sampler, sampled, params, query, trainer):
    rollout, _ = sampled
    logp, gradient = trainer(sampler, params, query, rollout, np.ones((B, G), np.float32))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    np.testing.assert_allclose(logp, rollout.logp, atol=1e-4)
    trained = rollout.phase != UNTRAINED
    assert (rollout.logp[~trained] == 0).all() and (rollout.logp[trained] < 0).mean() > 0.95


def test_what_was_not_allowed_has_no_probability(constrained, params, query, trainer):
    """Of a rollout that was not sampled under the mask; a token does not pass for another one, which is allowed."""
    grammar = constrained.grammar
    shape = B, G, grammar.length(*query.identifiers.shape[1:])
    actions = np.full(shape, grammar.eos, np.int32)
    phase = np.full(shape, UNTRAINED, np.int32)
    phase[:, 0, 0] = SLATE  # an eos, instead of a first identifier
    rollout = Rollout(actions, phase, np.zeros(shape, np.float32))
    logp, _ = trainer(constrained, params, query, rollout, np.ones((B, G), np.float32))
    assert (logp[:, 0, 0] == -np.inf).all() and (logp[:, 1:] == 0).all()


def test_probabilities_of_all_transcripts_sum_to_one(everything):
    distributions, gradient = everything
    assert [len(d) for d in distributions] == [620, 264, 8]
    for distribution in distributions:
        assert abs(sum(distribution.values()) - 1) < 1e-4
    for g in jax.tree.leaves(gradient):  # of a constant
        np.testing.assert_allclose(g, 0, atol=2e-5)


def test_samples_follow_the_probabilities(constrained, everything, params, query):
    """Pearson's chi-square of the transcripts sampled; 5 standard deviations are allowed."""
    _, lists = jax.device_get(sample(constrained, params, query, KEY, G))
    for b, distribution in enumerate(everything[0]):
        names = [(tuple(s), tuple(r)) for s, r in zip(lists.slate[b].tolist(), lists.ranking[b].tolist(), strict=True)]
        rare = [x for x, p in distribution.items() if p * G < 5]
        cells = [[x] for x in distribution if x not in set(rare)] + ([rare] if rare else [])
        expected = np.array([sum(distribution[x] for x in cell) for cell in cells]) * G
        counts = np.array([sum(names.count(x) for x in cell) for cell in cells])
        assert counts.sum() == G and len(cells) >= 3
        chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), len(cells) - 1
        assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_greedy_takes_the_most_probable_token(constrained, everything, params, query):
    """Step by step, by summing over all transcripts; and twice the same."""
    grammar = constrained.grammar
    once = jax.device_get(sample(constrained, params, query, None, 1))
    again = jax.device_get(sample(constrained, params, query, None, 1))
    jax.tree.map(np.testing.assert_array_equal, once, again)
    rollout, lists = once
    assert (lists.outcome == 0).all()
    for b, distribution in enumerate(everything[0]):
        names = [tuple(t for t in name if t >= 0) for name in query.identifiers[b].tolist()]
        written = {transcript_of(grammar, names, *x): p for x, p in distribution.items()}
        prefix = ()
        while prefix not in written:
            following = {}
            for tokens, p in written.items():
                if tokens[: len(prefix)] == prefix:
                    following[tokens[len(prefix)]] = following.get(tokens[len(prefix)], 0) + p
            prefix += (max(following, key=following.get),)
        assert tuple(rollout.actions[b, 0].tolist()[: len(prefix)]) == prefix


def transcript_of(grammar, names, slate, ranking):
    tokens = ()
    for items, close in ((slate, grammar.slate_close), (ranking, (*grammar.rank_close, grammar.eos))):
        for i, c in enumerate(c for c in items if c >= 0):
            tokens += (grammar.separator if i else ()) + names[c]
        tokens += close
    return tokens


# --------------------------------------------------------------------- labels and lists


def test_rollouts_are_labelled_as_they_read(sampler, sampled, query):
    """Lists and phases are those of the parser; a token without a choice is untrained."""
    rollout, lists = sampled
    read_lists, label, n_allowed = read(sampler, query, rollout.actions)
    jax.tree.map(np.testing.assert_array_equal, lists, read_lists)
    if sampler.constrained:
        assert (lists.outcome == 0).all()
        label = np.where(n_allowed == 1, UNTRAINED, label)
    else:
        seen = {OUTCOMES[code].name for code in np.unique(lists.outcome)}
        assert "slate_out_of_pool" in seen and len(seen) >= 3
        assert (rollout.actions[label == UNTRAINED] == sampler.grammar.eos).all()
    np.testing.assert_array_equal(rollout.phase, label)
    assert {SLATE, RANK} <= set(np.unique(rollout.phase)) or not sampler.constrained


def test_members_of_a_group_differ(sampled):
    rollout, _ = sampled
    for actions_GT in rollout.actions:
        assert len({tuple(row) for row in actions_GT.tolist()}) > 4


def test_the_padding_of_prompts_does_not_change_what_is_sampled(constrained, params, query):
    wider = query.replace(prompt=jnp.pad(query.prompt, ((0, 0), (0, 4)), constant_values=9))
    one, other = (sample(constrained, params, q, KEY, 4) for q in (query, wider))
    np.testing.assert_array_equal(one[0].actions, other[0].actions)
    np.testing.assert_allclose(one[0].logp, other[0].logp, atol=1e-5)


def test_decoding_stops_when_all_rollouts_have_ended(spec, grammar, params, query, monkeypatch):
    steps, decode_step = [], sampling.decoder.decode_step

    def counted(*args):
        jax.debug.callback(lambda t: steps.append(int(t)), args[-1])
        return decode_step(*args)

    monkeypatch.setattr(sampling.decoder, "decode_step", counted)
    free = sampling.Sampler(spec, grammar, constrained=False)
    rollout, lists = quick_jit(lambda params, query: sampling.sample(free, params, query, None, 1))(params, query)
    jax.effects_barrier()
    longest = int((rollout.phase != UNTRAINED).sum(-1).max())
    assert (lists.outcome != 0).all() and longest < rollout.actions.shape[-1]
    assert sorted(steps) == list(range(longest))


@pytest.mark.parametrize("size", [7, 128, 129, 1000])
def test_choices_follow_their_probabilities(size):
    """One block, a full one, several, the last not full; some choices impossible, ends too."""
    rng = np.random.default_rng(size)
    logit_X = rng.normal(size=size, scale=2).astype(np.float32)
    logit_X[[0, 2, -1]] = -np.inf
    draws = 40_000
    choose = quick_jit(lambda logit, key: draw.choose(jnp.broadcast_to(logit, (4, draws // 4, size)), key))
    pick, logp = jax.device_get(choose(logit_X, KEY))
    wanted = jax.nn.log_softmax(logit_X)
    np.testing.assert_allclose(logp, wanted[pick], atol=1e-5)
    probability = np.exp(wanted)
    counts = np.bincount(pick.reshape(-1), minlength=size)
    assert not counts[probability == 0].any()
    often = probability * draws >= 5
    expected, found = (np.append(x[often], x[~often].sum()) for x in (probability * draws, counts))
    expected, found = expected[expected > 0], found[expected > 0]
    freedom = len(expected) - 1
    assert ((found - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_the_greedy_choice_is_the_first_maximum():
    logit = jnp.array([[[0.0, 3.0, 3.0, -jnp.inf]], [[-jnp.inf, -jnp.inf, -jnp.inf, 5.0]]])
    pick, logp = draw.choose(logit, None)
    assert pick.tolist() == [[1], [3]]
    np.testing.assert_allclose(logp, jax.nn.log_softmax(logit)[[0, 1], [0, 0], [1, 3]][:, None], atol=1e-6)


@pytest.mark.parametrize("size", [3, 100, 1000])
def test_what_cannot_be_is_never_drawn(size):
    """Not even by the numbers at the borders of the shares: sums of a thousand are rounded out of order."""
    rng = np.random.default_rng(size)
    weight = (rng.random(size) ** 4 * (rng.random(size) < 0.5)).astype(np.float32)
    weight[[0, -1]], weight[size // 2] = 0, 1
    total = np.asarray(quick_jit(jnp.cumsum)(weight))
    borders = total[:, None] / total[-1] + np.arange(-3, 4) * 2.0**-24
    u = np.clip(np.floor(borders.reshape(-1) * 2**23) / 2**23, 0, 1 - 2**-23).astype(np.float32)
    pick = quick_jit(lambda u: draw._draw(jnp.broadcast_to(weight, (len(u), size)), u))(u)
    assert (weight[pick] > 0).all()


def test_zero_is_not_a_way_to_the_impossible():
    """The smallest number drawn is as likely as any: it must not find what has probability 1e-30."""
    assert draw._draw(jnp.array([1e-30, 1.0]), jnp.float32(0)) == 1


def test_undefined_logits_stay_within_the_vocabulary():
    pick, logp = draw.choose(jnp.full((1, 2, 300), jnp.nan), KEY)
    assert (pick < 300).all() and jnp.isnan(logp).all()
