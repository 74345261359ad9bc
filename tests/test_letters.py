"""Candidates named by letters: one token each, or refused before anything compiles."""

import dataclasses
import itertools
import re

import pytest
import tokenizers
import transformers
from bpe import train_bpe

from fgrpo_jax.config import Config, ConfigError, DataConfig, TranscriptConfig
from fgrpo_jax.data.datasets import DataError, Dataset, in_memory
from fgrpo_jax.policies.llm import exported, prompts, serving
from fgrpo_jax.policies.llm import policy as llm
from fgrpo_jax.policies.llm.checks import check_training
from fgrpo_jax.types import RankingExample

CONFIG = Config(
    tokenizer="some/folder",
    data=DataConfig(prompt_buckets=(160,)),
    transcript=TranscriptConfig("letter", slate_min=2, slate_max=3, rank_min=1, rank_max=2),
)


def example(n):
    return RankingExample("q7", "", tuple((str(i), f"song {i}") for i in range(n)), (1.0,) + (0.0,) * (n - 1))


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE that has learnt 52 pairs: a blank and a letter."""
    return train_bpe(["".join(f" {letter}" for letter in serving.LETTERS)] * 3, 262 + 52)


@pytest.fixture(scope="module")
def sentencepiece():
    """Puts a blank before every text, so ` A` has two, and `A` the one that it has inside a text."""
    vocabulary = [
        "<eos>",
        "\u2581",
        *(f"\u2581{x}" for x in [*serving.LETTERS, "<SLATE>", "</SLATE><RANK>", "</RANK>"]),
    ]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({x: i for i, x in enumerate(vocabulary)}, "\u2581"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def test_a_prompt():
    assert prompts.render(example(3), "recommendation", "Choose.", "letter", "<SLATE>") == (
        "Choose.\nCandidates:\n A song 0\n B song 1\n C song 2\n<SLATE>"
    )


def test_every_letter_is_a_token_and_no_two_are_the_same(bpe, sentencepiece):
    for tokenizer in (bpe, sentencepiece):
        found = serving.encoded(prompts.identifier_texts(example(52), "letter"), tokenizer)
        assert all(len(ids) == 1 for ids in found) and len({*map(tuple, found)}) == 52
        assert [*map(tokenizer.convert_ids_to_tokens, itertools.chain(*found))] == [
            tokenizer.tokenize(f"x {letter}")[-1]
            for letter in serving.LETTERS  # what a letter is inside a text
        ]
    assert serving.encoded([" no", "no"], bpe) == [*map(bpe.encode, (" no", "no"))]


def test_a_tokenizer_without_these_tokens_is_refused():
    bytes_alone = train_bpe(["bytes"], 262)
    with pytest.raises(
        ConfigError, match=r"'some/folder' has no token of its own for A, B, C, D, E after a blank \(52"
    ):
        llm.make_grammar(CONFIG, bytes_alone)
    most = train_bpe(["".join(f" {letter}" for letter in serving.LETTERS[:50])] * 3, 262 + 50)
    with pytest.raises(ConfigError, match=r"for y, z after a blank \(2 of 52 letters\): set it to 'index'"):
        llm.make_grammar(CONFIG, most)


@pytest.fixture
def policy(bpe, spec):
    return llm.make(CONFIG, spec._replace(vocab_size=len(bpe)), bpe, "recommendation", "Choose.")


def test_queries_in_arrays(policy, bpe):
    query = policy.encode([example(5), example(3)])
    assert query.identifiers.shape == (2, 8, 1)
    assert [bpe.decode(ids) for ids in query.identifiers[1, :3]] == [" A", " B", " C"]
    assert (query.identifiers[1, 3:] == -1).all()


def test_more_candidates_than_letters(policy, bpe):
    prompts.identifier_texts(example(52), "letter")
    with pytest.raises(DataError, match="query 'q7' has 53 candidates, and only 52 letters: set transcript.identifier"):
        prompts.identifier_texts(example(53), "letter")

    def check(splits, sampled, pool_size):
        config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, pool_size=pool_size))
        dataset = Dataset("tiny", "recommendation", "", example(9).candidates, splits, sampled, {})
        check_training(config, bpe, lambda examples: None, None, dataset, "train")

    few, many = in_memory([example(4)]), in_memory([example(3), example(60), example(4)])
    with pytest.raises(ConfigError) as e:
        check({"train": few, "test": many}, False, 20)
    assert "has 52 letters, and split 'test' has pools of 60 candidates: set it to 'index'" in str(e.value)
    with pytest.raises(ConfigError, match="split 'train' has pools of 53 candidates"):
        check({"train": few, "test": few}, True, 53)
    check({"train": few, "test": few}, True, 52)


def test_what_an_export_says(bpe):
    """Every list that its functions allow is a text of its regex, and is read back."""
    said = exported.describe(CONFIG, llm.make_grammar(CONFIG, bpe), "qa", "")
    texts, eos = ["one", "two", "three"], bpe.eos_token_id
    after, pattern = serving.allowed(said, texts, bpe), re.compile(serving.regex(said, texts))
    assert bpe.decode(after(())) == " A B C"

    def every(so_far=()):
        for token in after(so_far):
            yield from [(*so_far, token)] if token == eos else every((*so_far, token))

    found = [*every()]
    assert len(found) == 6 * 2 + 6 * 2 + 6 * 3 + 6 * 6  # slates of 2 or 3 of 3, rankings of 1 or 2 of those
    assert all(pattern.fullmatch(bpe.decode(tokens[:-1])) for tokens in found)
    first = bpe.encode(" C A</SLATE><RANK> A</RANK>") + [eos]
    assert tuple(first) in found and serving.lists(said, texts, bpe, first) == ([2, 0], [0])
    with pytest.raises(ValueError, match="53 candidates, and only 52 letters"):
        serving.regex(said, ["x"] * 53)
