"""What a run says while it trains: metrics.jsonl, TensorBoard, and a line on the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fgrpo_jax.config import ConfigError
from fgrpo_jax.files import append, read_rows, write_atomically


class MetricsLog:
    """metrics.jsonl, and TensorBoard where asked for. Only the main process writes."""

    def __init__(self, run_dir: Path, tensorboard: bool, is_main: bool):
        self.path, self._is_main, self._board = run_dir / "metrics.jsonl", is_main, None
        if tensorboard and is_main:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ConfigError("tensorboard=True needs the `log` extra: pip install -e '.[log]'") from None
            self._board = SummaryWriter(str(run_dir / "tensorboard"))

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """Raises ConfigError where a line is not a row."""
        return [row for row in read_rows(self.path) if row["stage"] == stage]

    def forget_after(self, stage: str, step: int) -> None:
        """Drop what an interrupted run logged beyond the checkpoint it resumes from."""
        self._forget(lambda row: row["stage"] == stage and row["step"] > step)

    def forget_last(self, stage: str, step: int, logged: bool, evaluated: bool) -> None:
        """Drop the row of training, that of the evaluation, or both, of one step."""
        drop = {True: evaluated, False: logged}
        self._forget(lambda row: row["stage"] == stage and row["step"] == step and drop[_is_evaluation(row)])

    def _forget(self, dropped: Callable[[dict[str, Any]], bool]) -> None:
        if self._is_main and self.path.is_file():
            write_atomically(self.path, "".join(_line(row) for row in read_rows(self.path) if not dropped(row)))

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        if not self._is_main:
            return
        append(self.path, _line({"stage": stage, "step": step, **values}))
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        if self._board:
            self._board.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _is_evaluation(row: dict[str, Any]) -> bool:
    return any(name.startswith("eval/") for name in row)


class Progress:
    """One line per log interval; `\\r` would be unreadable in a file, so lines only."""

    def __init__(self, stage: str, start: int, steps: int, queries: int, is_main: bool):
        self._stage, self._steps, self._queries, self._is_main = stage, steps, queries, is_main
        self._last_step, self._last_time = start, time.monotonic()

    def rate(self, step: int) -> float:
        """Queries per second since the last call (or `skip`)."""
        now = time.monotonic()
        rate = (step - self._last_step) * self._queries / max(now - self._last_time, 1e-9)
        self._last_step, self._last_time = step, now
        return rate

    def skip(self, step: int) -> None:
        """Time spent evaluating is not throughput."""
        self._last_step, self._last_time = step, time.monotonic()

    def line(self, step: int, values: dict[str, float], rate: float) -> None:
        if not self._is_main:
            return
        left = (self._steps - step) * self._queries / max(rate, 1e-9)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        print(f"{self._stage} {step}/{self._steps}  {shown}  {rate:.0f} queries/s  ETA {_clock(left)}")
        sys.stdout.flush()


def _clock(seconds: float) -> str:
    seconds = int(min(seconds, 359_999))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
