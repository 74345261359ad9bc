"""Rank new queries with a finished run, line by line.

    python -m fgrpo_jax.rank RUN_DIR queries.jsonl > ranked.jsonl        (- reads standard input)

RUN_DIR is a run directory, or what `python -m fgrpo_jax.export` wrote of one.

A line of queries.jsonl is one of the data set `jsonl` (fgrpo_jax/data/jsonl.py); it needs no `relevance`,
and a query id may occur again. For each line comes one, in the same order:

    {"line": 1, "query_id": "q17", "slate": ["p2", "p1"], "ranking": ["p2"], "slate_index": [1, 0],
     "ranking_index": [1], "outcome": "ok", "logp": {"slate": -0.7, "rank": -0.1, "total": -0.8}}
    {"line": 2, "error": "not JSON (...)"}

Indices are places in the line's own candidates. A phase that broke a rule (`outcome`) does not count. With
`--samples N` a line has N further lists, drawn from the policy: "samples": [{"slate": ...}, ...].

Lines are computed, and written, batch by batch, so a process that is killed loses none that was written. Of a file
the next batch is read and encoded meanwhile; standard input is read when what came before is written. Exit code 1:
some lines were in error. 2: nothing can be ranked.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fgrpo_jax.errors import UserError
from fgrpo_jax.run.command import RankArguments, parse_or_exit, parse_ranking, refuse

if __name__ == "__main__":  # before what takes seconds to import, so that --help and a typing error answer at once
    COMMAND = parse_or_exit(parse_ranking, sys.argv[1:], __doc__)

from fgrpo_jax.config import ConfigError
from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.data.jsonl import read_line
from fgrpo_jax.files import path_of, reason, storing
from fgrpo_jax.run import experiment
from fgrpo_jax.run.ahead import one_ahead
from fgrpo_jax.run.methods import read_config
from fgrpo_jax.run.ranking import Prepared, Ranked, Ranker
from fgrpo_jax.types import RankingExample

__all__ = ["Ranked", "Ranker"]

LINE_MAX = 2**22  # bytes of a line: what is longer is not read
ERROR_MAX = 500  # characters of a line's error, which may quote it


def rank_stream(
    ranker: Ranker,
    lines: Iterable[bytes | None],
    target: BinaryIO,
    samples: int = 0,
    seed: int = 0,
    ahead: bool = False,
) -> tuple[int, int]:
    """Write a line for every line, flushed batch by batch; how many there were, and how many in error.

    lines: None stands for one that is longer than LINE_MAX. ahead: a batch is read and prepared while the one before
    it is computed and written. Raises StorageError, and what `lines` raises, after what was read before is written.
    """
    total = errors = 0
    batches = _batches(ranker, map(_row, lines))
    for number, (rows, prepared) in enumerate(one_ahead(batches) if ahead else batches):
        found = ranker.rank_prepared(prepared, samples, seed, number)
        text = "".join(_line(n, *said) for n, said in enumerate(zip(rows, found, strict=True), total + 1))
        with storing("standard output"):
            target.write(text.encode("utf-8"))
            target.flush()
        total, errors = total + len(rows), errors + sum(isinstance(one, DataError) for one in found)
    return total, errors


def _batches(ranker: Ranker, rows: Iterator[RankingExample | DataError]) -> Iterator[tuple[list, Prepared]]:
    """Rows, and what was prepared of them. Rows that were read before something is raised come first."""
    failed: Exception | None = None
    while not failed:
        batch: list = []
        try:
            batch.extend(itertools.islice(rows, ranker.batch_queries))
        except (DataError, OSError) as error:  # of the file, after some rows; that of a line is a row
            failed = error
        if batch:
            yield batch, ranker.prepare(batch)
        elif not failed:
            return
    raise failed


def read_lines(queries: str) -> Iterator[bytes | None]:
    """The lines of a file, .gz or plain, or of standard input (`-`); None for one that is longer than LINE_MAX.

    Raises ConfigError, at once, for a file that is not there, and DataError where it cannot be read on.
    """
    if queries == "-":
        return _lines(sys.stdin.buffer)
    path = path_of(queries)
    if not path.exists() or path.is_dir():
        raise ConfigError(
            f"{queries} is no file: give a file of queries, one JSON object a line, or - for standard input"
        )
    return _lines_of(path)


def _lines_of(path: Path) -> Iterator[bytes | None]:
    try:
        with path.open("rb") as raw:
            packed = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else contextlib.nullcontext(raw)
            with packed as file:
                yield from _lines(file)
    except (OSError, EOFError, zlib.error) as error:  # truncated and damaged .gz raise these too
        raise DataError(f"{path} cannot be read on ({reason(error)}): restore it, and rank what is missing") from error


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    while line := file.readline(LINE_MAX + 1):
        if len(line) <= LINE_MAX:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(LINE_MAX)
        yield None


def _row(line: bytes | None) -> RankingExample | DataError:
    if line is None:
        return DataError(f"the line is longer than {LINE_MAX} bytes")
    row, reasons = read_line(line, judged=False)
    return DataError("; ".join(reasons)) if row is None else row


def _line(number: int, row: RankingExample | DataError, found: Ranked | DataError) -> str:
    said: dict[str, Any] = {"line": number}
    if isinstance(row, RankingExample):
        said["query_id"] = row.query_id
    if isinstance(found, DataError):
        text = str(found)
        said["error"] = text if len(text) <= ERROR_MAX else text[: ERROR_MAX - 1] + "…"
    else:
        said |= _lists(found)
        if found.samples:
            said["samples"] = [_lists(one) for one in found.samples]
    return json.dumps(said, ensure_ascii=False, allow_nan=False) + "\n"


def _lists(ranked: Ranked) -> dict[str, Any]:
    return {name: value for name, value in ranked._asdict().items() if name not in ("query_id", "samples")}


def main(argv: list[str]) -> int:
    try:
        return start(*parse_ranking(argv, __doc__))
    except UserError as error:
        return refuse(error)


def start(run_dir: str, queries: str, arguments: RankArguments) -> int:
    a = arguments
    try:
        experiment.prepare_process(read_config(path_of(run_dir)))
        lines = read_lines(queries)
        ranker = Ranker.open(run_dir, a.stage, a.batch_queries, a.max_candidates, a.mesh)
        print(f"ranking with {ranker.name} of {run_dir}: {ranker.summary}", file=sys.stderr, flush=True)
        ahead = queries != "-" and path_of(queries).is_file()  # who writes to a pipe waits for its answer
        total, errors = rank_stream(ranker, lines, sys.stdout.buffer, a.samples, a.seed, ahead)
    except (UserError, OSError) as error:
        return refuse(error)
    print(f"{total:,} lines, {errors:,} of them in error", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    code = start(*COMMAND)
    if code == 2:  # perhaps for its standard output, which the interpreter would find broken again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
