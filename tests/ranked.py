"""Queries without labels, and what `rank` writes for them."""

import io
import json
from pathlib import Path

from fgrpo_jax import rank
from fgrpo_jax.rank import Ranker, rank_stream

STAGES = {"llm": ("sft",), "ranker": ("evaluator", "imitation", "g_e")}


def queries(config, split="validation"):
    """The lines of a split without their labels."""
    lines = (Path(config.data.manual_dir) / f"{split}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{name: value for name, value in row.items() if name not in ("relevance", "logged")} for row in rows]


def encoded(rows):
    return [row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows]


def stream(ranker, rows, **options):
    """What the command writes for these rows (bytes: as they are)."""
    target = io.BytesIO()
    counts = rank_stream(ranker, rank._lines(io.BytesIO(b"".join(encoded(rows)))), target, **options)
    written = [json.loads(line) for line in target.getvalue().splitlines()]
    assert counts == (len(rows), sum("error" in line for line in written))
    assert [line["line"] for line in written] == list(range(1, len(rows) + 1))
    return written


def opened(runs):
    """Every method of STAGES, by system and name."""
    return {(system, stage): Ranker.open(runs[system].run_dir, stage) for system in STAGES for stage in STAGES[system]}
