"""jsonl: your own data, one JSON object a line.

data.manual_dir holds `train.jsonl`, `validation.jsonl`, `test.jsonl`, any of them, plain or
.gz, in UTF-8. A line:

    {"query_id": "q17", "query": "who wrote the song?",
     "candidates": [{"id": "p1", "text": "First passage."}, {"id": "p2", "text": "Second."}],
     "relevance": [0, 2.5],
     "history": [{"id": "p9", "text": "Seen before."}]}

    query_id    text, unique in its file
    query       text; may be "" where there is a history
    candidates  the pool, at least one; ids differ, and where transcripts name items by their text, texts
    relevance   one number per candidate: the gain, finite and >= 0; 0 is not relevant
    history     optional: what the user took before, oldest first

and, optional too, what rankers learn from (one of them in one line, and all lines can have it):

    retrieval   one number per candidate: the score of the first stage, finite, higher is better
    topics      one whole number >= 0 per candidate: its group, for redundancy
    logged      lists that were shown, [{"items": ["p2", "p1"], "feedback": [1, 0]}, ...]: ids of
                candidates in the order shown, and what each position got, from 0 to 1

Nothing else is allowed in a line. A query without a relevant candidate is kept for
evaluation, where it scores 0, and skipped (and counted) in training, unless a ranker learns
from lists that were shown of it. White space
within a text, newlines too, is read as single spaces. Every malformed line of every file is
reported, with file, line number and reasons, in one DataError, and nothing is prepared.
With a history anywhere the prompts are those of recommendation, otherwise of qa.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fgrpo_jax.data.builder import RankingBuilder
from fgrpo_jax.data.datasets import DataError, Item, one_line
from fgrpo_jax.data.raw_files import find_one, manual_folder, open_raw
from fgrpo_jax.types import LoggedList, RankingExample

SPLITS = ("train", "validation", "test")
REQUIRED, OPTIONAL = ("query_id", "query", "candidates", "relevance"), ("history", "retrieval", "topics", "logged")
GAIN_MAX = 1e30  # gains are float32 on the device, and summed


class Jsonl(RankingBuilder, skip_registration=True):
    MANUAL_DOWNLOAD_INSTRUCTIONS = "train.jsonl, validation.jsonl or test.jsonl (see fgrpo_jax/data/jsonl.py)"
    instruction = "Choose and rank the candidates that fit."

    def __init__(self, files: dict[str, Path], given: tuple[Item, ...] | None, **kwargs: Any):
        self._rows, problems = {}, []
        for split, path in files.items():
            self._rows[split], found = read(path)
            problems += found
        if problems:
            head = f"{len(problems)} malformed line(s), nothing was prepared:"
            raise DataError("\n".join([head, *problems]))
        super().__init__(files, given, **kwargs)

    @classmethod
    def find(cls, folder: Path | None) -> dict[str, Path]:
        folder = manual_folder(folder, cls.MANUAL_DOWNLOAD_INSTRUCTIONS)
        found = {split: find_one(folder, f"{split}.jsonl".__eq__, deep=False) for split in SPLITS}
        found = {split: path for split, path in found.items() if path}
        if not found:
            raise DataError(f"{folder} holds none of {cls.MANUAL_DOWNLOAD_INSTRUCTIONS}")
        return found

    @property
    def optional(self) -> tuple[str, ...]:
        rows = [row for rows in self._rows.values() for row in rows]
        return tuple(name for name in ("retrieval", "topics", "logged") if any(getattr(row, name) for row in rows))

    @property
    def kind(self) -> str:
        return "recommendation" if any(row.history for rows in self._rows.values() for row in rows) else "qa"

    def split_names(self) -> tuple[str, ...]:
        return tuple(self.files)

    def examples(self, split: str) -> Iterator[RankingExample]:
        return iter(self._rows[split])

    def frozen(self, split: str) -> dict[str, Any]:
        return {"seed": None, "negatives": "the candidates of the file, in its order"}


def read(path: Path) -> tuple[list[RankingExample], list[str]]:
    """All sound rows of a file, and a report `file, line n: reasons` for each of the others."""
    rows, problems, lines = [], [], {}
    with open_raw(path) as file:
        for number, line in enumerate(file, 1):
            row, reasons = read_line(line)
            if row is not None and lines.setdefault(row.query_id, number) != number:
                reasons.append(f"query_id {row.query_id!r} was already used in line {lines[row.query_id]}")
            if reasons:
                problems.append(f"  {path}, line {number}: {'; '.join(reasons)}")
            else:
                rows.append(row)
    if not rows and not problems:
        problems.append(f"  {path}, line 1: the file is empty")
    return rows, problems


def read_line(line: bytes, judged: bool = True) -> tuple[RankingExample | None, list[str]]:
    """The row that a line holds, or None and every reason why it is malformed.

    judged: whether `relevance` must be there; without it no candidate is relevant.
    """
    reasons: list[str] = []
    value = _parse(line, reasons)
    return None if reasons else _example(value, reasons, judged), reasons


def example_of(value: Any) -> RankingExample:
    """The query that an object says, perhaps unjudged. Raises DataError with every reason why it is malformed."""
    reasons: list[str] = []
    row = None
    if isinstance(value, Mapping):
        row = _example(dict(value), reasons, judged=False)
    else:
        reasons.append(f"expected an object, found {type(value).__name__}")
    if row is None:
        raise DataError("; ".join(reasons))
    texts = [row.query_id, row.query, *(text for item in (*row.candidates, *row.history) for text in item)]
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"a text is not Unicode ({error.reason})") from None
    return row


def _parse(line: bytes, reasons: list[str]) -> Any:
    try:
        text = line.decode("utf-8-sig").strip()
        if not text:
            raise ValueError("the line is empty")
        value = json.loads(text)
        if "\\u" in text:  # only an escape can be one
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # refuses lone surrogates
    except (ValueError, RecursionError) as error:
        reasons.append(f"not JSON ({error})")
        return None
    if not isinstance(value, dict):
        reasons.append(f"expected an object, found {type(value).__name__}")
    return value


def _example(value: dict[str, Any], reasons: list[str], judged: bool) -> RankingExample | None:
    """The row, or None after adding every reason why it is malformed."""
    if missing := [name for name in REQUIRED if name not in value and (judged or name != "relevance")]:
        reasons.append(f"missing field(s) {', '.join(missing)}")
    if unknown := [name for name in value if name not in REQUIRED + OPTIONAL]:
        reasons.append(f"unknown field(s) {', '.join(unknown)}")
    if reasons:
        return None
    query_id, query = value["query_id"], value["query"]
    if not isinstance(query_id, str) or not query_id.strip():
        reasons.append("query_id must be a text that is not empty")
    if not isinstance(query, str):
        reasons.append("query must be a text")
    candidates = _items("candidates", value["candidates"], reasons)
    history = _items("history", value.get("history", []), reasons)
    if isinstance(query, str) and not query.strip() and not value.get("history"):
        reasons.append("query is empty and there is no history: nothing to rank by")
    if candidates is not None:
        _check_pool(candidates, reasons)
    size = len(value["candidates"]) if isinstance(value["candidates"], list) else None
    relevance: tuple[float, ...] | None = (0.0,) * (size or 0)
    if "relevance" in value:
        relevance = _numbers("relevance", value["relevance"], size, "candidates", reasons)
    if reasons:
        return None
    more = _for_rankers(value, [item for item, _ in candidates], reasons)
    return None if reasons else RankingExample(query_id, one_line(query), candidates, relevance, history, **more)


def _for_rankers(value: dict[str, Any], ids: list[str], reasons: list[str]) -> dict[str, Any]:
    """The optional fields of a sound row, by their names in RankingExample."""
    found: dict[str, Any] = {}
    if "retrieval" in value:
        found["retrieval"] = _numbers("retrieval", value["retrieval"], len(ids), "candidates", reasons, low=-GAIN_MAX)
    if "topics" in value:
        found["topics"] = _numbers(
            "topics", value["topics"], len(ids), "candidates", reasons, high=2**31 - 1, whole=True
        )
    if "logged" in value and not isinstance(value["logged"], list):
        reasons.append("logged must be a list of objects with items and feedback")
    elif "logged" in value:
        places = {item: place for place, item in enumerate(ids)}
        found["logged"] = tuple(_shown(f"logged[{n}]", one, places, reasons) for n, one in enumerate(value["logged"]))
    return found


def _shown(where: str, value: Any, places: dict[str, int], reasons: list[str]) -> LoggedList | None:
    if not isinstance(value, dict) or set(value) != {"items", "feedback"} or not isinstance(value["items"], list):
        reasons.append(f"{where} must be an object with items (a list of ids) and feedback, and nothing else")
        return None
    if strange := [item for item in value["items"] if not isinstance(item, str) or item not in places]:
        reasons.append(f"{where} shows {strange[0]!r}, which is no candidate")
        return None
    items = tuple(places[item] for item in value["items"])
    if len(set(items)) < len(items):
        reasons.append(f"{where} shows a candidate twice")
    return LoggedList(items, _numbers(f"{where}.feedback", value["feedback"], len(items), "items", reasons, high=1))


def _items(name: str, value: Any, reasons: list[str]) -> tuple[Item, ...] | None:
    if not isinstance(value, list):
        reasons.append(f"{name} must be a list of objects with id and text")
        return None
    found = []
    for number, item in enumerate(value):
        if not isinstance(item, dict) or len(item) != 2 or "id" not in item or "text" not in item:
            reasons.append(f"{name}[{number}] must be an object with id and text, and nothing else")
            return None
        identity, text = item["id"], item["text"]
        if isinstance(identity, str) and isinstance(text, str) and identity.strip() and (line := one_line(text)):
            found.append((identity, line))
            continue
        reasons.append(f"{name}[{number}]: id and text must be texts that are not empty")
        return None
    return tuple(found)


def _check_pool(candidates: tuple[Item, ...], reasons: list[str]) -> None:
    if not candidates:
        reasons.append("candidates is empty")
    ids = [item for item, _ in candidates]
    if len(set(ids)) < len(ids):
        twice = next(item for item, count in Counter(ids).items() if count > 1)
        reasons.append(f"two candidates have the id {twice!r}")


def _numbers(
    name: str,
    value: Any,
    size: int | None,
    of: str,
    reasons: list[str],
    low: float = 0,
    high: float = GAIN_MAX,
    whole: bool = False,
) -> tuple[float, ...] | None:
    """A list of `size` numbers from low to high, one for each `of`; size: None where that is unknown."""
    if not isinstance(value, list):
        reasons.append(f"{name} must be a list of numbers")
        return None
    if size is not None and len(value) != size:
        reasons.append(f"{name} has {len(value)} numbers for {size} {of}")
    for number, one in enumerate(value):
        where = f"{name}[{number}]"
        if type(one) not in ((int,) if whole else (int, float)):
            reasons.append(f"{where} is not a {'whole ' * whole}number")
        elif isinstance(one, float) and not math.isfinite(one):
            reasons.append(f"{where} is {one}, not finite")
        elif not low <= one <= high:
            below = "negative" if low == 0 else f"below {low:g}"
            reasons.append(f"{where} is {below if one < low else f'above {high:g}'}")
    return None if reasons else tuple(value if whole else map(float, value))
