"""Files of retrieval test collections, as BEIR and TREC have them; all UTF-8, plain or .gz.

corpus.jsonl     {"_id": "d1", "title": "optional", "text": "..."}
queries.jsonl    {"_id": "q1", "text": "..."}
qrels            BEIR: `query-id  corpus-id  score`, tabs, a line of names; TREC: `query 0 document gain`
run              TREC: `query Q0 document rank score tag`
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from fgrpo_jax.data import tables
from fgrpo_jax.data.datasets import DataError, one_line
from fgrpo_jax.data.jsonl import GAIN_MAX
from fgrpo_jax.data.raw_files import numbered_lines


def read_corpus(path: Path) -> dict[str, str]:
    """`title: text` of every document by id, "" for one without both, in the order of the file."""
    texts = {}
    for where, name, row in _objects(path, texts):
        parts = [_text(row.get(part), f"{where}, {part}") for part in ("title", "text")]
        texts[name] = ": ".join(part for part in parts if part)
    return _not_empty(path, texts)


def read_queries(path: Path) -> dict[str, str]:
    """Text by id. Raises DataError for one without text."""
    texts = {}
    for where, name, row in _objects(path, texts):
        texts[name] = _text(row.get("text"), f"{where}, text")
        if not texts[name]:
            raise DataError(f"{where}: query {name!r} has no text")
    return _not_empty(path, texts)


def _objects(path: Path, known: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for number, row in tables.json_lines(path):
        where = f"{path}, line {number}"
        if "_id" not in row:
            raise DataError(f"{where}: no field '_id', only {', '.join(map(repr, row)) or 'nothing'}")
        name = tables.identifier(row["_id"], f"{where}, _id")
        if name in known:
            raise DataError(f"{where}: _id {name!r} occurs twice: keep one of its lines")
        yield where, name, row


def _text(value: Any, where: str) -> str:
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: {value!r} is no text")
    return one_line(value or "")


def _not_empty(path: Path, rows: dict) -> dict:
    if not rows:
        raise DataError(f"{path} is empty")
    return rows


def read_qrels(path: Path, queries: Container[str], corpus: Container[str]) -> dict[str, dict[str, float]]:
    """Gains of judged documents by query, in the order of the file.

    Raises DataError for a line of another form, a query or document that is not there, a pair that occurs twice, and
    a gain that is negative or not finite.
    """
    found: dict[str, dict[str, float]] = {}
    for number, line in numbered_lines(path):
        line, where = line.removeprefix("\ufeff"), f"{path}, line {number}"
        # BEIR's ids may hold blanks, as tabs part them; TREC's do not.
        fields = [field.strip() for field in line.split("\t")] if line.count("\t") == 2 else line.split()
        if not fields or number == 1 and fields[0] in ("query-id", "query_id"):
            continue
        if len(fields) == 4:
            del fields[1]
        if len(fields) != 3:
            raise DataError(
                f"{where}: expected `query-id corpus-id score` (BEIR) or `query 0 document gain` (TREC), "
                f"found {line[:80]!r}"
            )
        query, document, gain = fields[0], fields[1], tables.number(fields[2], f"{where}, gain")
        if not 0 <= gain <= GAIN_MAX:
            raise DataError(f"{where}: a gain of {gain:g}; it must be 0 (not relevant) or more, up to {GAIN_MAX:g}")
        if query not in queries:
            raise DataError(f"{where}: query {query!r} is not in the queries: add it there, or remove the line")
        if document not in corpus:
            raise DataError(f"{where}: document {document!r} is not in the corpus: add it there, or remove the line")
        if document in found.setdefault(query, {}):
            raise DataError(f"{where}: query {query!r} and document {document!r} were judged in a line before")
        found[query][document] = gain
    return _not_empty(path, found)


def read_run(path: Path, queries: Container[str], corpus: Container[str]) -> dict[str, dict[str, float]]:
    """Scores of retrieved documents by query, best first: by rank.

    Raises DataError for a line of another form, a query or document that is not there, a document or a rank that a
    query has twice, and where order by rank is not that by score.
    """
    found: dict[str, dict[int, tuple[str, float, str]]] = {}
    seen: set[tuple[str, str]] = set()
    for number, line in numbered_lines(path):
        fields, where = line.removeprefix("\ufeff").split(), f"{path}, line {number}"
        if not fields:
            continue
        if len(fields) != 6:
            raise DataError(f"{where}: {len(fields)} fields; expected `query Q0 document rank score tag`")
        query, _, document, rank, score, _ = fields
        if query not in queries:
            raise DataError(f"{where}: query {query!r} is not in the queries: add it there, or remove the line")
        if document not in corpus:
            raise DataError(f"{where}: document {document!r} is not in the corpus: add it there, or remove the line")
        if not rank.isdecimal():
            raise DataError(f"{where}: rank {rank!r} is not a whole number")
        if (query, document) in seen:
            raise DataError(f"{where}: document {document!r} occurs twice for query {query!r}")
        if int(rank) in (mine := found.setdefault(query, {})):
            raise DataError(f"{where}: query {query!r} has rank {rank} twice: number its documents anew")
        seen.add((query, document))
        mine[int(rank)] = document, tables.number(score, f"{where}, score"), where
    return {query: _by_rank(query, ranks) for query, ranks in _not_empty(path, found).items()}


def _by_rank(query: str, ranks: dict[int, tuple[str, float, str]]) -> dict[str, float]:
    ordered = [ranks[rank] for rank in sorted(ranks)]
    for (_, better, _), (document, score, where) in zip(ordered, ordered[1:]):
        if score > better:
            raise DataError(
                f"{where}: document {document!r} of query {query!r} scores {score:g}, above the one ranked before it "
                f"({better:g}): ranks and scores disagree; sort by score and number anew"
            )
    return {document: score for document, score, _ in ordered}
