"""What an evaluation and a run look like on disk and on the terminal.

An evaluation folder holds, written at once or not at all (at an address, where no folder can be renamed: the older
evaluation is taken away first, and manifest.json is written last):

    fit.json           how the models of feedback fit shown lists (fit.py), where there are both
    metrics.json       means, 95 % intervals, paired differences, error counts (`evaluate.compare`)
    per_query.jsonl    one query a line: relevant ids, and for each method its lists, error and metrics
    qrels.trec         gains of every candidate; <method>.run.trec: each method's rankings
    manifest.json      config, seeds, versions, data fingerprints, git revision
    table.txt          what the terminal showed
    report.html        all of it to look at, with the training curves, in one file that needs no other (report_page)

The same inputs give the same bytes: no times, no host names, sorted keys, rounded numbers. (The inputs of report.html
are metrics.jsonl too, and with it how fast the training was.)
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote

import jax
import numpy as np

import fgrpo_jax
from fgrpo_jax.evaluation.evaluate import DIGITS, Evaluation, counted
from fgrpo_jax.evaluation.fit import lines
from fgrpo_jax.evaluation.report_page import page
from fgrpo_jax.evaluation.report_page.page import ALONE, Beside
from fgrpo_jax.evaluation.table import table
from fgrpo_jax.files import is_address, path_of, storing, write_atomically
from fgrpo_jax.types import RankingExample

_NOTHING = "%00"  # stands in a run for an empty ranking; no candidate can be called that
_MAX_GAIN = 10**6  # TREC gains are whole numbers

# --------------------------------------------------------------------- the folder


def manifest(
    config: Mapping[str, object],
    seeds: Mapping[str, int],
    fingerprints: Mapping[str, str],
    revision: str | None,
    notes: Sequence[str] = (),
) -> dict[str, object]:
    """What is needed to repeat an evaluation; `config` is JSON-ready, `revision` from `git_revision`.

    notes: what was found in the raw files (Dataset.notes).
    """
    versions = {"fgrpo_jax": fgrpo_jax.__version__, "jax": jax.__version__, "numpy": np.__version__}
    return {
        "config": dict(config),
        "seeds": dict(seeds),
        "data": dict(fingerprints),
        "notes": list(notes),
        "versions": versions,
        "git": revision,
    }


def git_revision() -> str | None:
    """Commit of the checkout this package runs from, `+` added when files differ; None outside of one."""
    folder = Path(fgrpo_jax.__file__).parent

    def git(*arguments: str) -> str:
        command = ("git", "--no-optional-locks", "-C", str(folder), *arguments)  # it only looks
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not a checkout that merely contains this one
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_evaluation(
    directory: str | Path,
    evaluation: Evaluation,
    manifest: Mapping[str, object],
    left_out: Mapping[str, str],
    fits: Mapping[str, Mapping[str, object]] = MappingProxyType({}),
    beside: Beside = ALONE,
) -> str:
    """Write the folder, replacing an older one whole, and return the text of table.txt.

    `left_out` maps baselines that make no sense here to the reason, `fits` models to what `fit.fit` says; `beside` is
    for report.html. Raises
    StorageError when the folder cannot be written; an older evaluation is then still there, but for an address.
    """
    directory = path_of(directory)
    text = table(evaluation, left_out) + (f"\n{lines(fits)}\n" if fits else "")
    contents = _contents(evaluation, manifest, left_out, fits, text, beside)
    if is_address(directory):
        with storing(directory, Exception):
            directory.rmtree(missing_ok=True)
        for name, content in contents:
            write_atomically(directory / name, content)
        return text
    with storing(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        _write_all(directory, contents)
    return text


def _contents(
    evaluation: Evaluation,
    manifest: Mapping[str, object],
    left_out: Mapping[str, str],
    fits: Mapping,
    text: str,
    beside: Beside,
) -> Iterator[tuple[str, str]]:
    """Names and texts of the files, the manifest's last."""
    scale = gain_scale(evaluation.examples)
    summary = {**evaluation.summary, "left_out": dict(left_out), "trec_gain_scale": scale}
    yield "metrics.json", _json(summary, indent=1)
    yield "table.txt", text
    if fits:
        yield "fit.json", _json(fits, indent=1)
    yield "per_query.jsonl", "".join(_json(row) for row in _per_query(evaluation))
    yield "qrels.trec", qrels(evaluation.examples, scale)
    for method in evaluation.predictions:
        yield f"{method}.run.trec", run(evaluation, method)
    yield "report.html", page.render(evaluation, manifest, left_out, fits, beside)
    yield "manifest.json", _json(manifest, indent=1)


