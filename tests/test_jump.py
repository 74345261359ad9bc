"""Jumping ahead of what the grammar forces: the same rollouts as token by token, in fewer steps."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit, run_on_8_devices
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ROOT
from transcript_cases import CASES, make_query

from fgrpo_jax.bench import command
from fgrpo_jax.bench import jump as bench
from fgrpo_jax.models import decoder, packing
from fgrpo_jax.policies.llm import jump, masks, sampling, transcript
from fgrpo_jax.types import UNTRAINED

G = 6
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def model(spec):
    """For the tokens of the cases."""
    spec = spec._replace(vocab_size=48)
    return spec, quick_jit(decoder.init, static_argnums=0)(spec, jax.random.key(0))


def prompted(case):
    """The pools of a case under prompts of different lengths."""
    query = make_query(case.pools)
    rng = np.random.default_rng(0)
    prompt = jnp.asarray(rng.integers(2, 48, (len(case.pools), 6)), jnp.int32)
    return query.replace(prompt=prompt, prompt_len=jnp.array([1, 3, 6, 4], jnp.int32))


@functools.partial(quick_jit, static_argnums=(0, 1, 5))
def both(sampler, pace, params, query, key, group):
    """Rollout and lists token by token; jumping; its steps."""
    spec, grammar, *_ = sampler
    by_token = sampling.sample(sampler._replace(ahead=False), params, query, key, group)
    *jumping, steps = jump.sample(spec, grammar, pace, params, query, key, group)
    return by_token, tuple(jumping), steps


# Paces as tight as can be, and wide enough for the longest chain.
@pytest.mark.parametrize(
    "name, pace, key",
    [
        ("characters", (4, 14), KEY),
        ("windows", (3, G), None),
        ("states", (3, 11), KEY),
        ("unseparated", (12, 12 * G), KEY),
    ],
)
def test_the_same_rollouts_as_token_by_token(model, name, pace, key):
    """Names of several tokens, names that begin alike, with and without separator; layers that see 3 tokens
    alone, and recurrent ones."""
    spec, params = model
    if name == "windows":
        spec, name = spec._replace(pattern=(decoder.LOCAL, decoder.FULL, decoder.LOCAL), window=3), "merged"
    if name == "states":  # of which the last layer's is one
        spec, name = spec._replace(pattern=(decoder.DELTA, decoder.FULL), delta=(1, 2, 4, 6, 4)), "merged"
        params = quick_jit(decoder.init, static_argnums=0)(spec, jax.random.key(0))
    case = CASES[name]
    sampler = sampling.Sampler(spec, case.grammar, constrained=True)
    by_token, jumping, steps = jax.device_get(both(sampler, jump.Pace(*pace), params, prompted(case), key, G))
    (rollout, lists), (other, other_lists) = by_token, jumping
    np.testing.assert_array_equal(rollout.actions, other.actions)
    np.testing.assert_array_equal(rollout.phase, other.phase)
    np.testing.assert_allclose(rollout.logp, other.logp, atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, lists, other_lists)
    assert key is None or len({tuple(row) for row in rollout.actions[0].tolist()}) > 2
    decisions, tokens = (rollout.phase != UNTRAINED).sum(-1).max(), (rollout.actions != case.grammar.eos).sum(-1).max()
    assert decisions <= steps <= tokens
    if pace[1] == pace[0] * G:
        assert steps == decisions


@pytest.mark.parametrize("size", [50, 150])
def test_draws_belong_to_the_place_in_the_transcript(size):
    """Whatever rollout comes to it when: the numbers of one step for all, of up to a block of choices and of more."""
    length, shape = 5, (3, 2, size)
    numbers = jump._numbers(shape, KEY, length)
    t_BG = np.array([[0, 4], [2, 2], [3, 1]])
    found = jump._at(numbers, jnp.asarray(t_BG))
    for b, g in np.ndindex(*t_BG.shape):
        of_step = sampling.draw.numbers(shape, jax.random.fold_in(KEY, int(t_BG[b, g])))
        np.testing.assert_array_equal(found[..., b, g], of_step[..., b, g])


def test_names_of_one_token_are_decoded_token_by_token(model):
    """Nothing is forced between them: the program is the same, to the letter."""
    spec, params = model
    case = CASES["single"]
    query = prompted(case)
    assert jump.pace(case.grammar, query.identifiers.shape[2], G) is None
    programs = [
        jax.jit(sampling.sample, static_argnums=(0, 4)).lower(
            sampling.Sampler(spec, case.grammar, constrained=True, ahead=ahead), params, query, KEY, G
        )
        for ahead in (True, False)
    ]
    assert programs[0].as_text() == programs[1].as_text()
    assert jump.pace(CASES["characters"].grammar, 4, G) == jump.Pace(6, 4 * G)


@pytest.mark.parametrize("name", ["unseparated", "trie"])
def test_what_is_forced_is_the_only_choice(name):
    """In every state of every rollout of a random walk."""
    case = CASES[name]
    grammar, query = case.grammar, make_query(case.pools)

    def walk(key):
        options = masks.choices(grammar, query)

        def step(state, key):
            mask = masks.allowed(grammar, query, options, state)
            forced, token = masks.forced(grammar, query, state)
            pick = jax.random.categorical(key, jnp.where(mask, 0.0, -jnp.inf))
            tokens = masks.due_tokens(grammar, query, state)
            taken = jnp.take_along_axis(tokens, pick[..., None], -1)[..., 0]
            return transcript.advance(grammar, query, state, taken)[0], (mask.sum(-1), forced, token, taken)

        length = grammar.length(*query.identifiers.shape[1:])
        return jax.lax.scan(step, transcript.start(grammar, query, 16), jax.random.split(key, length))[1]

    n_allowed, forced, token, taken = jax.device_get(quick_jit(walk)(KEY))
    np.testing.assert_array_equal(forced, n_allowed == 1)
    np.testing.assert_array_equal(token[forced], taken[forced])
    assert forced.any() and not forced.all()


# --------------------------------------------------------------------- rows of tokens


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), min_size=4, max_size=4),
    st.integers(4, 20),
)
def test_tokens_are_shared_out(rollouts, size):
    """One for everybody, no place is left while any waits, and who is behind comes first."""
    want, done = (np.array([x]) for x in zip(*rollouts))
    given_BG = np.asarray(packing.share(jnp.asarray(want), jnp.asarray(done), size))
    assert (np.minimum(want, 1) <= given_BG).all() and (given_BG <= want).all()
    assert given_BG.sum() == min(size, want.sum())
    waits = given_BG < want
    for g in np.flatnonzero(waits[0]):
        ahead = (done[0] > done[0, g]) & (given_BG[0] > 1)
        assert not ahead.any()


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=3, max_size=3), st.lists(st.integers(0, 9), min_size=3, max_size=3))
def test_a_row_and_the_grid_hold_the_same_tokens(count, first):
    width, size = 3, 9
    row = packing.pack(jnp.array([first]), jnp.array([count]), width, size)
    tokens = [(g, first[g] + w) for g, n in enumerate(count) for w in range(n)]
    place, number, column, last = (np.asarray(x)[0] for x in (row.place, row.number, row.column, row.last))
    assert [(p // width, n) for p, n in zip(place, number)][: len(tokens)] == tokens
    assert (place < 3 * width).all() and (column < size).all()
    for g, n in enumerate(count):
        assert [tokens[c] for c in column[g, :n]] == [(g, first[g] + w) for w in range(n)]
        assert not n or tokens[last[g]] == (g, first[g] + n - 1)


# --------------------------------------------------------------------- on a mesh


def test_rollouts_do_not_depend_on_the_mesh():
    """Queries over data and fsdp, heads over tensor; by the numbers that one device draws for all."""
    out = run_on_8_devices(f"""
        import sys
        sys.path.append({str(ROOT / "tests")!r})
        import jax, numpy as np
        from helpers import quick_jit
        from test_jump import CASES, KEY, prompted
        from fgrpo_jax import shards
        from fgrpo_jax.models import decoder
        from fgrpo_jax.policies.llm import sampling
        from fgrpo_jax.run.sharding import make_mesh, param_shardings, shard_batch
        from conftest import SPEC

        spec, case = SPEC._replace(vocab_size=48, num_layers=1), CASES["characters"]
        sampler, table = sampling.Sampler(spec, case.grammar, constrained=True), decoder.param_table(spec)

        def rollout(params, frozen, query, key):
            return sampling.sample(sampler, params, query, key, 4)

        def on(mesh):
            params = jax.device_put(decoder.init(spec, jax.random.key(0)), param_shardings(mesh, table))
            query = shard_batch(mesh, jax.device_get(prompted(case)), 4)
            return jax.device_get(quick_jit(shards.by_query(mesh, table, rollout))(params, {{}}, query, KEY))

        alone = on(make_mesh(1, 1, 1, jax.devices()[:1]))
        many, _ = on(make_mesh(2, 2, 2))
        np.testing.assert_array_equal(many.actions, alone[0].actions)
        np.testing.assert_allclose(many.logp, alone[0].logp, atol=1e-5)
        print("fine")
    """)
    assert out == ["fine"]


def test_the_bench_counts_steps(tmp_path, capsys, monkeypatch):
    """Of both ways, in one run: fewer than tokens, no fewer than decisions, and the rollouts are the same."""
    monkeypatch.setattr(bench, "jit", quick_jit)
    path = tmp_path / "jump.json"
    given = ["--batch", "2", "--group", "2", "--prompt", "8", "--repeats", "1", "--json", str(path)]
    assert command.main(["jump", "--workload", "titles", *given]) == 0
    found = json.loads(path.read_text())
    steps = found["steps"]
    assert found["decisions"]["most"] <= steps["jumping"] < steps["by_token"] / 2
    assert found["same"] == 1 and set(found["seconds"]) == set(found["cpu_s"]) == {"prefill", "by_token", "jumping"}
    out = capsys.readouterr().out
    assert f"{steps['by_token'] / steps['jumping']:.2f} times fewer steps" in out
    digits = bench.names("smollm2", 49_152, 1)[0]
    assert [len(name) for name in digits] == [3] * 9 + [4] * 11
    assert bench.WORKLOADS["smollm2"].grammar.length(bench.POOL, 4) == 72
