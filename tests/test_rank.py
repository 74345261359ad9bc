"""Ranking new queries: the lists of an evaluation, one line for every line, whatever the lines hold."""

import dataclasses
import gzip
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import zlib
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit, quick_runs
from tiny import ROOT, run_training, tiny_config, write_world

import eval as evaluation
from fgrpo_jax import rank
from fgrpo_jax.config import ConfigError
from fgrpo_jax.data.batches import shown
from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.data.jsonl import example_of
from fgrpo_jax.policies.llm import masks, transcript
from fgrpo_jax.policies.llm.files import load_tokenizer
from fgrpo_jax.policies.llm.policy import make_grammar
from fgrpo_jax.rank import Ranker, rank_stream
from fgrpo_jax.types import TRAINED, UNTRAINED, Rollout

STAGES = {"llm": ("sft",), "ranker": ("evaluator", "imitation", "g_e")}


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_runs():
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory, ranker_run):
    """A run of each system, by its name; shared and never changed."""
    folder = tmp_path_factory.mktemp("rank")
    (folder / "data").mkdir()
    config = tiny_config(write_world(folder / "data"), folder / "prepared", folder / "run", sft_steps=2)
    assert run_training(config) == 0
    return {"llm": config, "ranker": ranker_run[0]}


@pytest.fixture(scope="module")
def rankers(runs):
    return {(system, stage): Ranker.open(runs[system].run_dir, stage) for system in STAGES for stage in STAGES[system]}


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


# --------------------------------------------------------------------- what is ranked


@pytest.mark.parametrize("system, stage", [(s, stage) for s in STAGES for stage in STAGES[s]])
def test_it_is_what_an_evaluation_writes(runs, rankers, system, stage):
    config = runs[system]
    path = Path(config.run_dir) / "eval" / "validation" / "per_query.jsonl"
    expected = [json.loads(line) for line in path.read_text().splitlines()]
    rows = queries(config)
    written = stream(rankers[system, stage], rows)
    assert [line["query_id"] for line in written] == [row["query_id"] for row in expected]
    for row, line, judged in zip(rows, written, expected, strict=True):
        said = judged["methods"][stage]
        assert {name: line[name] for name in ("slate", "ranking", "outcome")} == {
            name: said[name] for name in ("slate", "ranking", "outcome")
        }
        for name in ("slate", "ranking"):
            assert [row["candidates"][i]["id"] for i in line[f"{name}_index"]] == line[name]
        assert (line["logp"] is None) == (stage in ("evaluator", "g_e"))


@pytest.mark.parametrize("system, stage", [("llm", "sft"), ("ranker", "imitation")])
def test_a_transcript_step_by_step_in_the_report_is_that_list_with_its_probability(
    runs, rankers, system, stage, tmp_path, capsys
):
    """Its steps name the items in order (where there was a choice), and their probabilities multiply to the list's."""
    shutil.copytree(runs[system].run_dir, tmp_path / "run")
    arguments = ["--split", "test", "--eval.transcripts", "4", "--eval.baselines", "random"]
    assert evaluation.main([str(tmp_path / "run"), *arguments]) == 0
    text = (tmp_path / "run" / "eval" / "test" / "report.html").read_text()
    data = json.loads(re.search('id="data">(.*?)</script>', text).group(1))
    written = stream(rankers[system, stage], queries(runs[system], "test"))
    assert "evaluator" not in data["steps"] and len(data["steps"][stage]) == 4
    for q, steps in data["steps"][stage].items():
        line, pool = written[int(q)], data["queries"][int(q)][3]
        assert line["query_id"] == data["queries"][int(q)][0]
        for phase, name in (("slate", "slate"), ("rank", "ranking")):
            own = [step for step in steps if step[0] == phase]
            for _, place, named, probability, likely, others, literal in own:
                (candidate,) = named
                assert data["ids"][pool[candidate]] == line[name][place] and literal == others == 0
                assert dict(likely)[candidate] == pytest.approx(probability, abs=1e-4)
                assert sum(p for _, p in likely) == pytest.approx(1, abs=1e-3)
            logp = sum(math.log(step[3]) for step in own)
            assert logp == pytest.approx(line["logp"][phase], abs=1e-3 * max(len(own), 1))
        assert steps[0][3] < 1


def test_the_last_finished_stage_is_the_default(runs):
    assert Ranker.open(runs["ranker"].run_dir).name == "fgrpo"


