"""The language model as a policy: what is encoded, what is refused, what SFT imitates."""

import concurrent.futures
import dataclasses
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bpe import train_bpe
from helpers import quick_jit, random_params

from fgrpo_jax.algorithm.advantages import make_batch
from fgrpo_jax.algorithm.objectives import nll
from fgrpo_jax.algorithm.update import make_optimizer, make_update
from fgrpo_jax.config import Config, ConfigError, DataConfig, TranscriptConfig
from fgrpo_jax.data.datasets import DataError, Dataset, in_memory
from fgrpo_jax.models import decoder
from fgrpo_jax.policies.llm import encode as encode_of_llm
from fgrpo_jax.policies.llm import policy as llm
from fgrpo_jax.policies.llm import prompts, tokenizers
from fgrpo_jax.policies.llm.checks import warn_of_merges
from fgrpo_jax.policies.llm.targets import rollout as target_rollout
from fgrpo_jax.run import processes
from fgrpo_jax.types import Credit, RankingExample, TrainState

ITEMS = tuple((f"i{n}", f"song {n}") for n in range(9))
CONFIG = Config(
    data=DataConfig(prompt_buckets=(12, 16)),
    transcript=TranscriptConfig(slate_min=2, slate_max=3, rank_min=1, rank_max=2),
)
LONG, SHORT = (
    RankingExample("long", "", ITEMS[:5], (0, 2, 0, 1, 0), ITEMS[5:9]),
    RankingExample("short", "", ITEMS[4:7], (1, 0, 0), ITEMS[:1]),
)
NUMBERED = dataclasses.replace(
    CONFIG,
    tokenizer="some/folder",
    transcript=dataclasses.replace(CONFIG.transcript, identifier="index", separator=" > "),
    data=DataConfig(prompt_buckets=(64, 256)),
)


def changed(config, **transcript_fields):
    return dataclasses.replace(config, transcript=dataclasses.replace(config.transcript, **transcript_fields))


@pytest.fixture(scope="module")
def catalogue():
    rows = in_memory([LONG, SHORT])
    dataset = Dataset("tiny", "recommendation", "Choose.", ITEMS, {"train": rows}, True, {})
    return tokenizers.load("catalogue", dataset, CONFIG.transcript, CONFIG.prompt)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([text for _, text in ITEMS] + ["[1] > [2] > [3]"] * 3, 320)


@pytest.fixture
def make(catalogue, spec):
    def of(config=CONFIG, tokenizer=catalogue):
        sized = spec._replace(vocab_size=len(tokenizer))
        return llm.make(config, sized, tokenizer, "recommendation", "Choose.")

    return of


# --------------------------------------------------------------------- encoding


def test_a_batch_of_queries(make, catalogue):
    query = make().encode([LONG, SHORT])
    assert query.prompt.shape == (2, 16)  # the bucket of the longer prompt
    assert query.prompt_len.tolist() == [13, 8]
    for b, example in enumerate([LONG, SHORT]):
        lines = prompts.render(example, "recommendation", "Choose.", "text", "<SLATE>").split("\n")
        assert catalogue.convert_ids_to_tokens(query.prompt[b, : query.prompt_len[b]]) == lines
        n = query.n_candidates[b]
        assert n == len(example.candidates)
        names = catalogue.convert_ids_to_tokens(query.identifiers[b, :n, 0])
        assert names == [text for _, text in example.candidates]
        assert query.relevance[b].tolist() == [*example.relevance, *[0] * (8 - n)]
        assert (query.identifiers[b, n:] == -1).all()
    assert query.identifiers.shape == (2, 8, 1)  # few shapes: pools round up to a multiple of 4


def test_numbers_as_identifiers(make, bpe):
    query = make(NUMBERED, bpe).encode([LONG, SHORT])
    for c in range(5):
        tokens = [t for t in query.identifiers[0, c].tolist() if t >= 0]
        assert bpe.decode(tokens) == f"[{c + 1}]"
    assert bpe.decode(query.prompt[1, : query.prompt_len[1]]).endswith("[3] song 6\n<SLATE>")


