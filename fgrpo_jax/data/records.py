"""A RankingExample as a row of a prepared file, and as the content that fingerprints are taken of.

A data set has the same optional fields in every row, and a row without them is stored and
hashed as if they did not exist.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fgrpo_jax.types import LoggedList, Missed, RankingExample

OPTIONAL = ("retrieval", "topics", "logged", "missed")  # fields of RankingExample


def features(optional: Collection[str]) -> dict[str, Any]:
    """The TFDS features of a row. Lists that differ in length lie one behind the other."""
    text = tfds.features.Text()
    items = tfds.features.Tensor(shape=(None, 2), dtype=np.str_)  # (id, text)
    numbers = tfds.features.Tensor(shape=(None,), dtype=np.float32)
    whole = tfds.features.Tensor(shape=(None,), dtype=np.int32)
    names = tfds.features.Tensor(shape=(None,), dtype=np.str_)
    more = {
        "retrieval": {"retrieval": numbers},
        "topics": {"topics": whole},
        "logged": {"logged_len": whole, "logged_items": whole, "logged_feedback": numbers},
        "missed": {"missed_ids": names, "missed_gains": numbers, "missed_topics": whole},
    }
    found = {"query_id": text, "query": text, "candidates": items, "relevance": numbers, "history": items}
    for field in optional:
        found |= more[field]
    return found


def content(e: RankingExample) -> list[Any]:
    """What the fingerprint of a split is taken of; numbers as they are read back."""
    found = [e.query_id, e.query, e.candidates, _floats(e.relevance), e.history]
    more = {
        "retrieval": _floats(e.retrieval),
        "topics": e.topics,
        "logged": [(shown.items, _floats(shown.feedback)) for shown in e.logged],
        "missed": [(item, *_floats((gain,)), topic) for item, gain, topic in e.missed],
    }
    present = {name: value for name, value in more.items() if value}
    return [*found, present] if present else found


def _floats(values: tuple[float, ...]) -> list[float]:
    return [float(np.float32(value)) for value in values]


def encode(e: RankingExample, optional: Collection[str]) -> dict[str, Any]:
    """The row of an example. Raises ValueError for an optional field that does not fit the candidates, or that
    the data set does not declare."""
    check(e)
    if extra := [name for name in OPTIONAL if getattr(e, name) and name not in optional]:
        raise ValueError(f"query {e.query_id!r} has {', '.join(extra)}, which its data set does not declare")
    row = {
        "query_id": e.query_id,
        "query": e.query,
        "candidates": np.array(e.candidates, np.object_).reshape(-1, 2),
        "relevance": np.array(e.relevance, np.float32),
        "history": np.array(e.history, np.object_).reshape(-1, 2),
    }
    more = {
        "retrieval": lambda: {"retrieval": np.array(e.retrieval, np.float32)},
        "topics": lambda: {"topics": np.array(e.topics, np.int32)},
        "logged": lambda: {
            "logged_len": np.array([len(shown.items) for shown in e.logged], np.int32),
            "logged_items": np.array([i for shown in e.logged for i in shown.items], np.int32),
            "logged_feedback": np.array([f for shown in e.logged for f in shown.feedback], np.float32),
        },
        "missed": lambda: {
            "missed_ids": np.array([lost.item for lost in e.missed], np.object_),
            "missed_gains": np.array([lost.gain for lost in e.missed], np.float32),
            "missed_topics": np.array([lost.topic for lost in e.missed], np.int32),
        },
    }
    for field in optional:
        row |= more[field]()
    return row


def check(e: RankingExample) -> None:
    """Raises ValueError unless the optional fields fit the candidates."""
    size = len(e.candidates)
    wrong = [name for name in ("retrieval", "topics") if len(getattr(e, name)) not in (0, size)]
    if not np.isfinite(e.retrieval).all() or any(topic < 0 for topic in e.topics):
        wrong.append("retrieval or topics (a score that is not finite, a topic below 0)")
    for items, feedback in e.logged:
        sound = len(items) == len(feedback) == len(set(items)) and all(0 <= i < size for i in items)
        if not sound or not all(0 <= value <= 1 for value in feedback):
            wrong.append(f"logged list {items} with feedback {feedback}")
    if {lost.item for lost in e.missed} & {item for item, _ in e.candidates}:
        wrong.append("missed, which names a candidate")
    if wrong:
        raise ValueError(f"query {e.query_id!r}, {size} candidates: unsound {'; '.join(wrong)}")


def decode(row: dict[str, Any]) -> RankingExample:
    """Inverse of `encode`."""
    more = {}
    if "retrieval" in row:
        more["retrieval"] = tuple(row["retrieval"].tolist())
    if "topics" in row:
        more["topics"] = tuple(row["topics"].tolist())
    if "logged_len" in row:
        ends = np.cumsum(row["logged_len"])[:-1]
        lists = (np.split(row[f"logged_{part}"], ends) for part in ("items", "feedback"))
        shown = zip(*lists, strict=True) if len(row["logged_len"]) else ()
        more["logged"] = tuple(LoggedList(tuple(i.tolist()), tuple(f.tolist())) for i, f in shown)
    if "missed_ids" in row:
        ids = (name.decode() for name in row["missed_ids"].tolist())
        lost = zip(ids, row["missed_gains"].tolist(), row["missed_topics"].tolist(), strict=True)
        more["missed"] = tuple(Missed(*values) for values in lost)
    return RankingExample(
        query_id=row["query_id"].decode(),
        query=row["query"].decode(),
        candidates=tuple((i.decode(), t.decode()) for i, t in row["candidates"].tolist()),
        relevance=tuple(row["relevance"].tolist()),
        history=tuple((i.decode(), t.decode()) for i, t in row["history"].tolist()),
        **more,
    )