def trained_logp(ranker, row, written):
    """Log-probabilities of both phases of the transcript that says these lists, as training computes them."""
    policy, config = ranker._method.policy, ranker._experiment.config
    example, order = shown(example_of(row), config)
    place = {int(c): p for p, c in enumerate(order)}
    query = jax.tree.map(jnp.asarray, policy.encode([dataclasses.replace(example, logged=())]))
    slate, ranking = ([[[place[c] for c in written[f"{name}_index"]]]] for name in ("slate", "ranking"))
    slate, ranking = jnp.asarray(slate), jnp.asarray(ranking)
    if config.SYSTEM == "llm":
        grammar = make_grammar(config, load_tokenizer(config, None, Path(config.run_dir)))

    def by_phase(params, query, slate, ranking):
        if config.SYSTEM == "ranker":
            actions, phase = ranking, jnp.full(ranking.shape, TRAINED[1])
        else:
            actions, _ = transcript.render(grammar, query, slate, ranking)
            _, phase, decided = masks.parse(grammar, query, masks.choices(grammar, query), actions)
            phase = jnp.where(decided.allowed.sum(-1) == 1, UNTRAINED, phase)
        logp = policy.logprobs(params, {}, query, Rollout(actions, phase, jnp.zeros(actions.shape)))
        return [jnp.where(phase == label, logp, 0).sum() for label in TRAINED]

    return [float(x) for x in quick_jit(by_phase)(ranker._method.params, query, slate, ranking)]


@pytest.mark.parametrize("system, stage", [("llm", "sft"), ("ranker", "imitation")])
def test_log_probabilities_are_those_of_training(runs, rankers, system, stage):
    ranker, rows = rankers[system, stage], queries(runs[system])[:8]
    for row, line in list(zip(rows, stream(ranker, rows, samples=2), strict=True))[::4]:
        for one in (line, line["samples"][1]):
            logp = one["logp"]
            np.testing.assert_allclose([logp["slate"], logp["rank"]], trained_logp(ranker, row, one), atol=1e-4)
            assert logp["total"] == pytest.approx(logp["slate"] + logp["rank"], abs=2e-6)


@pytest.mark.parametrize("system, stage", [("llm", "sft"), ("ranker", "imitation")])
def test_samples_come_as_often_as_their_probability_says(runs, rankers, system, stage):
    ranker, row, n = rankers[system, stage], queries(runs[system])[0], 600
    (line,) = stream(ranker, [row], samples=n, seed=1)
    drawn = Counter((tuple(one["slate"]), tuple(one["ranking"])) for one in line["samples"])
    p_of = {(tuple(one["slate"]), tuple(one["ranking"])): math.exp(one["logp"]["total"]) for one in line["samples"]}
    assert len(line["samples"]) == n and len(drawn) > 10
    for which, count in drawn.most_common(5):
        p = p_of[which]
        assert abs(count - n * p) < 5 * math.sqrt(n * p * (1 - p)) + 1


def test_samples_are_a_function_of_the_seed_and_leave_the_greedy_list(runs, rankers):
    ranker, rows = rankers["llm", "sft"], queries(runs["llm"])
    first, again, other = (stream(ranker, rows, samples=2, seed=seed) for seed in (5, 5, 6))
    assert first == again and [x["samples"] for x in first] != [x["samples"] for x in other]
    for line, greedy in zip(first, stream(ranker, rows), strict=True):
        assert {name: value for name, value in line.items() if name != "samples"} == greedy


def test_a_malformed_line_changes_nothing_of_the_others(runs, rankers):
    ranker, rows = rankers["llm", "sft"], queries(runs["llm"])
    broken = [b"{\n" if n in (1, 9) else row for n, row in enumerate(rows)]
    sound, mixed = stream(ranker, rows, samples=2), stream(ranker, broken, samples=2)
    assert [x for n, x in enumerate(sound) if n not in (1, 9)] == [x for n, x in enumerate(mixed) if n not in (1, 9)]


