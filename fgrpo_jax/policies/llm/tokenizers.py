"""Tokenizers: any Hugging Face tokenizer directory, a GGUF file's, or one made from the data: `catalogue`, `words`.

The last two are word-level, and what a small model can learn from scratch. For the catalogue's, lines are words: every
item is one token, and so is every line of the prompt template and every literal of the transcript. For `words`,
what blanks part is a token, so that items which share words share what is learnt about them. Text that is none
of these is refused when a prompt is encoded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from fgrpo_jax.config import MADE_OF_DATA, ConfigError, PromptConfig, TranscriptConfig
from fgrpo_jax.data.datasets import DataError, Dataset, one_line
from fgrpo_jax.files import local_copy, path_of
from fgrpo_jax.models import gguf
from fgrpo_jax.policies.llm import gguf_tokenizer
from fgrpo_jax.policies.llm.prompts import TEMPLATE_LINES

# Only its tokenizers are used; without this it advises to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"


def load(name: str, dataset: Dataset | None, transcript: TranscriptConfig, prompt: PromptConfig) -> Any:
    """A Hugging Face fast tokenizer with an eos token.

    name: "catalogue" or "words" (which need the data set), a directory, as `save_pretrained` writes it, or a GGUF
        file or the name of one (gguf.PACKAGED).
    Raises ConfigError or ModelFilesError where no usable tokenizer is, DataError for a
    catalogue in which two things would share a token.
    """
    if name in MADE:
        if dataset is None:
            raise ConfigError(f"tokenizer={name!r} is made from a data set, and none was given")
        return MADE[name](dataset, transcript, prompt)
    if gguf.is_meant(file := gguf.locate(name)):
        return gguf_tokenizer.read(file)
    return from_directory(name)


def from_directory(path: str) -> Any:
    """A saved tokenizer; nothing is downloaded. Raises ConfigError, saying what is accepted."""
    accepted = (
        "tokenizer must be 'catalogue', 'words', a GGUF file or a directory with tokenizer.json and "
        "tokenizer_config.json"
    )
    folder = path_of(path)
    if not folder.is_dir():
        raise ConfigError(f"tokenizer={path!r} is not a directory; {accepted}")
    import transformers

    try:
        with local_copy(folder) as here:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(here), local_files_only=True)
    except Exception as error:  # transformers raises many kinds, all meaning the same here
        raise ConfigError(f"tokenizer={path!r} could not be loaded ({error}); {accepted}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"tokenizer={path!r} has no fast version; {accepted}")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"tokenizer={path!r} has no eos token, and a transcript ends with one; {accepted}")
    return tokenizer


def catalogue(dataset: Dataset, transcript: TranscriptConfig, prompt: PromptConfig) -> Any:
    """The word-level tokenizer of a data set; the same data set gives the same tokens."""
    fixed = [text for line in _fixed(dataset, transcript, prompt) for text in line.split("\n")]
    items = list(dict.fromkeys(one_line(text) for text in _item_texts(dataset)))
    if clash := sorted(set(fixed) & set(items)):
        raise DataError(f"item {clash[0]!r} is also a special token, a literal or a line of the prompt: rename it")
    return _word_level([*fixed, *items], lambda made: made.Split("\n", "removed"))


def words(dataset: Dataset, transcript: TranscriptConfig, prompt: PromptConfig) -> Any:
    """The tokens are what blanks part, in items, template and literals; the same data set gives the same tokens."""
    fixed = [word for text in _fixed(dataset, transcript, prompt) for word in text.split()]
    items = [word for text in _item_texts(dataset) for word in text.split()]
    if clash := sorted(set(items) & {PAD, EOS, UNK, *_literals(transcript)}):
        raise DataError(f"the word {clash[0]!r} of an item is also a special token or a literal: rename it")
    return _word_level([*fixed, *items], lambda made: made.WhitespaceSplit())


MADE = dict(zip(MADE_OF_DATA, (catalogue, words), strict=True))


def _fixed(dataset: Dataset, transcript: TranscriptConfig, prompt: PromptConfig) -> list[str]:
    """What is no item: literals of the transcript, lines of the prompt."""
    return [PAD, EOS, UNK, *_literals(transcript), prompt.instruction or dataset.instruction, *TEMPLATE_LINES]


def _literals(transcript: TranscriptConfig) -> tuple[str, ...]:
    return transcript.slate_open, transcript.separator, transcript.slate_close, transcript.rank_close


def _word_level(texts: list[str], pre_tokenizer: Callable) -> Any:
    """texts: the tokens, in their order; empty ones and repetitions are left out."""
    import tokenizers
    import transformers

    vocabulary = {text: token for token, text in enumerate(dict.fromkeys(filter(None, texts)))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizer(tokenizers.pre_tokenizers)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )


def _item_texts(dataset: Dataset) -> Iterator[str]:
    if dataset.catalogue:
        yield from (text for _, text in dataset.catalogue)
        return
    for name in sorted(dataset.splits):
        for example in dataset.splits[name]:
            yield from (text for _, text in (*example.candidates, *example.history))
