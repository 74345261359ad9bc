"""Rank with an exported model in another engine: its prompts, and what it may write, from ranking.json alone.

An export copies this file beside ranking.json, as ranking.py: it needs nothing but Python and jinja2 (`order` numpy).

    said = ranking.load("exported")
    candidates = [candidates[i] for i in ranking.order(said, query_id, len(candidates))]  # as eval.py and rank do
    text = ranking.prompt(said, query, candidates, history, tokenizer)  # candidates, history: texts
    tokens = ranking.tokens(said, text, tokenizer)                      # what the model was trained with
    grammar = ranking.lark(said, candidates, tokenizer)                 # for llguidance: exactly the lists

Give the engine these tokens. One that is given the text puts the tokenizer's own special tokens (BOS) before it, as
vLLM and SGLang do unless they are told not to: before a plain prompt that is what `tokens` does too, unless
ranking.json has none in prompt.begins; before a chat template's text they would stand twice.

What a grammar can say:

    regex, ebnf   the tags, the separator, identifiers of this pool, the lengths of slate and ranking. NOT that no
                  item is repeated, NOT that the ranking is of the slate, and NOT how the text is cut into tokens:
                  a list that repeats an item must be refused (`lists` raises ValueError).
    lark          all of it, token by token, for pools of up to 64 candidates; llguidance (vLLM: backend
                  "guidance"; SGLang: --grammar-backend llguidance), which has rules with a set as a parameter.
    allowed       all of it, token by token, for any pool: a function of the tokens so far, for a logits processor.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Said = dict[str, Any]  # ranking.json
ITEM = "ITEM"  # stands in ranking.json for the identifiers of a pool
MAX_LARK = 64  # bits of a parameter of llguidance
LETTERS = string.ascii_uppercase + string.ascii_lowercase


def load(folder: str | Path) -> Said:
    return json.loads((Path(folder) / "ranking.json").read_text(encoding="utf-8"))


# --------------------------------------------------------------------- what goes in


def prompt(
    said: Said, query: str, candidates: Sequence[str], history: Sequence[str] = (), tokenizer: Any = None
) -> str:
    """The prompt of a query, to be encoded by `tokens`. tokenizer: where its chat template is used, or where texts are
    cut (prompt.text_tokens). Raises ValueError where it is needed and not given."""
    import jinja2

    p = said["prompt"]
    if tokenizer is None and (p["chat"] or p.get("text_tokens")):
        raise ValueError("prompts of this model are made with its tokenizer: give it too")
    texts = [*map(one_line, history)][-p["history_max"] :]
    shown = {"query": one_line(query), "candidates": [*map(one_line, candidates)], "history": texts}
    if p.get("text_tokens"):
        shown |= {name: beginnings(shown[name], p["text_tokens"], tokenizer) for name in ("candidates", "history")}
    body = jinja2.Template(p["template"]).render(shown, instruction=p["instruction"])
    if not p["chat"]:
        return body + p["opening"]
    return chat(body.removesuffix("\n"), tokenizer) + p["opening"]


def chat(text: str, tokenizer: Any) -> str:
    """A user's turn and the beginning of the answer to it, by the tokenizer's chat template.

    Templates that let a model think first (Qwen3's, Qwen3.5's) are told that it does not, and those that tell the date
    (Llama 3's) that it is the one they fall back to: a prompt is the same on every day.
    """
    turns, template = [{"role": "user", "content": text}], tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}" + template
    return tokenizer.apply_chat_template(
        turns, chat_template=template, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )


def tokens(said: Said, text: str, tokenizer: Any) -> list[int]:
    """Token ids of a prompt: without special tokens but those of the text, and what every plain prompt begins with."""
    return [*said["prompt"].get("begins", []), *tokenizer.encode(text, add_special_tokens=False)]


def beginnings(texts: Sequence[str], most: int, tokenizer: Any) -> list[str]:
    """The texts, those of more than `most` tokens cut before the first token too many, without a blank at the end.

    Tokens of the text alone. A word that is cut may have other tokens than it began with: then less of it is left. One
    letter always is, however many tokens it has.
    """
    found = list(texts)
    rest = [i for i, text in enumerate(found) if len(text) > 1]
    while rest:
        encoded = tokenizer([found[i] for i in rest], add_special_tokens=False, return_offsets_mapping=True)
        spans_of = dict(zip(rest, encoded["offset_mapping"], strict=True))
        rest = [i for i in rest if len(found[i]) > 1 and len(spans_of[i]) > most]
        for i in rest:
            end = min(spans_of[i][most][0], len(found[i]) - 1)  # always less of it, whatever the tokenizer says
            found[i] = found[i][: max(end, 1)].rstrip()
    return found


def order(said: Said, query_id: str, count: int) -> list[int]:
    """In which order an evaluation, and fgrpo_jax.rank, show the `count` candidates of a query: place p holds
    candidate order[p] of those in order of the data. Needs numpy. Who shows them otherwise gets other lists."""
    import numpy

    # As fgrpo_jax.data.batches.shown draws it.
    parts = json.dumps([said["run"]["seed"], "evaluation", query_id])
    seed = int.from_bytes(hashlib.sha256(parts.encode()).digest()[:16], "little")
    return numpy.random.default_rng(seed).permutation(count).tolist()


def one_line(text: str) -> str:
    return " ".join(text.split())


def identifiers(said: Said, candidates: Sequence[str]) -> list[str]:
    """How a transcript names each candidate. Raises ValueError for more of them than letters, where these are names."""
    return names_of(said["transcript"]["identifier"], candidates)


def names_of(identifier: str, candidates: Sequence[str]) -> list[str]:
    """`[1]`, `[2]` …; or a blank and a letter, which is one token of most tokenizers; or the texts themselves."""
    if identifier == "index":
        return [f"[{n}]" for n in range(1, len(candidates) + 1)]
    if identifier == "letter":
        if len(candidates) > len(LETTERS):
            raise ValueError(f"{len(candidates)} candidates, and only {len(LETTERS)} letters")
        return [f" {letter}" for letter in LETTERS[: len(candidates)]]
    return [one_line(text) for text in candidates]


def encoded(names: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of identifiers. A tokenizer that puts a blank before every text (SentencePiece's mark shows it) would
    put a second one before a letter: there it is encoded without its own."""
    found = tokenizer(list(names), add_special_tokens=False)["input_ids"]
    for i, name in enumerate(names):
        if name.startswith(" ") and len(found[i]) > 1:
            bare = tokenizer.encode(name[1:], add_special_tokens=False)
            if len(bare) == 1 and tokenizer.convert_ids_to_tokens(bare)[0].startswith("\u2581"):
                found[i] = bare
    return found


# --------------------------------------------------------------------- text grammars


def regex(said: Said, candidates: Sequence[str]) -> str:
    """Without look-around and back-references, which the engines do not know."""
    names = "|".join(map(_escaped, identifiers(said, candidates)))
    return regex_of(said["transcript"], names, len(candidates))


def regex_of(transcript: Said, names: str, n: int) -> str:
    """names: the alternatives of an item, for a pool of n."""
    separator, close, end = (_escaped(transcript[name]["text"]) for name in ("separator", "slate_close", "rank_close"))

    def several(low: int, high: int) -> str:
        return f"(?:{names})" + _repeated(f"(?:{separator}(?:{names}))", low - 1, high - 1)

    parts = [several(*slate) + close + several(*rank) + end for slate, rank in _lengths(transcript, n)]
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"


def ebnf(said: Said, candidates: Sequence[str]) -> str:
    """In the dialect of GBNF and XGrammar; the language of `regex`."""
    names = " | ".join(map(_quoted, identifiers(said, candidates)))
    return ebnf_of(said["transcript"], names, len(candidates))


def ebnf_of(transcript: Said, names: str, n: int) -> str:
    separator, close, end = (_quoted(transcript[name]["text"]) for name in ("separator", "slate_close", "rank_close"))
    next_item = f"({separator} item)" if transcript["separator"]["text"] else "item"

    def several(low: int, high: int) -> str:
        return "item" + _repeated(f" {next_item}", low - 1, high - 1)

    parts = [f"{several(*slate)} {close} {several(*rank)} {end}" for slate, rank in _lengths(transcript, n)]
    return f"root ::= {' | '.join(parts)}\nitem ::= {names}\n"


def _lengths(transcript: Said, n: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Least and most items of slate and ranking; a ranking has as many items as its slate at most."""
    low, high = (min(transcript[name], n) for name in ("slate_min", "slate_max"))
    least, most = transcript["rank_min"], transcript["rank_max"]
    short = [((size, size), (min(least, size), size)) for size in range(low, min(high + 1, most))]
    rest = max(low, most)
    return short + ([((rest, high), (min(least, rest), most))] if rest <= high else [])


def _repeated(what: str, low: int, high: int) -> str:
    """Nothing, once, or with bounds: a bound of 0 at most is refused by some engines."""
    return what * high if low == high <= 1 else f"{what}{{{low},{high}}}"


def _escaped(text: str) -> str:
    return re.sub(r"[\\.^$*+?{}\[\]|()]", r"\\\g<0>", text)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


# --------------------------------------------------------------------- exactly the lists, token by token


def pieces(said: Said, candidates: Sequence[str], tokenizer: Any) -> list[tuple[int, ...]]:
    """Token ids of the identifiers. Raises ValueError where two candidates have the same ones."""
    found = [tuple(ids) for ids in encoded(identifiers(said, candidates), tokenizer)]
    if len(set(found)) < len(found) or () in found:
        raise ValueError("two candidates have the same identifier, or one has none")
    return found


def lark(said: Said, candidates: Sequence[str], tokenizer: Any) -> str:
    """A grammar for llguidance. The parameter of a rule is a set of candidates: those of the slate, then those of
    the slate that are not ranked yet. Raises ValueError for a pool of more than MAX_LARK."""
    t, n = said["transcript"], len(candidates)
    if n > MAX_LARK:
        raise ValueError(f"{n} candidates; the grammar can hold {MAX_LARK}: use `allowed`")
    names = [_ids(piece) for piece in pieces(said, candidates, tokenizer)]
    separator, close, end = (_ids(t[name]["tokens"]) for name in ("separator", "slate_close", "rank_close"))
    low, high = (min(t[name], n) for name in ("slate_min", "slate_max"))

    def rule(name: str, choices: list[str]) -> str:
        return f"{name}::_ : " + "\n    | ".join(choices)

    closes = [f"{close} rank{size}::_ %if bit_count_eq(_, {size})" for size in range(low, high + 1)]
    rules = [
        "%llguidance {}",
        "start: slate::0x0",
        rule("slate", [f"{name} listed::set_bit({i}) %if bit_clear({i})" for i, name in enumerate(names)]),
        rule("listed", [f"{separator} slate::_ %if bit_count_lt(_, {high})", *closes]),
    ]
    for size in range(low, high + 1):
        least, most = min(t["rank_min"], size), min(t["rank_max"], size)
        picks = [f"{name} ranked{size}::clear_bit({i}) %if bit_set({i})" for i, name in enumerate(names)]
        goes_on = f"{separator} rank{size}::_ %if bit_count_gt(_, {size - most})"
        rules += [rule(f"rank{size}", picks)]
        rules += [rule(f"ranked{size}", [goes_on, f"{end} %if bit_count_le(_, {size - least})"])]
    return "\n".join(rules) + "\n"


def _ids(tokens: Sequence[int]) -> str:
    return " ".join(f"<[{token}]>" for token in tokens)


def allowed(said: Said, candidates: Sequence[str], tokenizer: Any) -> Callable[[Sequence[int]], list[int]]:
    """(tokens written so far) -> the tokens that may come next, ascending; eos after the end. See `walk`."""
    step, begin = walk(said, candidates, tokenizer)

    def after(tokens: Sequence[int]) -> list[int]:
        state = begin
        for token in tokens:
            state = step(state, token)
        return sorted({piece[at] for piece, at, _ in state}) or [said["transcript"]["eos"]]

    return after


def lists(said: Said, candidates: Sequence[str], tokenizer: Any, tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """Slate and ranking, as places in `candidates`, of a whole transcript up to eos. Raises ValueError for another."""
    step, state = walk(said, candidates, tokenizer)
    for at, token in enumerate(tokens):
        if ended := [lists for piece, done, lists in state if piece == (token,) and lists[1] == "end"]:
            slate, _, ranking = ended[0]
            return list(slate), list(ranking)
        state = step(state, token)
        if not state:
            raise ValueError(f"no transcript: token {token}, at {at}, is not allowed there")
    raise ValueError("no transcript: it does not end")


def walk(said: Said, candidates: Sequence[str], tokenizer: Any) -> tuple[Callable, list]:
    """(state, token) -> state, and the state at the beginning.

    A state lists the pieces (identifiers, literals) that the next token may belong to: its token ids, how many of
    them were read, and where one is after it: (slate, phase, ranking), phase being what comes next.
    """
    t, names = said["transcript"], pieces(said, candidates, tokenizer)
    separator, close, end = (tuple(t[name]["tokens"]) for name in ("separator", "slate_close", "rank_close"))

    def following(slate: tuple, phase: str, ranking: tuple) -> Iterator[tuple]:
        """What may follow, as (token ids, 0, where one is then). Phases: item (one is due), listed, end."""
        ranks = phase.startswith("rank")
        of, least, most = (slate, "rank_min", "rank_max") if ranks else (range(len(names)), "slate_min", "slate_max")
        mine = ranking if ranks else slate
        kind = "rank" if ranks else "slate"
        if phase == "eos":
            yield (t["eos"],), 0, (slate, "end", ranking)
        elif phase.endswith("item"):
            for i in of:
                if i not in mine:
                    then = (slate, "rank listed", (*ranking, i)) if ranks else ((*slate, i), "slate listed", ())
                    yield names[i], 0, then
        elif phase.endswith("listed"):
            if len(mine) < min(t[most], len(of)):
                if separator:
                    yield separator, 0, (slate, f"{kind} item", ranking)
                else:
                    yield from following(slate, f"{kind} item", ranking)
            if len(mine) >= min(t[least], len(of)):
                yield (end, 0, (slate, "eos", ranking)) if ranks else (close, 0, (slate, "rank item", ()))

    def step(state: list, token: int) -> list:
        found = []
        for piece, at, then in state:
            if piece[at] == token:
                found += [(piece, at + 1, then)] if at + 1 < len(piece) else following(*then)
        return found

    return step, list(following((), "slate item", ()))
