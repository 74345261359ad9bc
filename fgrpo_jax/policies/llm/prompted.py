"""Zero-shot prompting: what a model answers that was never taught the format, read from free text.

    zero_shot    one question: the labels of the best candidates, the best first
    zero_shot_2  two: the labels of those that fit, as a slate; then, shown these alone, the best first

The baseline of listwise LLM rerankers (as RankGPT, arXiv 2304.09542). The model sees the prompt that it would be
trained with, its chat template where it has one, and a question in place of the opening of the slate. It writes
greedily, without a grammar. Labels are read in the order in which the answer names them first; others than the
pool's do not count, and neither does anything else it says. An answer that names none is a failure, and counts as
such in the outcomes. Nothing is filled in: a list is as long as the answer made it, up to the run's own limits.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from fgrpo_jax.config import MADE_OF_DATA, Config
from fgrpo_jax.models import decoder, draw, head
from fgrpo_jax.policies.llm import fitting, prompts, serving
from fgrpo_jax.types import OK, Array, Outcome, PyTree, RankingExample

NO_SLATE, NO_RANKING = Outcome("answer_names_none", "slate"), Outcome("answer_ranks_none", "rank")
_SPARE = 16  # tokens of an answer beside its labels
_LABELS = {"index": "numbers", "letter": "letters", "text": "names"}
_CHOOSE = "Which {n} candidates fit best? Answer with their {labels} alone, separated by commas: {example}"
_ORDER = "Rank the {n} candidates that fit best, the best one first. Answer with their {labels} alone: {example}"

# "2. " of a numbered list whose items have numbers.
_LISTED = re.compile(r"^[ \t]*\d+[.)][ \t]+(?=[^\d\n]*\d)", re.MULTILINE)
# A letter that is no part of a word, nor one itself: "I think", "A good one".
_ALONE = re.compile(r"(?<![^\W_])(?![AIa]\s+[a-z]{2}|[AI]['’])[A-Za-z](?![^\W_]|['’])")

Answer = tuple[tuple[int, ...], tuple[int, ...], Outcome]  # slate, ranking, as indices into the candidates
Write = Callable[[Sequence[Sequence[int]], int], list[list[int]]]  # token ids of prompts, most tokens -> of the answers


def unprompted(config: Config) -> str:
    """Why there is no model to be prompted here; empty where there is one."""
    if not config.model.checkpoint or config.tokenizer in MADE_OF_DATA:
        return "a model from random weights answers nothing: leave it empty, or set model.checkpoint and tokenizer"
    return ""


# --------------------------------------------------------------------- the model's side


def write(
    spec: decoder.DecoderSpec, ends: Sequence[int], params: PyTree, prompt_BS: Array, prompt_len_B: Array, most: int
) -> Array:
    """[B,T] int32: the most probable tokens after each prompt, T = `most`; the first of `ends` from any of them on."""
    params = decoder.whole(spec, params)
    prompt = decoder.prefill(spec, params, prompt_BS, prompt_len_B)
    batch = prompt_BS.shape[0]
    weights = decoder.unstack(spec, params, batch)
    first_B1 = jnp.take_along_axis(prompt_BS, prompt_len_B[:, None] - 1, 1)

    def body(carry: tuple) -> tuple:
        t, token_B1, cache, written_BT, done_B = carry
        hidden_B1D, cache = decoder.decode_step(spec, weights, prompt, cache, token_B1, t)
        token_B1, _ = draw.choose_token(head.logits(weights, hidden_B1D), None)
        done_B |= jnp.isin(token_B1[:, 0], jnp.array(ends))
        token_B1 = jnp.where(done_B[:, None], ends[0], token_B1)
        written_BT = jax.lax.dynamic_update_slice_in_dim(written_BT, token_B1, t, axis=1)
        return t + 1, token_B1, cache, written_BT, done_B

    def unfinished(carry: tuple) -> Array:
        return (carry[0] < most) & ~carry[-1].all()

    start = jnp.int32(0), first_B1, decoder.empty_cache(spec, batch, 1, most)
    start = *start, jnp.full((batch, most), ends[0], jnp.int32), jnp.zeros(batch, bool)
    return jax.lax.while_loop(unfinished, body, start)[3]


# --------------------------------------------------------------------- questions and answers


def one_step(asking: Asking, examples: Sequence[RankingExample], write: Write) -> list[Answer]:
    """The answer's first labels are the slate, and the first of these the ranking."""
    t = asking.config.transcript
    found = asking.answers(examples, _ORDER, t.slate_max, write)
    return [(tuple(items), tuple(items[: t.rank_max]), OK) if items else ((), (), NO_SLATE) for items in found]


