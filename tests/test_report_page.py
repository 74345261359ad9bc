"""report.html: its numbers, what hostile texts can do, and the same bytes from the same inputs."""

import base64
import hashlib
import html.parser
import itertools
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import ROOT

from fgrpo_jax.evaluation import evaluate, report, table
from fgrpo_jax.evaluation.evaluate import ERRORS, Prediction
from fgrpo_jax.evaluation.report_page import browser, charts, losses, markup, page, training
from fgrpo_jax.evaluation.report_page.browser import Step
from fgrpo_jax.evaluation.report_page.page import Beside
from fgrpo_jax.types import Missed, Outcome, RankingExample

HOSTILE = (
    "</script><script>document.title='broken'</script>",
    "<!-- <script>",
    "\"'><img src=x onerror=\"document.title='broken'\">",
    "&lt;b&gt; & &amp;",
    "\u202eright to left\u2066",
    "half a pair \ud800, null\u0000 and \u2028 separators",
    "long " * 5000,
    "${style} $data {{x}} \\u003c",
)
LOGS = [
    {"stage": "sft", "step": 10, "loss": 3.0, "queries_per_s": 0.3},
    {"stage": "sft", "step": 20, "eval/ndcg@3": 0.3, "eval/recall@1": 0.2, "eval/slate_recall": 0.6},
    *(
        {"stage": "rl", "step": s, "reward/slate": s / 99, "reward/rank": 0.2, "loss": 1e-9, "outcome/ok": 1.0}
        for s in range(1, 9)
    ),
]


def example(number, relevance):
    texts = [f"{HOSTILE[(number + i) % len(HOSTILE)]} {i}" for i in range(len(relevance))]
    candidates = tuple((f"item <{number}> {i}", text) for i, text in enumerate(texts))
    missed = (Missed("lost & gone", 1.0),) if number % 9 == 4 else ()
    history = ((f"h{number}", HOSTILE[number % len(HOSTILE)]),)
    query_id, query = f"q</script>{number}", HOSTILE[-number % len(HOSTILE)]
    return RankingExample(query_id, query, candidates, tuple(relevance), history, missed=missed)


@pytest.fixture(scope="module")
def evaluation():
    """Queries of 5 to 8 candidates, some without a relevant one, and two methods, of which one breaks rules."""
    rng = np.random.default_rng(0)
    examples, methods = [], {"good": [], "bad-method": []}
    for q in range(60):
        gains = rng.choice([0.0, 0.0, 0.0, 1.0, 2.5], int(rng.integers(5, 9))).tolist()
        examples.append(example(q, gains))
        for name, noise in (("good", 0.5), ("bad-method", 3.0)):
            predicted = evaluate.from_scores(gains + noise * rng.standard_normal(len(gains)), 4, 3)
            if name == "bad-method" and q % 5 == 3:
                predicted = predicted._replace(outcome=Outcome("rank_duplicate", "rank"))
            methods[name].append(predicted)
    found = evaluate.compare(examples, methods, (1, 3), "good", resamples=50)
    found.summary["parameters"] = {"good": 12345}
    return found


@pytest.fixture(scope="module")
def shown(evaluation):
    """The page as text."""
    steps = [Step("slate", 0, (1,), 0.75, ((1, 0.75), (0, 0.2)), 0.0, 0.05), Step("rank", 0, (), 0.5, (), 0.5, 0.5)]
    beside = Beside({"": LOGS, '"><i x=".': LOGS}, {"good": {7: steps}})
    config = {"eval": {"metric": "ndcg@3"}, "data": {"name": HOSTILE[0]}, "prompt": HOSTILE[5], "rl": {"terms": ()}}
    manifest = report.manifest(config, {"run": 0}, {"test": "f"}, None)
    return page.render(evaluation, manifest, {"bm25": HOSTILE[2]}, beside=beside)


