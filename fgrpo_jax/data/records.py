"""A RankingExample as a row of a prepared file, and as the content that fingerprints are taken of.

A data set declares the optional fields that its rows may have, and a row without them is stored and
hashed as if they did not exist.

To TFDS a row is one string of bytes, in MessagePack: of typed features it reads a row with a pool of 50 ten times as
slowly, in 0.3 ms.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgpack
import numpy as np

from fgrpo_jax.types import LoggedList, Missed, RankingExample

FORMAT = "MessagePack 1"  # change it with what `encode` writes: prepared folders are found by it
OPTIONAL = ("retrieval", "topics", "logged", "missed")  # fields of RankingExample


def content(e: RankingExample) -> list[Any]:
    """What is stored of an example, and what the fingerprint of a split is taken of; numbers as float32 has them."""
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
    return np.asarray(values, np.float32).tolist()


def encode(e: RankingExample, optional: Collection[str]) -> bytes:
    """The row of an example. Raises ValueError, which names it, for what does not fit the types or the candidates,
    text that is no Unicode, and an optional field that the data set does not declare."""
    check(e)
    if extra := [name for name in OPTIONAL if getattr(e, name) and name not in optional]:
        raise ValueError(f"query {e.query_id!r} has {', '.join(extra)}, which its data set does not declare")
    try:
        return msgpack.packb(content(e))
    except UnicodeEncodeError as error:
        raise ValueError(f"query {e.query_id!r}: a text is not Unicode ({error.reason})") from None


def check(e: RankingExample) -> None:
    """Raises ValueError unless ids and texts are strings, and the optional fields fit the candidates."""
    size = len(e.candidates)
    texts = [e.query_id, e.query, *(part for item in (*e.candidates, *e.history) for part in item)]
    texts += [lost.item for lost in e.missed]
    if other := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"query {e.query_id!r}: an id or text is no string, {other[0]!r}")
    wrong = [name for name in ("retrieval", "topics") if len(getattr(e, name)) not in (0, size)]
    if not np.isfinite(e.retrieval).all() or any(not 0 <= topic < 2**31 for topic in e.topics):
        wrong.append("retrieval or topics (a score that is not finite, a topic below 0 or beyond 31 bits)")
    for items, feedback in e.logged:
        sound = len(items) == len(feedback) == len(set(items)) and all(0 <= i < size for i in items)
        if not sound or not all(0 <= value <= 1 for value in feedback):
            wrong.append(f"logged list {items} with feedback {feedback}")
    if {lost.item for lost in e.missed} & {item for item, _ in e.candidates}:
        wrong.append("missed, which names a candidate")
    if wrong:
        raise ValueError(f"query {e.query_id!r}, {size} candidates: unsound {'; '.join(wrong)}")


def decode(row: bytes) -> RankingExample:
    """Inverse of `encode`."""
    query_id, query, candidates, relevance, history, *rest = msgpack.unpackb(row, use_list=False)
    more = rest[0] if rest else {}
    for name, made in (("logged", LoggedList), ("missed", Missed)):
        if name in more:
            more[name] = tuple(made(*values) for values in more[name])
    return RankingExample(query_id, query, candidates, relevance, history, **more)
