"""What a stage says while it trains."""

import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgrpo_jax.run import progress as progress_lib
from fgrpo_jax.run.progress import Progress, clock, per_time


@pytest.fixture
def clock_at(monkeypatch):
    """Sets the seconds that have passed."""
    now = [0.0]
    monkeypatch.setattr(progress_lib.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_a_pipe_gets_lines(capsys, clock_at):
    progress = Progress("rl", 0, 100, 8, is_main=True)
    clock_at(30.0)  # it compiles
    progress.stepped(1)
    assert capsys.readouterr().out == "rl 1/100  30.0 s for the first step  ETA 0:49:30\n"
    for step in range(2, 11):
        clock_at(30.0 + 0.5 * (step - 1))
        progress.stepped(step)
    rate = progress.rate(10)
    assert rate == pytest.approx(10 * 8 / 34.5)
    progress.line({"reward/slate": 0.25}, rate, 170.4)
    assert capsys.readouterr().out == "rl 10/100  reward/slate 0.2500  2.3 queries/s  170 tokens/s  ETA 0:00:45\n"
    clock_at(1000.0)
    progress.skip(10)  # an evaluation
    clock_at(1000.5)
    progress.stepped(11)
    assert progress.rate(11) == 16 and progress.eta() == "0:00:44"
    assert capsys.readouterr().out == ""


def test_another_host_says_nothing(capsys):
    progress = Progress("rl", 0, 100, 8, is_main=False)
    progress.stepped(1)
    progress.line({"loss": 1.0}, 1.0, 1.0)
    assert progress.compiling("rollouts", lambda x: x, 0)(np.zeros(2)).shape == (2,)
    assert capsys.readouterr().out == ""


def test_it_says_what_compiles_while_it_does_and_for_how_long(capsys, clock_at):
    said = []

    def program(batch, step):
        said.append(capsys.readouterr().out)
        clock_at(90.0 + step)
        return len(batch["x"]) + step

    call = Progress("sft", 0, 9, 8, is_main=True).compiling("the update", program, changing=0)
    assert call({"x": np.zeros(3)}, 5) == 8
    assert said == ["sft: compiling the update ...\n"]
    assert capsys.readouterr().out == "sft: the update compiled in 95.0 s\n"
    assert call({"x": np.ones(3)}, 6) == 9 and said[1:] == [""]  # the same shape
    call({"x": np.ones(4)}, 6), call({"x": np.ones(4, np.int32)}, 6)
    assert len(said) == 4 and all(text.endswith("sft: compiling the update ...\n") for text in said[2:])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar(monkeypatch, clock_at):
    """What other code prints meanwhile stands above it."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    progress = Progress("rl", 2, 4, 8, is_main=True)
    progress.compiling("rollouts", lambda x: clock_at(7.0), 0)(np.zeros(1))
    progress.stepped(3)
    print("rl 3: validation ndcg@5 0.5")
    progress.line({"reward/slate": 0.25}, 0.31, 170)
    progress.stepped(4)
    progress.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    for text in (
        "compiling rollouts ...",
        "rl 3: validation ndcg@5 0.5\n",
        "4/4",
        "0.31 queries/s  170 tokens/s  ETA 0:00:00",
    ):
        assert text in shown, shown
    assert "first step" not in shown and "compiled in" not in shown


@given(st.floats(1e-4, 1e7))
def test_a_rate_is_never_nothing(rate):
    value, unit = re.fullmatch(r"([0-9.,e+]+) queries/(s|min|h)", per_time(rate, "queries")).groups()
    seconds = {"s": 1, "min": 60, "h": 3600}[unit]
    said = float(value.replace(",", "")) / seconds
    assert said > 0 and said == pytest.approx(rate, rel=0.051)


def test_rates_and_times():
    assert [per_time(x, "q") for x in (0.0, 0.31, 0.01, 0.0004, 170.2, 12345.6)] == [
        "0 q/h", "0.31 q/s", "0.6 q/min", "1.4 q/h", "170 q/s", "12,346 q/s",
    ]  # fmt: skip
    assert [clock(s) for s in (0, 59.9, 3661, 1e12)] == ["0:00:00", "0:00:59", "1:01:01", "99:59:59"]