class Reader(html.parser.HTMLParser):
    """Refuses elements that are not closed in order; keeps ids, references, cells of tables, and scripts."""

    VOID = {"meta", "link", "input", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references, self.rows, self.texts = [], [], [], [], {}
        self.tags = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names), (tag, names)
        assert not [name for name in names if name.startswith("on")], (tag, names)
        given = dict(attributes)
        self.tags.append((tag, given))
        self.ids += [given["id"]] if "id" in given else []
        self.references += [value.removeprefix("#") for name, value in attributes if name in ("aria-labelledby", "for")]
        self.references += [given["href"].removeprefix("#")] if tag == "a" else []
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        assert "svg" in self.open, f"<{tag}/> outside of SVG"
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.open)

    def handle_data(self, text):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += text
        if self.open and self.open[-1] in ("script", "style"):
            self.texts.setdefault(self.open[-1], []).append(text)


@pytest.fixture(scope="module")
def read(shown):
    return Reader(shown)


def test_it_is_sound_html_whatever_the_texts_are(read, shown):
    assert shown.startswith("<!doctype html>\n")
    assert len(set(read.ids)) == len(read.ids) and set(read.references) <= set(read.ids)
    assert [tag for tag, _ in read.tags].count("script") == 2 == shown.lower().count("<script")
    labelled = [given for tag, given in read.tags if tag == "svg" and "aria-hidden" not in given]
    assert labelled and all(given["role"] == "img" and given["aria-label"] for given in labelled)
    assert all(given.get("scope") in ("col", "row") for tag, given in read.tags if tag == "th")
    assert [tag for tag, _ in read.tags if re.fullmatch("h1|main|nav|header", tag)] == ["header", "h1", "nav", "main"]


def test_it_asks_for_nothing_and_runs_nothing_but_its_own_script(read, shown):
    addresses = [given[name] for _, given in read.tags for name in ("src", "href", "xlink:href") if name in given]
    assert all(address.startswith(("#", "data:,")) for address in addresses)
    (policy,) = (given["content"] for tag, given in read.tags if given.get("http-equiv") == "Content-Security-Policy")
    (style,), (_, script) = read.texts["style"], read.texts["script"]
    named = {part.split()[0]: part.split()[1] for part in policy.split(";")}
    assert named["default-src"] == "'none'"
    for directive, text in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert named[directive] == f"'sha256-{digest}'"
    assert not any("style" in given for _, given in read.tags)  # which that policy refuses
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "fetch(", "import("):
        assert word not in script


def test_data_come_back_as_they_were(read, evaluation):
    data = json.loads(read.texts["script"][0])
    items = dict.fromkeys(item for one in evaluation.examples for item in (*one.history, *one.candidates))
    assert data["texts"] == [browser.cut(text, data["cut"]).replace("\ud800", "?") for _, text in items]
    assert [row[0] for row in data["queries"]] == [example.query_id for example in evaluation.examples]
    for q, (_, _, history, pool, gains, missed, _) in enumerate(data["queries"]):
        one = evaluation.examples[q]
        assert [data["ids"][i] for i in pool] == [item for item, _ in one.candidates]
        assert dict(gains) == {i: gain for i, gain in enumerate(one.relevance) if gain}
        assert missed == [[lost.item, lost.gain] for lost in one.missed] and len(history) == 1
        for m, method in enumerate(data["methods"]):
            slate, ranking, outcome, error, score = data["lists"][m][q]
            said = evaluation.predictions[method][q]
            assert (tuple(slate), tuple(ranking), data["outcomes"][outcome]) == (*said[:2], said.outcome.name)
            assert ERRORS[error] == evaluation.errors[method][q]
            assert abs(score / 1000 - evaluation.scores[method]["ndcg@3"][q]) <= 0.0005
    assert data["steps"]["good"]["7"][0] == ["slate", 0, [1], 0.75, [[1, 0.75], [0, 0.2]], 0, 0.05]


