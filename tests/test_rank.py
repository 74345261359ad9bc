"""Ranking new queries: the lists of an evaluation, one line for every line, whatever the lines hold."""

import dataclasses
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit, quick_runs
from ranked import STAGES, queries, stream

import eval as evaluation
from fgrpo_jax.data.batches import shown
from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.data.jsonl import example_of
from fgrpo_jax.policies.llm import masks, transcript
from fgrpo_jax.policies.llm.files import load_tokenizer
from fgrpo_jax.policies.llm.policy import make_grammar
from fgrpo_jax.rank import Ranker
from fgrpo_jax.types import TRAINED, UNTRAINED, Rollout


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_runs():
        yield


# --------------------------------------------------------------------- what is ranked


@pytest.mark.parametrize("system, stage", [(s, stage) for s in STAGES for stage in STAGES[s]])
def test_it_is_what_an_evaluation_writes(ranked_runs, rankers, system, stage):
    config = ranked_runs[system]
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
    ranked_runs, rankers, system, stage, tmp_path, capsys
):
    """Its steps name the items in order (where there was a choice), and their probabilities multiply to the list's."""
    shutil.copytree(ranked_runs[system].run_dir, tmp_path / "run")
    arguments = ["--split", "test", "--eval.transcripts", "4", "--eval.baselines", "random"]
    assert evaluation.main([str(tmp_path / "run"), *arguments]) == 0
    text = (tmp_path / "run" / "eval" / "test" / "report.html").read_text()
    data = json.loads(re.search('id="data">(.*?)</script>', text).group(1))
    written = stream(rankers[system, stage], queries(ranked_runs[system], "test"))
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


def test_the_last_finished_stage_is_the_default(ranked_runs):
    assert Ranker.open(ranked_runs["ranker"].run_dir).name == "fgrpo"


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
def test_log_probabilities_are_those_of_training(ranked_runs, rankers, system, stage):
    ranker, rows = rankers[system, stage], queries(ranked_runs[system])[:8]
    for row, line in list(zip(rows, stream(ranker, rows, samples=2), strict=True))[::4]:
        for one in (line, line["samples"][1]):
            logp = one["logp"]
            np.testing.assert_allclose([logp["slate"], logp["rank"]], trained_logp(ranker, row, one), atol=1e-4)
            assert logp["total"] == pytest.approx(logp["slate"] + logp["rank"], abs=2e-6)


@pytest.mark.parametrize("system, stage", [("llm", "sft"), ("ranker", "imitation")])
def test_samples_come_as_often_as_their_probability_says(ranked_runs, rankers, system, stage):
    ranker, row, n = rankers[system, stage], queries(ranked_runs[system])[0], 600
    (line,) = stream(ranker, [row], samples=n, seed=1)
    drawn = Counter((tuple(one["slate"]), tuple(one["ranking"])) for one in line["samples"])
    p_of = {(tuple(one["slate"]), tuple(one["ranking"])): math.exp(one["logp"]["total"]) for one in line["samples"]}
    assert len(line["samples"]) == n and len(drawn) > 10
    for which, count in drawn.most_common(5):
        p = p_of[which]
        assert abs(count - n * p) < 5 * math.sqrt(n * p * (1 - p)) + 1


def test_samples_are_a_function_of_the_seed_and_leave_the_greedy_list(ranked_runs, rankers):
    ranker, rows = rankers["llm", "sft"], queries(ranked_runs["llm"])
    first, again, other = (stream(ranker, rows, samples=2, seed=seed) for seed in (5, 5, 6))
    assert first == again and [x["samples"] for x in first] != [x["samples"] for x in other]
    for line, greedy in zip(first, stream(ranker, rows), strict=True):
        assert {name: value for name, value in line.items() if name != "samples"} == greedy


def test_a_malformed_line_changes_nothing_of_the_others(ranked_runs, rankers):
    ranker, rows = rankers["llm", "sft"], queries(ranked_runs["llm"])
    broken = [b"{\n" if n in (1, 9) else row for n, row in enumerate(rows)]
    sound, mixed = stream(ranker, rows, samples=2), stream(ranker, broken, samples=2)
    assert [x for n, x in enumerate(sound) if n not in (1, 9)] == [x for n, x in enumerate(mixed) if n not in (1, 9)]


def test_in_python_one_query_and_many(ranked_runs, rankers):
    for system, stage in (("llm", "sft"), ("ranker", "imitation")):
        ranker, rows = rankers[system, stage], queries(ranked_runs[system])
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
