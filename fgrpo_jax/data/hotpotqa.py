"""hotpotqa: HotpotQA in its distractor setting, questions with 10 paragraphs; the two supporting ones are relevant.

Raw files: the official `hotpot_train_v1.1*.json` and `hotpot_dev_distractor_v1*.json`, plain or .gz, in
data.manual_dir or below. dev becomes `validation`; there is no labelled test file.

A candidate is a paragraph: its id is its title, its text `title: sentences`. A supporting paragraph that is not
among them counts as missed.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fgrpo_jax.data.datasets import DataError, one_line
from fgrpo_jax.data.questions import Questions
from fgrpo_jax.data.raw_files import find_splits, open_raw
from fgrpo_jax.types import Missed, RankingExample

_OFFICIAL = {"train": "hotpot_train_v1.1", "validation": "hotpot_dev_distractor_v1"}
_LONGEST = 1 << 24  # characters of a question: more are no JSON
_BLOCK = 1 << 20  # bytes read at a time: the training file is one line of half a gigabyte


class Hotpotqa(Questions, skip_registration=True):
    MANUAL_DOWNLOAD_INSTRUCTIONS = "the official files hotpot_train_v1.1.json and hotpot_dev_distractor_v1.json"
    optional = ("missed",)

    @classmethod
    def find(cls, folder: Path | None) -> dict[str, Path]:
        names = {split: _named(start) for split, start in _OFFICIAL.items()}
        return find_splits(folder, cls.MANUAL_DOWNLOAD_INSTRUCTIONS, names)

    def examples(self, split: str) -> Iterator[RankingExample]:
        path = self.files[split]
        for number, row in enumerate(_rows(path), 1):
            try:
                yield _example(row)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{path}, question {number}: not a HotpotQA question ({error!r})") from error


def _named(start: str) -> Callable[[str], bool]:
    return lambda file: file.startswith(start) and file.endswith(".json")


def _rows(path: Path) -> Iterator[Any]:
    """The elements of the file's JSON list, one by one. Raises DataError where it is none, naming the question."""
    decoder, blocks = json.JSONDecoder(), _blocks(path)
    text, at, number, ended = "", 0, 0, False
    while True:
        at = _blank(text, at)
        start = _blank(text, at + 1)
        opening, here = ("," if number else "["), text[at : at + 1]
        if here == "]" and number or here == "[" and not number and text[start : start + 1] == "]":
            end = at if here == "]" else start  # of the list
            if (text[end + 1 :] + "".join(blocks)).strip():
                raise DataError(f"{path}: there is more after its list of {number} questions")
            return
        try:
            if here != opening:
                raise ValueError(f"expected {opening!r}")
            row, end = decoder.raw_decode(text, start)
            if end == len(text) and not ended:  # perhaps it is not whole
                raise ValueError("it ends early")
        except ValueError as error:
            block = next(blocks, "")
            if ended or here not in (opening, "") or len(text) - at > _LONGEST:
                raise DataError(f"{path}, question {number + 1}: not a JSON list of questions ({error})") from None
            text, at, ended = text[at:] + block, 0, not block
            continue
        at, number = end, number + 1
        yield row


def _blocks(path: Path) -> Iterator[str]:
    """The file's text, some at a time. Raises DataError on bytes that are not UTF-8."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    try:
        with open_raw(path) as file:
            while block := file.read(_BLOCK):
                if text := utf8.decode(block):
                    yield text
            utf8.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason})") from error


def _blank(text: str, start: int) -> int:
    """The first place from `start` on that is no white space."""
    while text[start : start + 1].isspace():
        start += 1
    return start


def _example(row: dict[str, Any]) -> RankingExample:
    titles = [title for title, _ in row["context"]]
    if not titles or len(set(titles)) != len(titles):
        raise ValueError(f"paragraphs need different titles, found {titles}")
    if not isinstance(row["_id"], str) or not isinstance(row["question"], str) or not row["question"].strip():
        raise ValueError("_id and question must be text")
    needed = dict.fromkeys(title for title, _ in row["supporting_facts"])
    return RankingExample(
        query_id=row["_id"],
        query=one_line(row["question"]),
        candidates=tuple((title, one_line(f"{title}: {''.join(sentences)}")) for title, sentences in row["context"]),
        relevance=tuple(float(title in needed) for title in titles),
        missed=tuple(Missed(title, 1.0) for title in needed if title not in titles),
    )
