"""Tables of a user's own: CSV, TSV, JSON lines or Parquet; columns by name, each value with where it stands.

    .csv, .csv.gz        comma, quotes as in RFC 4180 (a quoted field may hold line breaks), a line of names
    .tsv, .tsv.gz        tab, no quotes, a line of names
    .jsonl, .jsonl.gz    an object a line
    .parquet             by pyarrow

Text is UTF-8, with or without a byte order mark. Columns that are not asked for are not looked at.
"""

from __future__ import annotations

import csv
import datetime
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fgrpo_jax.data.datasets import DataError, one_line
from fgrpo_jax.data.raw_files import find_one, numbered_lines

ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")


class Table(NamedTuple):
    """columns: values of each column asked for, as the file has them. rows: number of the line, or row, of each."""

    path: Path
    columns: dict[str, list[Any]]
    rows: Sequence[int]

    def where(self, row: int, column: str = "") -> str:
        unit = "row" if self.path.name.endswith(".parquet") else "line"
        return f"{self.path}, {unit} {self.rows[row]}" + (f", column {column!r}" if column else "")


def find(folder: Path, name: str, stem: str, option: str) -> Path:
    """The file of that name in `folder` or, where the name is empty, its one table called `stem`.

    option: of the configuration, for the message. Raises DataError where there is none, or several that differ.
    """
    if name:
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is not there: put it there, or correct {option}")
        if not path.name.removesuffix(".gz").endswith(ENDINGS):
            raise DataError(f"{path}: {option} must end in one of {', '.join(ENDINGS)} (or that and .gz)")
        return path
    path = find_one(folder, {stem + ending for ending in ENDINGS}.__contains__, deep=False)
    if path is None:
        raise DataError(f"{folder} holds no {stem}{{{','.join(ENDINGS)}}}: put it there, or name it by {option}")
    return path


def read(path: Path, columns: Mapping[str, str]) -> Table:
    """columns: each one's name, and the option of the configuration that chose it.

    Raises DataError naming file and line for what is malformed, a column that is not there, a file without rows.
    """
    plain = path.name.removesuffix(".gz")
    if plain.endswith(".parquet"):
        table = _parquet(path, columns)
    elif plain.endswith(".jsonl"):
        table = _jsonl(path, columns)
    else:
        table = _delimited(path, columns, tabs=plain.endswith(".tsv"))
    if not len(table.rows):
        raise DataError(f"{path} is empty: it has no rows")
    return table


def _check_columns(path: Path, columns: Mapping[str, str], there: Sequence[str]) -> None:
    for name, option in columns.items():
        if name not in there:
            raise DataError(f"{path} has no column {name!r}, only {', '.join(map(repr, there))}: set {option}")


def _delimited(path: Path, columns: Mapping[str, str], tabs: bool) -> Table:
    lines = (line.removeprefix("\ufeff") + "\n" for _, line in numbered_lines(path))
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    csv.field_size_limit(2**31 - 1)  # of a column that nobody asks for, too
    reader = csv.reader(lines, **style)
    found: dict[str, list[Any]] = {name: [] for name in columns}
    numbers: list[int] = []
    try:
        names = next(reader, [])
        if not names:
            raise DataError(f"{path} is empty: its first line must name the columns")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise DataError(f"{path}, line 1: two columns are called {twice!r}")
        _check_columns(path, columns, names)
        places = [(found[name].append, names.index(name)) for name in columns]
        for fields in reader:
            if len(fields) != len(names):
                if not fields:  # an empty line
                    continue
                raise DataError(f"{path}, line {reader.line_num}: {len(fields)} fields for {len(names)} columns")
            for append, place in places:
                append(fields[place])
            numbers.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error}): mind the quotes") from error
    return Table(path, found, numbers)


def _jsonl(path: Path, columns: Mapping[str, str]) -> Table:
    rows = list(json_lines(path))
    there = list(dict.fromkeys(name for _, row in rows for name in row))
    if rows:
        _check_columns(path, columns, there)
    found = {name: [row.get(name) for _, row in rows] for name in columns}
    return Table(path, found, [number for number, _ in rows])


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers and objects of the lines that are not empty. Raises DataError naming the line."""
    for number, line in numbered_lines(path):
        if not line.strip("\ufeff \t"):
            continue
        try:
            value = json.loads(line.removeprefix("\ufeff"))
            if "\\u" in line:  # half of a character that is written as two: no text, and no file could hold it
                json.dumps(value, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number}: expected an object, found {type(value).__name__}")
        yield number, value


def _parquet(path: Path, columns: Mapping[str, str]) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(path, columns, file.schema_arrow.names)
            read = file.read(columns=list(columns))
        values = {name: _in_microseconds(read[name]).to_pylist() for name in columns}
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({one_line(str(error))})") from error
    return Table(path, values, range(1, read.num_rows + 1))


def _in_microseconds(column: Any) -> Any:
    """Times in nanoseconds, as pandas writes them, are cut: Python's have no more than microseconds."""
    import pyarrow

    if pyarrow.types.is_timestamp(column.type) and column.type.unit == "ns":
        return column.cast(pyarrow.timestamp("us", column.type.tz), safe=False)
    return column


# ---------------------------------------------------------------------- values


def identifier(value: Any, where: str) -> str:
    """Text, or a whole number as text. Raises DataError naming where it stands."""
    if type(value) is int:
        return str(value)
    text = value.strip() if isinstance(value, str) else ""
    if not text or "\n" in text or "\r" in text:
        found = "is empty" if value in ("", None) else f"is {value!r}"
        raise DataError(f"{where}: an id {found}; it must be a text of one line or a whole number")
    return text


def number(value: Any, where: str) -> float:
    """Raises DataError for what is missing, no number, or not finite."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(f"{where}: {value!r} is not a finite number")
    return found


def moment(value: Any, where: str) -> float:
    """A time as a number: seconds since 1970 of a date (ISO 8601, or of Parquet); any number as it is.

    A date without a zone is read as UTC. Raises DataError.
    """
    if value is None or value == "":
        raise DataError(f"{where}: no time; fill it in, or remove the row: order in time decides what is predicted")
    if isinstance(value, str):
        try:
            return number(float(value), where)
        except ValueError as error:
            if isinstance(error, DataError):
                raise
        try:
            value = datetime.datetime.fromisoformat(value.strip())
        except ValueError:
            pass
    elif isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime(value.year, value.month, value.day)
    if isinstance(value, datetime.datetime):
        return (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).timestamp()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number(value, where)
    raise DataError(f"{where}: {value!r} is no time; write a number, or a date such as 2024-05-31T18:00:00")
