"""What a stage says on the terminal while it trains: a live bar there, lines in a file or a pipe."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

_DAY = 359_999  # seconds that a clock can show


class Progress:
    """How far a stage is, how fast, and how long it will take from its first step on.

    The pace is that of the steps after the first one of this process, which compiles; until there are any, its own.
    """

    def __init__(self, stage: str, start: int, steps: int, queries: int, is_main: bool):
        self._stage, self._steps, self._queries, self._is_main = stage, steps, queries, is_main
        self._last_step = self._step = self._first = start
        self._last_time = self._step_time = time.monotonic()
        self._spent = self._opening = 0.0  # seconds of the steps after the first, and of that one
        self._said = ""
        self._bar = _bar() if is_main and sys.stdout.isatty() else None
        if self._bar:
            self._task = self._bar.add_task(stage, total=steps, completed=start, said="")
            self._bar.start()

    # ----------------------------------------------------------------- time

    def stepped(self, step: int) -> None:
        """A step was made; to be called after every one."""
        now = time.monotonic()
        took, self._step_time, self._step = now - self._step_time, now, step
        if step == self._first + 1:
            self._opening = took
            if not self._bar:
                self._print(f"{self._stage} {step}/{self._steps}  {took:.1f} s for the first step  ETA {self.eta()}")
        else:
            self._spent += took
        self._draw()

    def skip(self, step: int) -> None:
        """Time spent evaluating is not throughput."""
        self._last_step, self._last_time = step, time.monotonic()
        self._step_time = self._last_time

    def rate(self, step: int) -> float:
        """Queries per second since the last call (or `skip`)."""
        now = time.monotonic()
        rate = (step - self._last_step) * self._queries / max(now - self._last_time, 1e-9)
        self._last_step, self._last_time = step, now
        return rate

    def eta(self) -> str:
        """For the steps that are left, without the evaluations among them."""
        made = self._step - self._first - 1
        pace = self._spent / made if made > 0 else self._opening
        return clock((self._steps - self._step) * pace)

    # ----------------------------------------------------------------- what is said

    def line(self, values: Mapping[str, float], rate: float, tokens: float) -> None:
        """rate: queries per second; tokens: per second."""
        shown = [f"{name} {value:.4f}" for name, value in values.items()]
        self._said = "  ".join([*shown, per_time(rate, "queries"), per_time(tokens, "tokens")])
        if not self._bar:
            self._print(f"{self._stage} {self._step}/{self._steps}  {self._said}  ETA {self.eta()}")
        self._draw()

    def compiling(self, what: str, program: Callable, changing: int) -> Callable:
        """The program, which says when it compiles: whenever its argument `changing` has other shapes than before.

        XLA may find what it would compile in its cache on disk, and then takes less long; where a call waits for its
        result, as on a CPU with keep_memory, the time told is that of the first run too.
        """
        return announced(program, changing, lambda: self._compiling(what))

    @contextlib.contextmanager
    def _compiling(self, what: str) -> Iterator[None]:
        if self._bar:
            self._draw(f"compiling {what} ...")
            yield
            self._draw()
        else:
            with telling(self._stage, what, self._print):
                yield

    def close(self) -> None:
        if self._bar:
            self._bar.stop()

    def _draw(self, instead: str = "") -> None:
        if self._bar:
            said = instead or f"{self._said}  ETA {self.eta() if self._step > self._first else '-'}"
            self._bar.update(self._task, completed=self._step, said=said.strip(), refresh=bool(instead))

    def _print(self, line: str) -> None:
        if self._is_main:
            print(line, flush=True)


def announced(program: Callable, changing: int, compiling: Callable[[], contextlib.AbstractContextManager]) -> Callable:
    """The program, inside `compiling()` whenever its argument `changing` has other shapes than before."""
    seen = set()

    def call(*arguments: Any) -> Any:
        shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(arguments[changing]))
        if shapes in seen:
            return program(*arguments)
        seen.add(shapes)
        with compiling():
            return program(*arguments)

    return call


@contextlib.contextmanager
def telling(who: str, what: str, say: Callable[[str], None]) -> Iterator[None]:
    """Says that something compiles, and how long it took."""
    started = time.monotonic()
    say(f"{who}: compiling {what} ...")
    yield
    say(f"{who}: {what} compiled in {time.monotonic() - started:.1f} s")


def _bar() -> Bar:
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn()
    return Bar(*columns, TextColumn("{task.fields[said]}", markup=False), refresh_per_second=4)


def per_time(rate: float, what: str) -> str:
    """`0.31 queries/s`, `170 tokens/s`, `12 queries/h`: digits that count, never 0 of what does happen."""
    for unit, seconds in (("s", 1), ("min", 60), ("h", 3600)):
        if rate * seconds >= 0.1 or unit == "h":
            value = rate * seconds
            return f"{value:,.0f} {what}/{unit}" if value >= 99.5 else f"{value:.2g} {what}/{unit}"
    raise AssertionError


def clock(seconds: float) -> str:
    seconds = int(min(seconds, _DAY))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
