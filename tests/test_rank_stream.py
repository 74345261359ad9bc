"""Ranking a stream of lines: batch by batch, one line for every line, whatever the lines hold."""

import gzip
import io
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import jax
import pytest
from helpers import quick_runs
from ranked import encoded, queries, stream
from tiny import ROOT

from fgrpo_jax import rank
from fgrpo_jax.config import ConfigError
from fgrpo_jax.rank import Ranker, rank_stream


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_runs():
        yield


# --------------------------------------------------------------------- a stream


@pytest.mark.parametrize("ahead", [False, True])
def test_a_batch_is_read_and_written_at_a_time(ranked_runs, ahead):
    """So memory does not grow with the input, and a process that is killed loses nothing that was written."""
    ranker = Ranker.open(ranked_runs["llm"].run_dir, batch_queries=4)
    read, written, rows = [0], [], queries(ranked_runs["llm"])

    def lines():
        for line in itertools.islice(itertools.cycle(encoded(rows)), 22):
            read[0] += 1
            yield line

    class Target(io.BytesIO):
        def flush(self):
            written.append((self.getvalue().count(b"\n"), read[0]))

    target, whole = Target(), io.BytesIO()
    rank_stream(ranker, lines(), target, ahead=ahead)
    counts = [4, 8, 12, 16, 20, 22]
    assert [lines for lines, _ in written] == counts
    most = counts[ahead:] + counts[-1:] * ahead
    assert all(low <= lines_read <= high for (_, lines_read), low, high in zip(written, counts, most, strict=True))
    rank_stream(Ranker.open(ranked_runs["llm"].run_dir, batch_queries=4), lines(), whole)
    assert target.getvalue() == whole.getvalue()


def test_a_batch_is_prepared_while_another_is_computed(ranked_runs):
    """By another thread: the programs stay on the main one, which waits here until the next batch is there."""
    ranker, rows = Ranker.open(ranked_runs["llm"].run_dir, batch_queries=4), queries(ranked_runs["llm"])
    prepare, compute, threads = ranker.prepare, ranker.rank_prepared, []
    ready = [threading.Event() for _ in range(4)]

    def prepared(rows):
        threads.append(threading.current_thread())
        ready[len(threads) - 1].set()
        return prepare(rows)

    def ranked(batch, samples, seed, number):
        assert threading.current_thread() is threading.main_thread()
        assert number == 2 or ready[number + 1].wait(60), f"nothing is read beside batch {number}"
        return compute(batch, samples, seed, number)

    ranker.prepare, ranker.rank_prepared = prepared, ranked
    rank_stream(ranker, iter(encoded(rows[:12])), io.BytesIO(), ahead=True)
    assert len(threads) == 3 and threading.main_thread() not in threads


def test_what_was_prepared_is_written_before_a_later_batch_fails(ranked_runs):
    ranker, rows = Ranker.open(ranked_runs["llm"].run_dir, batch_queries=4), queries(ranked_runs["llm"])
    prepare, target, prepared = ranker.prepare, io.BytesIO(), []

    def failing(rows):
        prepared.append(rows)
        if len(prepared) == 3:
            raise MemoryError("no memory for this shape")
        return prepare(rows)

    ranker.prepare = failing
    with pytest.raises(MemoryError):
        rank_stream(ranker, iter(encoded(rows * 2)), target, ahead=True)
    assert target.getvalue().count(b"\n") == 8