def test_with_a_least_width_batches_are_alike_and_lists_the_same(make, bpe, spec):
    narrow, wide = (make(changed(NUMBERED, identifier_width=width), bpe) for width in (1, 6))
    many = dataclasses.replace(LONG, query_id="many", candidates=tuple((f"m{i}", f"song {i % 9}") for i in range(12)))
    many = dataclasses.replace(many, relevance=(1,) + (0,) * 11, history=())
    widths = [[p.encode([example]).identifiers.shape[2] for example in (LONG, many)] for p in (narrow, wide)]
    assert widths[0][0] != widths[0][1] and widths[1] == [8, 8]
    queries = [policy.encode([LONG, SHORT]) for policy in (narrow, wide)]
    narrowly, widely = (query.identifiers for query in queries)
    assert (widely[..., :3] == narrowly).all() and (widely[..., 3:] == -1).all()
    params = random_params(spec._replace(vocab_size=len(bpe)))
    found = [quick_jit(p.greedy)(params, {}, query)[1] for p, query in zip((narrow, wide), queries, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, *found)


def long_names(query_id, *names):
    pool = tuple((f"id{i}", n) for i, n in enumerate(names))
    return RankingExample(query_id, "", pool, (1,) + (0,) * (len(names) - 1))


@pytest.mark.parametrize(
    "example, message",
    [
        (dataclasses.replace(LONG, query_id="q1", history=ITEMS), "query 'q1' has a prompt of 18 tokens"),
        (dataclasses.replace(LONG, query_id="q2", candidates=ITEMS[:4] + ITEMS[:1]), "query q2: candidates i0 and i0"),
        (long_names("q3", "song 1", "song 100"), "'q3'.*no token for 'song 100'"),
    ],
)
def test_refused_by_query(make, example, message):
    with pytest.raises(DataError, match=message):
        make().encode([SHORT, example])


@pytest.mark.parametrize(
    "example, message",
    [
        (long_names("q4", "song", "song > 1"), "query q4: .*id0 is a prefix of that of id1"),
        (long_names("q5", "song", "a <eos> b"), "query q5: the identifier of candidate id1 contains eos"),
        (long_names("q6", "song", "  "), "query q6: candidate id1 has an empty identifier"),
    ],
)
def test_names_refused_by_query(make, bpe, example, message):
    with pytest.raises(DataError, match=message):
        make(changed(NUMBERED, identifier="text"), bpe).encode([example])


def test_names_may_be_forgotten_while_a_query_is_encoded(make, bpe, monkeypatch):
    """As by another thread, which encodes others when some of this one's names have been looked up."""
    buckets = DataConfig(prompt_buckets=(256,))
    policy = make(dataclasses.replace(changed(NUMBERED, identifier="text"), data=buckets), bpe)
    first, second, *others = [long_names(f"q{n}", *(f"song {n + i}" for i in range(3))) for n in (0, 1, 10, 20)]
    expected, encoded = policy.encode([second]), encode_of_llm.serving.encoded
    policy = make(dataclasses.replace(changed(NUMBERED, identifier="text"), data=buckets), bpe)
    monkeypatch.setattr(encode_of_llm, "_REMEMBERED", 4)
    policy.encode([first])  # its three names are known now, and two of them are the second's

    def meanwhile(texts, tokenizer):
        monkeypatch.setattr(encode_of_llm.serving, "encoded", encoded)
        for other in others:
            policy.encode([other])
        return encoded(texts, tokenizer)

    monkeypatch.setattr(encode_of_llm.serving, "encoded", meanwhile)
    jax.tree.map(np.testing.assert_array_equal, policy.encode([second]), expected)


@pytest.fixture
def in_parts(monkeypatch):
    """(policy, parts of a batch) -> what two processes, which are threads here, make of one part each.

    An exception in the place of arrays where one raises.
    """
    meeting, mine, told = threading.Barrier(2, timeout=60), threading.local(), {}

    def exchange(sizes):
        told[mine.index] = sizes
        meeting.wait()
        return np.stack([told[0], told[1]])

    def process(policy, index, part):
        mine.index = index
        try:
            return processes.alike(processes.attempted(lambda: policy.encode(part)), policy.blank)
        except DataError as error:
            return error

    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", exchange)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield lambda policy, parts: list(pool.map(process, [policy] * 2, range(2), parts))


def test_parts_of_a_batch_are_encoded_as_the_whole_is(make, bpe, in_parts):
    """In which the longest prompt, the largest pool and the longest name are not in one part."""
    buckets = DataConfig(prompt_buckets=tuple(range(8, 97, 8)))
    policy = make(dataclasses.replace(changed(NUMBERED, identifier="text"), data=buckets), bpe)
    pool = (*ITEMS[:2], ("i9", "song " * 7 + "9"))
    one = RankingExample("one", "", pool, (1, 0, 0), ITEMS[:1])
    both = in_parts(policy, ([LONG, SHORT], [one]))
    whole = policy.encode([LONG, SHORT, one])
    assert whole.prompt.shape[1] == policy.encode([LONG]).prompt.shape[1] > policy.encode([one]).prompt.shape[1]
    assert whole.identifiers.shape[2] == policy.encode([one]).identifiers.shape[2]
    jax.tree.map(lambda x, *parts: np.testing.assert_array_equal(x, np.concatenate(parts)), whole, *both)
    jax.tree.map(lambda x, part: x.dtype == part.dtype or pytest.fail(str(part.dtype)), whole, both[0])


def test_what_one_process_cannot_encode_ends_all(make, in_parts):
    theirs, ours = in_parts(make(), ([dataclasses.replace(LONG, query_id="q1", history=ITEMS)], [SHORT]))
    assert "query 'q1' has a prompt of 18 tokens" in str(theirs)
    assert str(ours) == "process 0 cannot encode its queries of this batch, and says there why"


# --------------------------------------------------------------------- the grammar


def test_literals_become_tokens(bpe):
    grammar = llm.make_grammar(NUMBERED, bpe)
    assert bpe.convert_ids_to_tokens(grammar.slate_close) == ["</SLATE>", "<RANK>"]
    assert bpe.decode(grammar.separator) == " > "
    assert (grammar.eos, grammar.slate_min, grammar.slate_max) == (bpe.eos_token_id, 2, 3)
    assert (grammar.rank_min, grammar.rank_max) == (1, 2)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"separator": "</SLATE>"}, "transcript.separator and transcript.slate_close cannot be told apart"),
        ({"rank_close": "</RANK><eos>"}, "transcript.rank_close contains eos"),
    ],
)
def test_ambiguous_literals_are_refused(bpe, fields, message):
    with pytest.raises(ConfigError, match=message):
        llm.make_grammar(changed(NUMBERED, **fields), bpe)


