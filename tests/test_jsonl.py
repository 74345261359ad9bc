"""jsonl: users' own data, and every way in which a line can be malformed."""

import pytest
from raw_files import lines, load

from fgrpo_jax.data import jsonl
from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.types import LoggedList


def item(n):
    return {"id": f"i{n}", "text": f"Item {n}"}


def ranking(query_id="q1", **fields):
    row = {"query_id": query_id, "query": "what?", "candidates": [item(0), item(1)], "relevance": [0, 2.5]}
    return {**row, **fields}


def test_jsonl_reads_what_its_documentation_shows(tmp_path):
    shown = jsonl.__doc__.split("A line:")[1].split("query_id    text")[0]
    lines(tmp_path / "test.jsonl", [" ".join(shown.split())])
    (example,) = load("jsonl", tmp_path, tmp_path / "prepared").splits["test"]
    assert example.query_id == "q17" and example.relevance == (0.0, 2.5)
    assert example.candidates == (("p1", "First passage."), ("p2", "Second."))
    assert example.history == (("p9", "Seen before."),)
    (tmp_path / "test.jsonl").write_bytes("\ufeff".encode() + (tmp_path / "test.jsonl").read_bytes())  # as Windows does
    assert load("jsonl", tmp_path, tmp_path / "prepared").splits["test"][0] == example


def test_jsonl_kinds_splits_and_queries_without_a_relevant_candidate(tmp_path):
    lines(tmp_path / "train.jsonl", [ranking("a", relevance=[0, 0]), ranking("b")])
    lines(tmp_path / "validation.jsonl.gz", [ranking("a", query=" two\n words ")])
    dataset = load("jsonl", tmp_path, tmp_path / "prepared")
    assert dataset.kind == "qa" and set(dataset.splits) == {"train", "validation"}
    assert dataset.splits["train"].trainable == dataset.splits["train"].relevant == (False, True)
    assert dataset.splits["validation"][0].query == "two words"
    lines(tmp_path / "validation.jsonl.gz", [ranking("a", query="", history=[item(5)])])
    assert load("jsonl", tmp_path, tmp_path / "prepared").kind == "recommendation"


MALFORMED = [
    ("{", "not JSON"),
    ("", "the line is empty"),
    ("[" * 100_000, "not JSON"),
    ("[1]", "expected an object, found list"),
    ('{"query_id": "\\ud800"}', "not JSON"),
    ({"query_id": "q"}, "missing field(s) query, candidates, relevance"),
    (ranking(label=1), "unknown field(s) label"),
    (ranking(query_id=3), "query_id must be a text"),
    (ranking(query_id=" "), "query_id must be a text"),
    (ranking(query=None), "query must be a text"),
    (ranking(query=" "), "query is empty and there is no history"),
    (ranking(candidates={}), "candidates must be a list"),
    (ranking(candidates=[], relevance=[]), "candidates is empty"),
    (ranking(candidates=["a", "b"]), "candidates[0] must be an object with id and text"),
    (ranking(candidates=[item(0), {"id": "i1"}]), "candidates[1] must be an object with id and text"),
    (ranking(candidates=[item(0), {**item(1), "score": 1}]), "candidates[1] must be an object"),
    (ranking(candidates=[item(0), {"id": "i1", "text": "\t"}]), "candidates[1]: id and text must be texts"),
    (ranking(candidates=[item(0), {"id": 1, "text": "x"}]), "candidates[1]: id and text must be texts"),
    (ranking(candidates=[item(0), {"id": "i0", "text": "x"}]), "two candidates have the id 'i0'"),
    (ranking(history=[{}]), "history[0] must be an object"),
    (ranking(history=None), "history must be a list"),
    (ranking(relevance=1), "relevance must be a list"),
    (ranking(relevance=[1]), "relevance has 1 numbers for 2 candidates"),
    (ranking(relevance=[1, -0.5]), "relevance[1] is negative"),
    (ranking(relevance=[1, float("nan")]), "relevance[1] is nan, not finite"),
    (ranking(relevance=[float("inf"), 1]), "relevance[0] is inf, not finite"),
    (ranking(relevance=[True, 1]), "relevance[0] is not a number"),
    (ranking(relevance=["1", 1]), "relevance[0] is not a number"),
    (ranking(relevance=[10**400, 1]), "relevance[0] is above"),
    (ranking(retrieval=[1]), "retrieval has 1 numbers for 2 candidates"),
    (ranking(retrieval=[1, float("nan")]), "retrieval[1] is nan, not finite"),
    (ranking(topics=[0, 1.0]), "topics[1] is not a whole number"),
    (ranking(topics=[0, 2**31]), "topics[1] is above"),
    (ranking(topics=[-1, 0]), "topics[0] is negative"),
    (ranking(logged={}), "logged must be a list of objects with items and feedback"),
    (ranking(logged=[{"items": ["i0"]}]), "logged[0] must be an object with items (a list of ids) and feedback"),
    (ranking(logged=[{"items": ["i7"], "feedback": [1]}]), "logged[0] shows 'i7', which is no candidate"),
    (ranking(logged=[{"items": ["i0", "i0"], "feedback": [1, 0]}]), "logged[0] shows a candidate twice"),
    (ranking(logged=[{"items": ["i0"], "feedback": [1, 0]}]), "logged[0].feedback has 2 numbers for 1 items"),
    (ranking(logged=[{"items": ["i0"], "feedback": [2]}]), "logged[0].feedback[0] is above 1"),
    (ranking(query_id="first"), "query_id 'first' was already used in line 1"),
    (ranking(query=1, relevance=[1], candidates="x"), "query must be a text; candidates must be a list"),
]


def test_jsonl_reports_every_malformed_line_of_every_file(tmp_path):
    lines(tmp_path / "train.jsonl", [ranking("first"), *(row for row, _ in MALFORMED), ranking("last")])
    lines(tmp_path / "test.jsonl", ["{}"])
    with pytest.raises(DataError) as error:
        load("jsonl", tmp_path, tmp_path / "prepared")
    head, *reports = str(error.value).splitlines()
    assert head.startswith(f"{len(MALFORMED) + 1} malformed line(s), nothing was prepared")
    assert len(reports) == len(MALFORMED) + 1
    for number, (report, (_, reason)) in enumerate(zip(reports, MALFORMED, strict=False), 2):
        assert f"train.jsonl, line {number}: " in report and reason in report, report
    assert "test.jsonl, line 1: missing" in reports[-1]
    assert not list((tmp_path / "prepared" / "jsonl").iterdir())


def test_jsonl_reads_what_rankers_learn_from(tmp_path):
    shown = [{"items": ["i1", "i0"], "feedback": [1, 0.5]}, {"items": [], "feedback": []}]
    lines(tmp_path / "train.jsonl", [ranking("a", retrieval=[-2.5, 3], topics=[4, 0], logged=shown), ranking("b")])
    first, second = load("jsonl", tmp_path, tmp_path / "prepared").splits["train"]
    assert (first.retrieval, first.topics) == ((-2.5, 3.0), (4, 0))
    assert first.logged == (LoggedList((1, 0), (1.0, 0.5)), LoggedList((), ()))
    assert (second.retrieval, second.topics, second.logged) == ((), (), ())


@pytest.mark.parametrize(("content", "message"), [(b"", "the file is empty"), (b"\xff\xfe\n", "not JSON")])
def test_jsonl_refuses_empty_and_binary_files(tmp_path, content, message):
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load("jsonl", tmp_path, tmp_path / "prepared")