def test_its_numbers_are_those_of_the_table(read, evaluation):
    text = table.table(evaluation, {})
    for _, rows in table.blocks(evaluation.summary):
        for row in rows:
            assert row in read.rows, row
            assert all(cell in text for cell in row)
    assert any("±" in cell for row in read.rows for cell in row)


@pytest.mark.parametrize("counts", [(0, 0, 97, 2), (50, 30, 15, 4), (1, 97, 1, 1)])
def test_labels_of_a_flow_do_not_meet(counts):
    drawn = losses.flow("m", {"ok": 1, **dict(zip(("no_relevant", "malformed", "slate_miss", "rank_drop"), counts))})
    middles = sorted({float(x) for x in re.findall(r'x="([0-9.]+)"[^>]*text-anchor="middle"', drawn)})
    assert len(middles) == sum(count > 0 for count in counts)
    assert all(right - left >= 80 for left, right in zip(middles, middles[1:]))


def test_a_flow_says_every_count(evaluation):
    for method, counts in evaluation.summary["errors"].items():
        drawn = losses.flow(method, counts)
        said = re.search('aria-label="([^"]*)"', drawn).group(1)
        numbers = [int(n) for n in re.findall(r" (\d+)(?=,|$)", said.split("queries")[1])]
        assert numbers == [counts[name] for name, _, _ in losses.GATES] + [counts["ok"]]
        assert sum(numbers) == 60
    areas = re.findall('class="(c[0-9]|stream)"', losses.flow("m", {**dict.fromkeys(ERRORS, 0), "rank_drop": 3}))
    assert areas == ["stream", "c3", "c2"]  # nothing is drawn of what did not happen


def test_what_was_within_reach(evaluation):
    """Against all orders of every slate, and all slates of every pool."""
    (good, _), k = losses.ceilings(evaluation), 3
    best_orders, best_slates = [], []
    for one, predicted in zip(evaluation.examples, evaluation.predictions["good"]):

        def best(items, one=one):
            orders = itertools.permutations(items, min(k, len(items)))
            lists = [Prediction(items, order) for order in orders]
            return max(evaluate.score([one] * len(lists), lists, (k,), ("ndcg",))[f"ndcg@{k}"])

        best_orders.append(best(predicted.slate))
        best_slates.append(best(tuple(np.argsort([-g for g in one.relevance], kind="stable")[:4].tolist())))
    assert good.got == pytest.approx(evaluation.scores["good"]["ndcg@3"].mean())
    assert good.slate == pytest.approx(np.mean(best_orders)) and good.best == pytest.approx(np.mean(best_slates))
    assert good.got < good.slate < good.best < 1


def test_the_same_arguments_give_the_same_bytes(evaluation):
    manifest = report.manifest({}, {}, {}, None)
    beside = Beside({"": LOGS})
    assert page.render(evaluation, manifest, {}, beside=beside) == page.render(evaluation, manifest, {}, beside=beside)


def test_all_its_files_are_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = Path(page.__file__).parent
    given = {path.name for glob in settings["fgrpo_jax.evaluation.report_page"] for path in folder.glob(glob)}
    assert given == {path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}


# --------------------------------------------------------------------- curves


def drawn(logs):
    """Stage -> title of a figure -> its labels."""
    found = {}
    for stage, markup_ in training.stages(logs).items():
        figures = re.findall(r"<figcaption><b>(.*?)</b>.*?</figcaption>(.*?)</figure>", markup_)
        found[stage] = {title: re.findall('data-label="(.*?)"', svg) for title, svg in figures}
    return found


def test_what_means_nothing_is_not_drawn():
    """The loss of a policy gradient, what was not logged, and what never changes."""
    assert drawn({"": LOGS}) == {
        "sft": {
            "negative log-likelihood": ["loss"],
            "validation": ["ndcg@3", "recall@1", "slate recall"],
            "throughput, queries/s": ["queries per s"],
        },
        "rl": {"reward": ["slate", "rank"]},
    }
    assert "Constant: ok 1." in training.stages({"": LOGS})["rl"]
    assert training.section({"": []}) == ""