def test_a_tokenizer_without_eos_is_refused(bpe):
    class NoEos:
        eos_token_id = None

    with pytest.raises(ConfigError, match="'some/folder' has no eos token"):
        llm.make_grammar(NUMBERED, NoEos())


def test_merges_across_pieces_are_warned_of(bpe, catalogue):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_merges(CONFIG, catalogue, LONG)
        warn_of_merges(changed(NUMBERED, separator="<RANK>"), bpe, LONG)
    with pytest.warns(UserWarning, match="the tokenizer merges"):
        warn_of_merges(changed(NUMBERED, separator=" > ["), train_bpe(["[1] > [[2] > [[3]"] * 9, 300), LONG)


# --------------------------------------------------------------------- imitation


def test_imitation_lowers_the_loss_and_greedy_follows(make, catalogue, spec):
    """Thirty updates on two queries: decoding then writes their relevant candidates first."""
    policy = make()
    write = target_rollout(llm.make_grammar(CONFIG, catalogue), True, "first", True)
    query = policy.encode([LONG, SHORT])
    optimizer = make_optimizer(0.03, 30, 2, "constant", 0.9, 0.98, 1e-8, 0.0, 1.0, True)
    update = make_update(policy.logprobs, nll(), optimizer)
    sized = spec._replace(vocab_size=len(catalogue))
    params, frozen = quick_jit(decoder.init, static_argnums=0)(sized, jax.random.key(0)), {}

    @quick_jit
    def step(state, query, key):
        rollout, _ = write(state.params, frozen, query, key)
        reward = jnp.zeros((2, 1, 0))
        return update(state, frozen, make_batch(query, rollout, reward, Credit(()), "token"))

    state, losses = TrainState(jnp.int32(0), params, optimizer.init(params)), []
    for t in range(30):
        state, metrics = step(state, query, jax.random.key(t))
        losses.append(metrics["loss"].value())
    assert losses[-1] < 0.5 * losses[0] and int(state.step) == 30
    rollout, lists = quick_jit(policy.greedy)(state.params, frozen, query)
    assert rollout.actions.shape[1] == 1
    assert lists.slate[0, 0, :2].tolist() == [1, 3] and lists.slate[1, 0, 0] == 0
    assert lists.ranking[:, 0, 0].tolist() == [1, 0]