def _write_all(directory: Path, contents: Iterator[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        for name, content in contents:
            (new / name).write_text(content, encoding="utf-8", newline="\n")
        _swap(new, directory, Path(scratch, "old"))


def _swap(new: Path, directory: Path, old: Path) -> None:
    if not directory.exists():
        os.replace(new, directory)
        return
    os.replace(directory, old)
    try:
        os.replace(new, directory)
    except OSError:
        os.replace(old, directory)
        raise


def _json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, indent=indent, allow_nan=False) + "\n"


def _per_query(evaluation: Evaluation) -> list[dict[str, object]]:
    rows = []
    for q, example in enumerate(evaluation.examples):
        ids = [item for item, _ in example.candidates]
        methods = {}
        for method, predictions in evaluation.predictions.items():
            prediction = predictions[q]
            methods[method] = {
                "slate": [ids[i] for i in prediction.slate],
                "ranking": [ids[i] for i in prediction.ranking],
                "outcome": prediction.outcome.name,
                "error": evaluation.errors[method][q],
                "metrics": {k: round(float(v[q]), DIGITS) for k, v in evaluation.scores[method].items()},
            }
        gains = {item: gain for item, gain in zip(ids, example.relevance) if gain > 0}
        row = {"query_id": example.query_id, "candidates": ids, "gains": gains, "methods": methods}
        rows.append({**row, "missed": {lost.item: lost.gain for lost in example.missed}} if example.missed else row)
    return rows


# --------------------------------------------------------------------- TREC files


def trec_id(name: str) -> str:
    """The id with white space and % written as %XX: TREC fields are separated by spaces."""
    return re.sub(r"[\s%]", lambda found: quote(found.group()), name)


def _judged(example: RankingExample) -> list[tuple[str, float]]:
    """Every item whose gain is known."""
    pool = [(item, gain) for (item, _), gain in zip(example.candidates, example.relevance)]
    return pool + [(lost.item, lost.gain) for lost in example.missed]


def gain_scale(examples: Sequence[RankingExample]) -> int:
    """Power of ten that makes every gain a whole number (nDCG does not change); at most 10^6."""
    gains = np.array(sorted({gain for example in examples for _, gain in _judged(example)}))
    scale = 1
    while scale < _MAX_GAIN and not np.allclose(gains * scale, np.round(gains * scale), atol=1e-9):
        scale *= 10
    return scale


def qrels(examples: Sequence[RankingExample], scale: int) -> str:
    """`query 0 candidate gain` for every candidate, relevant or not, and for what the pool missed."""
    lines = []
    for example in examples:
        for item, gain in _judged(example):
            whole = max(round(gain * scale), 1) if gain > 0 else 0
            lines.append(f"{trec_id(example.query_id)} 0 {trec_id(item)} {whole}\n")
    return "".join(lines)


def run(evaluation: Evaluation, method: str) -> str:
    """`query Q0 candidate rank score method`, scores strictly decreasing, from the length to 1.

    The rankings that count (`evaluate.counted`) and nothing after them. An empty one is a line with
    an unjudged candidate, because TREC tools disagree about queries that a run lacks.
    """
    lines = []
    for example, prediction in zip(evaluation.examples, evaluation.predictions[method]):
        _, ranking = counted(prediction)
        items = [trec_id(example.candidates[i][0]) for i in ranking] or [_NOTHING]
        for rank, item in enumerate(items):
            points = len(items) - rank
            lines.append(f"{trec_id(example.query_id)} Q0 {item} {rank + 1} {points} {method}\n")
    return "".join(lines)