def test_runs_are_drawn_together():
    found = drawn({"": LOGS, "s1.": LOGS[2:]})
    assert found["rl"]["reward"] == ["this run: slate", "this run: rank", "s1: slate", "s1: rank"]
    assert found["sft"]["negative log-likelihood"] == ["loss"]  # the other run has no such stage


def test_where_a_run_was_resumed_the_last_row_counts():
    rows = [*LOGS, {"stage": "sft", "step": 10, "loss": 2.5}]
    assert training.points_of(rows[-1:] + rows[:1], "loss") == [(10, 3.0)]
    assert training.points_of(rows[:1] + rows[-1:], "loss") == [(10, 2.5)]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=900))
def test_long_lines_are_thinned_to_means(values):
    points = list(enumerate(values))
    thin = training.thinned(points)
    assert len(thin) == min(len(points), training.MOST) and thin[-1][0] == points[-1][0]
    assert [x for x, _ in thin] == sorted({x for x, _ in thin})
    assert min(values) - 1e-6 <= min(y for _, y in thin) and max(y for _, y in thin) <= max(values) + 1e-6


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_a_few_round_numbers_inside(low, size):
    high = low + size
    if high - low < 1e-9 * abs(low):
        return
    found = charts.ticks(low, high)
    assert 1 <= len(found) <= 5 and all(low - 1e-6 * size <= tick <= high + 1e-6 * size for tick in found)


# --------------------------------------------------------------------- what is shown of queries


def test_queries_that_are_stepped_through_are_of_every_kind(evaluation):
    found = browser.chosen(evaluation.errors, 12)
    assert len(found) == 12 == len(set(found)) and found == sorted(found)
    for method in evaluation.predictions:
        assert {evaluation.errors[method][q] for q in found} == set(evaluation.errors[method])
    good = {"good": evaluation.errors["good"]}
    assert browser.chosen(good, 1000) == list(range(60)) and browser.chosen(good, 0) == []


@given(st.lists(st.text(max_size=300), max_size=20), st.integers(0, 4000))
def test_texts_are_cut_to_a_budget(texts, budget):
    size = browser.cut_for(texts, budget)
    kept = [browser.cut(text, size) for text in texts]
    assert all(len(text) <= size for text in kept) and all(a == b or b.endswith("…") for a, b in zip(texts, kept))
    assert sum(map(len, kept)) <= budget or size == browser.CUTS[-1]


@given(st.recursive(st.text() | st.integers() | st.sampled_from(HOSTILE), st.lists, max_leaves=5))
def test_data_hold_no_markup(value):
    text = markup.data(value)
    assert json.loads(text) == value and not set("<>&\u2028\u2029") & set(text)


def test_runs_that_are_compared_are_averaged_by_stage():
    examples = [RankingExample(f"q{i}", "", (("a", "a"), ("b", "b")), (1.0, 0.0)) for i in range(4)]
    right, wrong = Prediction((0, 1), (0, 1)), Prediction((0, 1), (1, 0))
    methods = {"random": [wrong] * 4, "rl": [right] * 4, "s1.rl": [right, wrong] * 2, "s1.sft": [wrong] * 4}
    found = evaluate.compare(examples, methods, (1,), "rl", resamples=2, names=("recall",))
    found.summary["parameters"] = dict.fromkeys(("rl", "s1.rl", "s1.sft"), 5)
    beside = Beside({"": [], "s1.": []})
    read = Reader(page.render(found, {}, {}, beside=beside))
    assert ["rl, 2 runs", "75.0 ±35.4", "87.5 ±17.7", "100.0 ±0.0"] in read.rows
    assert not any("runs" in cell for row in Reader(page.render(found, {}, {})).rows for cell in row)