def two_steps(asking: Asking, examples: Sequence[RankingExample], write: Write) -> list[Answer]:
    t = asking.config.transcript
    slates = asking.answers(examples, _CHOOSE, t.slate_max, write)
    again = [i for i, slate in enumerate(slates) if slate]
    ranked = asking.answers([_only(examples[i], slates[i]) for i in again], _ORDER, t.rank_max, write)
    made: list[Answer] = [((), (), NO_SLATE)] * len(examples)
    for i, items in zip(again, ranked, strict=True):
        ranking = tuple(slates[i][c] for c in items)
        made[i] = (tuple(slates[i]), ranking, OK if ranking else NO_RANKING)
    return made


METHODS = {"zero_shot": one_step, "zero_shot_2": two_steps}


def _only(example: RankingExample, items: Sequence[int]) -> RankingExample:
    candidates, relevance = (tuple(values[c] for c in items) for values in (example.candidates, example.relevance))
    return dataclasses.replace(
        example, candidates=candidates, relevance=relevance, retrieval=(), topics=(), logged=(), missed=()
    )


@dataclasses.dataclass(frozen=True)
class Asking:
    """How a run's prompts are made. kind, instruction: of the data set; vocab_size: of the model."""

    config: Config
    tokenizer: object
    kind: str
    instruction: str
    vocab_size: int

    def answers(self, examples: Sequence[RankingExample], question: str, most: int, write: Write) -> list[list[int]]:
        """The candidates that each answer names, at most `most` of them."""
        if not examples:
            return []
        examples = prompts.shortened(examples, self.config.prompt.text_tokens, self.tokenizer)
        names = [self._names(example) for example in examples]
        asked = [self._prompt(example, of, question, most) for example, of in zip(examples, names, strict=True)]
        ids = [example.query_id for example in examples]
        begins = [] if self.tokenizer.chat_template else prompts.beginning(self.config.prompt, self.tokenizer)
        tokens = prompts.encode_prompts(self.tokenizer, asked, False, ids, begins)
        fitting.check_ids(self.tokenizer, self.vocab_size, tokens, ids)
        longest = max(len(ids) for of in names for ids in serving.encoded(of, self.tokenizer))
        written = write(tokens, -(-((longest + 2) * most + _SPARE) // 16) * 16)
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
        identifier = self.config.transcript.identifier
        return [named(text, of, identifier)[:most] for text, of in zip(texts, names, strict=True)]

    def _names(self, example: RankingExample) -> list[str]:
        return [name.strip() for name in prompts.identifier_texts(example, self.config.transcript.identifier)]

    def _prompt(self, example: RankingExample, names: Sequence[str], question: str, most: int) -> str:
        identifier, n = self.config.transcript.identifier, min(most, len(names))
        shown = ", ".join(names[:2]) if identifier != "text" else "one, another"
        asked = question.format(n=n, labels=_LABELS[identifier], example=f"as in {shown}")
        text = prompts.render(example, self.kind, self.instruction, identifier, asked)
        if not self.tokenizer.chat_template:
            return f"{text}\nAnswer:"
        return prompts.asked(self.tokenizer, text, "eval.prompted")


def named(answer: str, names: Sequence[str], identifier: str) -> list[int]:
    """Which of the names an answer mentions, each once, in the order of its first mention."""
    if identifier == "index":
        in_brackets = re.findall(r"\[\s*(\d{1,9})\s*\]", answer)
        mentioned = [int(n) - 1 for n in in_brackets or re.findall(r"\d{1,9}", _LISTED.sub("", answer))]
        return list(dict.fromkeys(i for i in mentioned if 0 <= i < len(names)))
    if identifier == "letter":
        place = {name: i for i, name in enumerate(names)}
        return list(dict.fromkeys(place[name] for name in _ALONE.findall(answer) if name in place))
    known = [name.casefold() for name in names]
    fold = str.casefold if len(set(known)) == len(known) else str  # "Apple" means apple, where no other does
    place = {fold(name): i for i, name in enumerate(names)}
    longest_first = "|".join(map(re.escape, sorted(filter(None, place), key=len, reverse=True)))
    whole_words = rf"(?<!\w)(?:{longest_first})(?!\w)"
    return list(dict.fromkeys(place[name] for name in re.findall(whole_words, fold(serving.one_line(answer)))))