def test_in_python_one_query_and_many(runs, rankers):
    for system, stage in (("llm", "sft"), ("ranker", "imitation")):
        ranker, rows = rankers[system, stage], queries(runs[system])
        many = ranker.rank_batch([*rows, {"query_id": "q"}])
        assert isinstance(many.pop(), DataError)
        assert [list(one.ranking) for one in many] == [line["ranking"] for line in stream(ranker, rows)]
        row = {name: rows[3][name] for name in ("query_id", "query")}
        pairs = [[(item["id"], item["text"]) for item in rows[3][name]] for name in ("candidates", "history")]
        if system == "llm":
            assert ranker.rank(**row, candidates=pairs[0], history=pairs[1]).slate == many[3].slate
            with pytest.raises(DataError, match="candidates is empty"):
                ranker.rank("who?", candidates=[])
            assert ranker.rank(**row, candidates=rows[3]["candidates"], history=pairs[1]).slate == many[3].slate
            objects = ({"id": item["id"], "text": item["text"]}.items() for item in rows[3]["candidates"])
            assert ranker.rank(**row, candidates=(dict(o) for o in objects), history=pairs[1]).slate == many[3].slate
            for odd in ("item a", None, [5], [("item a",)], [["item a", "b", "c"]]):
                with pytest.raises(DataError, match="an item is a pair|are lists of items"):
                    ranker.rank("who?", candidates=odd)
            unusual = [None, [], {**rows[3], "query": "\ud800"}]
            errors = [str(one) for one in ranker.rank_batch([*unusual, rows[3]])[:3]]
            assert errors == [
                "expected an object, found NoneType",
                "expected an object, found list",
                "a text is not Unicode (surrogates not allowed)",
            ]
            with pytest.raises(DataError, match="no token for 'Heat'"):
                ranker.rank("", candidates=["Heat", "item a"], history=["item b"])


# --------------------------------------------------------------------- a stream


@pytest.mark.parametrize("ahead", [False, True])
def test_a_batch_is_read_and_written_at_a_time(runs, ahead):
    """So memory does not grow with the input, and a process that is killed loses nothing that was written."""
    ranker = Ranker.open(runs["llm"].run_dir, batch_queries=4)
    read, written, rows = [0], [], queries(runs["llm"])

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
    rank_stream(Ranker.open(runs["llm"].run_dir, batch_queries=4), lines(), whole)
    assert target.getvalue() == whole.getvalue()


def test_a_batch_is_prepared_while_another_is_computed(runs):
    """By another thread: the programs stay on the main one, which waits here until the next batch is there."""
    ranker, rows = Ranker.open(runs["llm"].run_dir, batch_queries=4), queries(runs["llm"])
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


def test_what_was_prepared_is_written_before_a_later_batch_fails(runs):
    ranker, rows = Ranker.open(runs["llm"].run_dir, batch_queries=4), queries(runs["llm"])
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


def test_killed_it_has_written_every_batch(runs):
    config = runs["llm"]
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


def test_each_shape_is_compiled_once(runs):
    ranker, rows, names = Ranker.open(runs["llm"].run_dir, batch_queries=4), queries(runs["llm"]), []

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
def test_the_command(runs, tmp_path, capfdbinary, monkeypatch, system, stage):
    config = runs[system]
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
def test_hostile_lines_are_one_error_each(runs, rankers, system, stage):
    rows = queries(runs[system])
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


def test_shapes_that_the_run_never_saw_are_errors(runs):
    """A prompt beyond the largest bucket; a pool beyond the limit, which is the command's to raise."""
    config = runs["llm"]
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
def test_what_cannot_be_ranked_with_is_refused(runs, capfd, arguments, message):
    config = runs["llm"]
    known = {"run": config.run_dir, "data": config.data.manual_dir}
    assert rank.main([text.format(**known) for text in arguments]) == 2
    said = capfd.readouterr()
    assert message in said.err and not said.out


def test_a_method_that_cannot_draw_says_so(runs, rankers):
    for stage in ("evaluator", "g_e"):
        with pytest.raises(ConfigError, match="makes one list of a query"):
            rankers["ranker", stage].rank_batch(queries(runs["ranker"]), samples=2)


def test_a_run_without_a_finished_stage_is_refused(runs, tmp_path):
    (tmp_path / "config.json").write_bytes((Path(runs["llm"].run_dir) / "config.json").read_bytes())
    with pytest.raises(ConfigError, match="has no finished stage yet"):
        Ranker.open(tmp_path)


def test_a_damaged_file_ends_it_with_what_was_ranked(runs, tmp_path, capfd):
    whole = gzip.compress(b"".join(encoded(queries(runs["llm"]) * 200)), mtime=0)
    (tmp_path / "q.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert rank.main([runs["llm"].run_dir, str(tmp_path / "q.jsonl.gz")]) == 2
    said = capfd.readouterr()
    assert "cannot be read on" in said.err
    sound = zlib.decompressobj(31).decompress(whole[: len(whole) // 2]).count(b"\n")
    assert [json.loads(line)["line"] for line in said.out.splitlines()] == list(range(1, sound + 1)) and sound > 300