def test_killed_it_has_written_every_batch(ranked_runs):
    config = ranked_runs["llm"]
    command = [sys.executable, "-m", "fgrpo_jax.rank", config.run_dir, "-", "--batch-queries", "4"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    with subprocess.Popen(command, env=env, **pipes) as child:
        child.stdin.write(b"".join(encoded(queries(config)[:10])))
        child.stdin.flush()
        lines = [child.stdout.readline() for _ in range(8)]  # waits for ever where a batch is kept back
        child.kill()
        assert child.stdout.read() == b""
    expected = stream(Ranker.open(config.run_dir, batch_queries=4), queries(config)[:8])
    for line, like in zip(map(json.loads, lines), expected, strict=True):
        assert line.pop("logp") == pytest.approx(like.pop("logp"), abs=1e-4) and line == like


def test_each_shape_is_compiled_once(ranked_runs):
    ranker, rows, names = Ranker.open(ranked_runs["llm"].run_dir, batch_queries=4), queries(ranked_runs["llm"]), []

    def note(event, duration, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        stream(ranker, rows * 3)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert [name for name in names if "program" in name] == ["jit(program)"]


@pytest.mark.parametrize("system, stage", [("llm", "sft"), ("ranker", "evaluator")])
def test_the_command(ranked_runs, tmp_path, capfdbinary, monkeypatch, system, stage):
    config = ranked_runs[system]
    lines = encoded([*queries(config), b"nonsense\n", *queries(config, "test")])
    (tmp_path / "q.jsonl").write_bytes(b"".join(lines))
    assert rank.main([config.run_dir, str(tmp_path / "q.jsonl"), "--stage", stage]) == 1
    said = capfdbinary.readouterr()
    written = [json.loads(line) for line in said.out.splitlines()]
    assert [n for n, line in enumerate(written) if "error" in line] == [12]
    assert written[12] == {"line": 13, "error": written[12]["error"]} and "not JSON" in written[12]["error"]
    assert b"22 lines, 1 of them in error" in said.err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"".join(lines[:12]))))
    assert rank.main([config.run_dir, "-", "--stage", stage]) == 0
    assert capfdbinary.readouterr().out == said.out[: said.out.index(b'{"line": 13')]


# --------------------------------------------------------------------- what is refused


def hostile(row):
    """Lines that cannot be ranked, each with what its error says."""
    first, *others = row["candidates"]
    many = [{"id": f"m{n}", "text": f"text {n}"} for n in range(10_000)]
    return {
        "empty": (b"\n", "the line is empty"),
        "no JSON": (b"{'a'\n", "not JSON"),
        "no UTF-8": (b'{"query_id": "\xff"}\n', "not JSON"),
        "a surrogate": (b'{"query_id": "\\ud800"}\n', "not JSON"),
        "no object": (b"[1]\n", "expected an object, found list"),
        "deep": (b"[" * 200_000 + b"\n", "not JSON"),
        "deep in a field": (b'{"query_id": ' + b'{"a": ' * 200_000 + b"\n", "not JSON"),
        "a huge number": (b'{"query_id": ' + b"9" * 100_000 + b"}\n", "not JSON"),
        "huge": (b'{"query_id": "' + b"x" * rank.LINE_MAX + b'"}\n', "longer than"),
        "a huge field": (row | {"x" * 100_000: 1}, "unknown field(s) xxx"),
        "NaN": (row | {"relevance": [math.nan] * len(row["candidates"])}, "relevance[0] is nan, not finite"),
        "NaN as an id": (row | {"candidates": [{"id": math.nan, "text": "a"}]}, "id and text must be texts"),
        "numbers as ids": (row | {"candidates": [{"id": 1, "text": "a"}]}, "id and text must be texts"),
        "no id": (row | {"query_id": " "}, "query_id must be a text that is not empty"),
        "candidates are texts": (row | {"candidates": ["a"]}, "must be an object with id and text"),
        "no candidate": (row | {"candidates": []}, "candidates is empty"),
        "twice": (row | {"candidates": [first, *others, first]}, "two candidates have the id"),
        "many": (row | {"candidates": many, "retrieval": [0.0] * len(many), "topics": [0] * len(many)}, "10000 cand"),
        "many, the last twice": (row | {"candidates": [*many, many[-1]]}, "two candidates have the id 'm9999'"),
        "lists of no item": (row | {"logged": [{"items": [["x"]] * 50_000, "feedback": []}]}, "which is no candidate"),
        "misspelt": (row | {"histroy": []}, "unknown field(s) histroy"),
        "nothing to rank by": (row | {"query": "", "history": []}, "nothing to rank by"),
    }


