"""musique: MuSiQue-Ans, multi-hop questions with 20 paragraphs; the supporting ones are relevant.

Raw files: the official `musique_ans_v1.0_{train,dev,test}*.jsonl`, plain or .gz, in
data.manual_dir or below. dev becomes `validation`. A test file is used when its paragraphs
are labelled (the official one is not). Files named `…without_paragraphs…` are ignored.

A candidate is a paragraph: its id is `idx`, its text `title: paragraph_text`. Two paragraphs
of a question may have the same title, or even the same text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fgrpo_jax.data.datasets import DataError, one_line
from fgrpo_jax.data.questions import Questions
from fgrpo_jax.data.raw_files import find_splits, numbered_lines
from fgrpo_jax.types import RankingExample

_OFFICIAL = {"train": "train", "validation": "dev", "test": "test"}


class Musique(Questions, skip_registration=True):
    MANUAL_DOWNLOAD_INSTRUCTIONS = "the official files musique_ans_v1.0_{train,dev}.jsonl of MuSiQue"

    @classmethod
    def find(cls, folder: Path | None) -> dict[str, Path]:
        names = {split: _named(name) for split, name in _OFFICIAL.items()}
        return find_splits(
            folder, cls.MANUAL_DOWNLOAD_INSTRUCTIONS, names, lambda split, path: split != "test" or _labelled(path)
        )

    def examples(self, split: str) -> Iterator[RankingExample]:
        path = self.files[split]
        for number, line in numbered_lines(path):
            try:
                yield _example(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}, line {number}: not a MuSiQue question ({error!r})") from error


def _named(name: str) -> Callable[[str], bool]:
    def matches(file: str) -> bool:
        official = file.startswith(f"musique_ans_v1.0_{name}") and file.endswith(".jsonl")
        return official and "without_paragraphs" not in file

    return matches


def _labelled(path: Path) -> bool:
    """Whether the first question says which of its paragraphs support it."""
    for number, line in numbered_lines(path):
        try:
            return all("is_supporting" in paragraph for paragraph in json.loads(line)["paragraphs"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: not a MuSiQue question ({error!r})") from error
    return False


def _example(row: dict[str, Any]) -> RankingExample:
    paragraphs = row["paragraphs"]
    ids = [str(paragraph["idx"]) for paragraph in paragraphs]
    texts = [one_line(f"{paragraph['title']}: {paragraph['paragraph_text']}") for paragraph in paragraphs]
    if not ids or len(set(ids)) != len(ids):
        raise ValueError(f"paragraphs need different idx, found {ids}")
    if not all(isinstance(paragraph["is_supporting"], bool) for paragraph in paragraphs):
        raise ValueError("is_supporting must be true or false")
    if not isinstance(row["id"], str) or not isinstance(row["question"], str) or not row["question"].strip():
        raise ValueError("id and question must be text")
    return RankingExample(
        query_id=row["id"],
        query=one_line(row["question"]),
        candidates=tuple(zip(ids, texts, strict=True)),
        relevance=tuple(float(paragraph["is_supporting"]) for paragraph in paragraphs),
    )
