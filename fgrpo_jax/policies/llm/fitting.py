"""Whether a tokenizer and the weights that are to read its tokens belong together: ids are rows of the embedding."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fgrpo_jax.config import Config, ConfigError
from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.errors import UserError
from fgrpo_jax.models import gguf
from fgrpo_jax.policies.llm import prompts, tokenizers
from fgrpo_jax.policies.llm.query import Query
from fgrpo_jax.types import RankingExample

_FILLING = re.compile(r"\[PAD\d+\]")  # what converters call tokens of a GGUF file that no text has


def check_size(config: Config, tokenizer: Any, size: int) -> None:
    """Refuse tokens that a checkpoint with a vocabulary of `size` has no row for.

    Special ones that were added to a tokenizer may be, as Gemma 3's for images, unless prompts begin with them or
    transcripts are written with them: a text that is encoded to one is refused by `check_ids`. Raises ConfigError.
    """
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    t = config.transcript
    literals = [t.slate_open, t.separator, t.slate_close, t.rank_close]
    written = {number for ids in tokenizer(literals, add_special_tokens=False)["input_ids"] for number in ids}
    spare = special - written - {tokenizer.eos_token_id, *prompts.beginning(config.prompt, tokenizer)}
    beyond = [token for token, number in tokenizer.get_vocab().items() if number >= size and number not in spare]
    if beyond:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, model.checkpoint {config.model.checkpoint} only {size}, "
            f"and none for {beyond[0]!r}: they do not belong together; set `tokenizer` to the checkpoint's directory"
        )


def check_own(config: Config, tokenizer: Any) -> None:
    """Refuse a tokenizer whose ids are others than those of the checkpoint's own, where it has one that can be read.

    Such a model reads noise, and a training with it runs to its end; so this is refused, not warned of. Special tokens
    may be called otherwise, and more be added. Raises ConfigError.
    """
    source = gguf.locate(config.model.checkpoint)
    if gguf.locate(config.tokenizer) == source or not (source.is_file() or (source / "tokenizer.json").is_file()):
        return
    try:
        own = tokenizers.load(str(source), None, config.transcript, config.prompt)
    except UserError:  # a GGUF file without one, or with one of a kind that is not read
        return
    named = {number: token for token, number in tokenizer.get_vocab().items()}
    special = {number for number, token in own.added_tokens_decoder.items() if token.special}
    for token, number in own.get_vocab().items():
        if number not in special and named.get(number) != token and not _FILLING.fullmatch(token):
            raise ConfigError(
                f"tokenizer={config.tokenizer!r} is another one than that of model.checkpoint="
                f"{config.model.checkpoint!r}: token {number} is {named.get(number)!r}, and {token!r} there; set "
                "`tokenizer` to the checkpoint"
            )


def checked(
    encode: Callable[[Sequence[RankingExample]], Query], tokenizer: Any, size: int
) -> Callable[[Sequence[RankingExample]], Query]:
    """Queries as `encode` makes them, whose tokens a model with a vocabulary of `size` has rows for (check_ids)."""

    def encoded(examples: Sequence[RankingExample]) -> Query:
        query = encode(examples)
        ids = [example.query_id for example in examples]
        for tokens in (query.prompt, query.identifiers):
            check_ids(tokenizer, size, tokens.reshape(len(tokens), -1), ids)
        return query

    return encoded


def check_ids(tokenizer: Any, size: int, tokens: Sequence[Sequence[int]], query_ids: Sequence[str]) -> None:
    """Refuse texts with a token that a model with a vocabulary of `size` has no row for: it would read another one's.

    tokens: rows of the queries. Raises DataError, naming the first such query.
    """
    for row, query_id in zip(tokens, query_ids, strict=True):
        if (largest := np.max(row)) >= size:
            raise DataError(
                f"query {query_id!r}: the model's vocabulary of {size} has no token "
                f"{tokenizer.convert_ids_to_tokens(int(largest))!r}, which the tokenizer finds there: change the text"
            )