@pytest.mark.parametrize("system, stage", [("llm", "sft"), ("ranker", "imitation")])
def test_hostile_lines_are_one_error_each(ranked_runs, rankers, system, stage):
    rows = queries(ranked_runs[system])
    lines = hostile(rows[0] | {"retrieval": [], "topics": []})
    if system == "llm":
        lines["foreign"] = rows[0] | {"history": [{"id": "new", "text": "never seen"}]}, "no token for 'never seen'"
        plain = {name: rows[0][name] for name in ("query_id", "query", "history")}
        copy = {"id": "new", "text": rows[0]["candidates"][0]["text"]}
        twice = plain | {"candidates": [*rows[0]["candidates"], copy]}
        lines["twice the text"] = twice, "have the same identifier: give them texts that differ"
    else:
        lines["foreign"] = rows[0] | {"history": [{"id": "new", "text": "a"}]}, "item 'new' of its history"
        small = {name: rows[0][name][:2] for name in ("candidates", "retrieval", "topics")}
        lines["small"] = rows[0] | small, "fewer than the 3 items of a list"
    mixed = [rows[0], *(line for line, _ in lines.values()), rows[1]]
    written = stream(rankers[system, stage], mixed)
    for (name, (_, message)), line in zip(lines.items(), written[1:-1], strict=True):
        assert message in line.get("error", ""), name
        assert len(line["error"]) <= rank.ERROR_MAX and set(line) <= {"line", "query_id", "error"}, name
    sound = stream(rankers[system, stage], rows[:2])
    assert [written[0]["ranking"], written[-1]["ranking"]] == [line["ranking"] for line in sound]


def test_shapes_that_the_run_never_saw_are_errors(ranked_runs):
    """A prompt beyond the largest bucket; a pool beyond the limit, which is the command's to raise."""
    config = ranked_runs["llm"]
    (row, *_) = queries(config)
    every = [{"id": str(n), "text": f"item {letter}"} for n, letter in enumerate("abcdefghijklmnopqrstuvwx")]
    for limit, message in ((24, "a prompt of 30 tokens, longer than the largest"), (23, "24 candidates, more than")):
        ranker = Ranker.open(config.run_dir, batch_queries=2, max_candidates=limit)
        long, sound = stream(ranker, [row | {"history": row["history"][:2], "candidates": every}, row])
        assert message in long["error"] and "error" not in sound


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{run}"], "give the run directory and the queries first"),
        (["{data}", "-"], "is not a run directory: it holds no config.json"),
        (["{run}", "{data}"], "is no file"),
        (["{run}", "{data}/none.jsonl"], "is no file"),
        (["{run}", "-", "--stage", "mine"], "stage='mine' is not finished here; choose one of sft"),
        (["{run}", "-", "--batch-queries", "-1"], "must not be negative"),
    ],
)
def test_what_cannot_be_ranked_with_is_refused(ranked_runs, capfd, arguments, message):
    config = ranked_runs["llm"]
    known = {"run": config.run_dir, "data": config.data.manual_dir}
    assert rank.main([text.format(**known) for text in arguments]) == 2
    said = capfd.readouterr()
    assert message in said.err and not said.out


def test_a_method_that_cannot_draw_says_so(ranked_runs, rankers):
    for stage in ("evaluator", "g_e"):
        with pytest.raises(ConfigError, match="makes one list of a query"):
            rankers["ranker", stage].rank_batch(queries(ranked_runs["ranker"]), samples=2)


def test_a_run_without_a_finished_stage_is_refused(ranked_runs, tmp_path):
    (tmp_path / "config.json").write_bytes((Path(ranked_runs["llm"].run_dir) / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="has no finished stage yet"):
        Ranker.open(tmp_path)


def test_a_damaged_file_ends_it_with_what_was_ranked(ranked_runs, tmp_path, capfd):
    whole = gzip.compress(b"".join(encoded(queries(ranked_runs["llm"]) * 200)), mtime=0)
    (tmp_path / "q.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert rank.main([ranked_runs["llm"].run_dir, str(tmp_path / "q.jsonl.gz")]) == 2
    said = capfd.readouterr()
    assert "cannot be read on" in said.err
    sound = zlib.decompressobj(31).decompress(whole[: len(whole) // 2]).count(b"\n")
    assert [json.loads(line)["line"] for line in said.out.splitlines()] == list(range(1, sound + 1)) and sound > 300
