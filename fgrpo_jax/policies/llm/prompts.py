"""Prompts: a query, its history and its pool as text, one item a line.

A prompt ends with the opening of the slate, so decoding starts inside it. What follows is
built from the identifiers piece by piece and never by this module.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from fgrpo_jax.config import ConfigError, PromptConfig
from fgrpo_jax.data.datasets import DataError, Item, one_line
from fgrpo_jax.policies.llm import serving
from fgrpo_jax.types import RankingExample

HISTORY, CANDIDATES, QUESTION = "History:", "Candidates:", "Question: "
TEMPLATE_LINES = (HISTORY, CANDIDATES)
"""Lines of the template that are the same in every prompt."""


def identifier_texts(example: RankingExample, identifier: str) -> list[str]:
    """How a transcript names each candidate: `[1]` … or ` A` … in prompt order, or the text itself.

    Raises DataError for more candidates than letters, where these name them.
    """
    try:
        return serving.names_of(identifier, [text for _, text in example.candidates])
    except ValueError as error:
        raise DataError(f"query {example.query_id!r} has {error}: set transcript.identifier='index'") from None


def render(example: RankingExample, kind: str, instruction: str, identifier: str, slate_open: str) -> str:
    """The prompt, ending in `slate_open` on its own line, without a newline after it.

    kind "recommendation": instruction, history, candidates. kind "qa": instruction,
    candidates, question. A part that is empty is left out with its heading.
    """
    names = identifier_texts(example, identifier)
    pool = [one_line(text) for _, text in example.candidates]
    if identifier != "text":
        pool = [f"{name} {text}" for name, text in zip(names, pool, strict=True)]
    history = [HISTORY, *(one_line(text) for _, text in example.history)] if example.history else []
    question = [QUESTION + one_line(example.query)] if example.query.strip() else []
    lines = [instruction] if instruction else []
    for part in _ordered(kind, question, history, [CANDIDATES, *pool]):
        lines += part
    return "\n".join([*lines, slate_open])


def shortened(examples: Sequence[RankingExample], most: int, tokenizer: Any) -> list[RankingExample]:
    """With the first `most` tokens of the texts of candidates and histories; 0: all (PromptConfig.text_tokens)."""
    if not most:
        return list(examples)
    parts = [part for e in examples for part in (e.candidates, e.history)]
    whole = list(dict.fromkeys(one_line(text) for part in parts for _, text in part))
    begins = dict(zip(whole, serving.beginnings(whole, most, tokenizer), strict=True))

    def cut(items: Sequence[Item]) -> tuple[Item, ...]:
        return tuple((item, begins[one_line(text)]) for item, text in items)

    return [dataclasses.replace(e, candidates=cut(e.candidates), history=cut(e.history)) for e in examples]


_LETTERS_OF_A_TOKEN = 4  # in English, of most tokenizers


def characters(example: RankingExample, text_tokens: int = 0) -> int:
    """Of all texts, about as much of each as is shown: which prompts are long, without encoding them."""
    most = _LETTERS_OF_A_TOKEN * text_tokens or math.inf
    return len(example.query) + sum(min(len(text), most) for _, text in (*example.candidates, *example.history))


def template(kind: str, identifier: str) -> str:
    """`render` as a Jinja template, each line with its newline, without the last line.

    Of `instruction`, `query`, `history` and `candidates`: texts, the last three of one line each.
    Raises ConfigError as `render` does.
    """
    names = {"index": "[{{ loop.index }}] ", "letter": f" {{{{ '{serving.LETTERS}'[loop.index0] }}}} ", "text": ""}
    item = names[identifier] + "{{ text }}\n"
    instruction = "{% if instruction %}{{ instruction }}\n{% endif %}"
    question = "{% if query %}" + QUESTION + "{{ query }}\n{% endif %}"
    history = "{% if history %}" + HISTORY + "\n{% for text in history %}{{ text }}\n{% endfor %}{% endif %}"
    pool = CANDIDATES + "\n{% for text in candidates %}" + item + "{% endfor %}"
    return instruction + "".join(_ordered(kind, question, history, pool))


def _ordered(kind: str, question: Any, history: Any, pool: Any) -> list[Any]:
    """The parts of a prompt after its instruction, in their order."""
    if kind == "recommendation":
        return [question, history, pool]
    if kind == "qa":
        return [history, pool, question]
    raise ConfigError(f"prompt kind {kind!r} is not recommendation or qa")


def beginning(prompt: PromptConfig, tokenizer: Any) -> list[int]:
    """Token ids that stand before a prompt, see PromptConfig.bos; of most tokenizers, and of chat templates, none."""
    if not prompt.bos or prompt.chat:
        return []
    text = "a"  # of an empty one, what stands before it and what behind could not be told apart
    alone, whole = (tokenizer([text], add_special_tokens=added)["input_ids"][0] for added in (False, True))
    return whole[: next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0)]


def encode_prompts(
    tokenizer: Any, texts: Sequence[str], chat: bool, query_ids: Sequence[str], begins: Sequence[int] = ()
) -> list[list[int]]:
    """Token ids of rendered prompts, encoded in one call; no special tokens are added but `begins` before each.

    chat: everything but the last line (the opening of the slate) becomes the user's turn of
    the tokenizer's chat template, which has its own special tokens, and the last line opens the answer.
    Raises DataError, naming the query, where the tokenizer has no token for some text, and
    ConfigError for `chat` with a tokenizer that has no chat template.
    """
    if chat:
        texts = [_as_chat(tokenizer, text) for text in texts]
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown != tokenizer.eos_token_id:  # one token for both says nothing
        for text, ids, query_id in zip(texts, encoded, query_ids, strict=True):
            if unknown in ids:
                raise DataError(_unknown_text(tokenizer, text, query_id))
    return [[*begins, *ids] for ids in encoded]


def _as_chat(tokenizer: Any, text: str) -> str:
    if not tokenizer.chat_template:
        raise ConfigError("prompt.chat=True, but the tokenizer has no chat template: set it to False")
    body, _, opening = text.rpartition("\n")
    return asked(tokenizer, body, "prompt.chat=True") + opening


def asked(tokenizer: Any, text: str, setting: str) -> str:
    """A user's turn in the chat template. Raises ConfigError, naming the setting, where the answer opens a thought."""
    turn = serving.chat(text, tokenizer)
    if turn.rstrip().endswith("<think>"):
        raise ConfigError(
            f"{setting}: this chat template begins every answer with <think>, also with enable_thinking=False, and no "
            "transcript ends a thought: leave it out, or choose a checkpoint that can answer at once"
        )
    return turn


def _unknown_text(tokenizer: Any, text: str, query_id: str) -> str:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    start, end = encoded["offset_mapping"][encoded["input_ids"].index(tokenizer.unk_token_id)]
    return (
        f"query {query_id!r}: the tokenizer has no token for {text[start:end]!r}; a tokenizer made of the data knows "
        "the items and the template that were there when the run was started (catalogue: their lines, words: their "
        "words); for free text set tokenizer to a Hugging Face directory and transcript.identifier to index"
    )
