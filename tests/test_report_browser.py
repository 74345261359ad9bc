"""report.html as its reader meets it, in Chromium without a window."""

import json
import time

import numpy as np
import pytest
from browser import CHROMIUM, DRIVER, chromium
from test_report_page import HOSTILE, LOGS, evaluation, shown  # noqa: F401 - fixtures

from fgrpo_jax.evaluation import evaluate, report
from fgrpo_jax.evaluation.report_page import page as pages
from fgrpo_jax.evaluation.report_page.page import Beside
from fgrpo_jax.types import RankingExample

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def tab():
    with chromium() as page:
        yield page


@pytest.fixture
def page(tab, shown, tmp_path):  # noqa: F811
    """The hostile page of test_report_page, open."""
    (tmp_path / "report.html").write_text(shown, encoding="utf-8")
    tab.look()
    tab.open(f"file://{tmp_path}/report.html")
    yield tab
    assert tab.console() == []


def found(page):
    return page.run("return [...document.querySelectorAll('#list button')].map(b => Number(b.dataset.query))")


def write(page, text):
    page.run("const s = document.getElementById('search'); s.focus(); s.value = ''")
    page.press(*text)
    page.run("document.getElementById('search').dispatchEvent(new Event('input'))")


def test_it_opens_and_hostile_texts_stay_texts(page):
    assert page.run("return document.documentElement.dataset.ready") is not None
    assert page.run("return document.title").startswith(HOSTILE[0]) and page.run("return document.images.length") == 0
    for q in range(len(HOSTILE)):
        page.run("document.querySelector(`[data-query='${arguments[0]}']`).click()", q)
        page.run("document.querySelector('#query .scroll + button')?.click()")
        assert page.run("return document.querySelectorAll('script').length") == 2
    texts = page.run("return [...document.querySelectorAll('#query tbody th bdi:first-child')].map(e => e.textContent)")
    assert any(text.startswith(HOSTILE[0]) for text in texts)


def test_search_and_filters(page, evaluation):  # noqa: F811
    assert page.text("#count") == "60 of 60 queries" and len(found(page)) == 50
    write(page, "Q</Script>1")
    assert found(page) == [1, *range(10, 20)] and page.text("#count") == "11 of 60 queries"
    write(page, "lost in")
    assert found(page) == [] and page.text("#count") == "0 of 60 queries"
    write(page, "onerror")  # in the text of an item
    holds = [q for q, e in enumerate(evaluation.examples) if "onerror" in str((e.query, e.history, e.candidates))]
    assert found(page) == holds[:50] != list(range(50))
    write(page, "")
    page.run(
        "const e = document.getElementById('error'); e.value = '3'; e.dispatchEvent(new Event('input'));"
        "const m = document.getElementById('method'); m.value = '1'; m.dispatchEvent(new Event('input'))"
    )
    assert found(page) == [q for q, error in enumerate(evaluation.errors["bad-method"]) if error == "malformed"]


def test_the_keyboard_does_all_of_it(page):
    page.press("tab")  # the first stop of all
    assert page.run("return document.activeElement.className") == "skip"
    page.run("document.querySelector('#list button').focus()")
    page.press("down", "down", "enter")
    assert page.text("#query h3") == "Query q</script>2"
    assert page.run("return document.activeElement.id") == "query"
    page.run("document.getElementById('next').focus()")
    page.press("enter")
    assert found(page) == list(range(50, 60)) and page.text("#page") == "page 2 of 2"


def test_candidates_in_no_list_are_shown_on_request(page, evaluation):  # noqa: F811
    page.run("document.querySelector(`[data-query='3']`).click()")
    rows = "return document.querySelectorAll('#query .pool tbody:not([hidden]) tr').length"
    pool = len(evaluation.examples[3].candidates)
    button = "document.querySelector('#query .scroll + button')"
    listed = {c for lists in evaluation.predictions.values() for c in (*lists[3].slate, *lists[3].ranking)}
    listed |= {c for c, gain in enumerate(evaluation.examples[3].relevance) if gain > 0}
    assert page.run(rows) == len(listed) < pool
    assert page.run(f"return {button}.textContent") == f"Show {pool - len(listed)} others, in no list"
    page.run(f"{button}.focus()")
    page.press("enter")
    assert page.run(rows) == pool and page.run(f"return {button}.getAttribute('aria-expanded')") == "true"
    page.press("enter")
    assert page.run(rows) == len(listed)


def test_a_transcript_is_stepped_through(page):
    page.run("const s = document.getElementById('stepped'); s.checked = true; s.dispatchEvent(new Event('input'))")
    assert found(page) == [7]
    page.run("document.querySelector('#list button').click()")
    numbers = "return [...document.querySelectorAll('.bars .number')].map(e => e.textContent)"
    assert page.run(numbers) == ["75.0 %", "20.0 %", "5.0 %"]
    page.run("document.querySelector('.said button').focus()")
    page.press("right")
    assert page.run(numbers) == ["50.0 %", "50.0 %"]
    assert "Step 2 of 2: rank, place 1" in page.text("#query [role=status]")


@pytest.mark.parametrize("width", [1280, 360])
def test_it_is_as_wide_as_the_window_in_light_and_dark(page, width):
    colours = set()
    for dark in (False, True):
        page.look(width, 800, dark)
        assert page.run("return document.documentElement.scrollWidth") <= width
        colours.add(page.run("return getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2


CONTRAST = """
    const channel = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const parts = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const behind = (e) => { for (; e; e = e.parentElement) { const b = parts(getComputedStyle(e).backgroundColor);
      if (b.length < 4 || b[3] > 0) return b; } return [255, 255, 255]; };
    const poor = [];
    for (const e of document.querySelectorAll("body *")) {
      const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
      if (!own || !e.getClientRects().length || e.matches("script, style, option, :disabled, .skip, .tip")) continue;
      const style = getComputedStyle(e), ink = parts(e.namespaceURI.includes("svg") ? style.fill : style.color);
      const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
      if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(e.tagName + "." + e.className + ": " + e.textContent.slice(0, 30));
    }
    return poor;
"""


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_has_the_contrast_of_wcag_aa(page, dark):
    page.look(dark=dark)
    assert page.run(CONTRAST) == []


def test_ten_thousand_queries_open_within_two_seconds(tab, tmp_path):
    """From the request to the list on the screen, in a process beside which others may run."""
    rng = np.random.default_rng(0)
    names = [(f"item-{i}", f"The title of item number {i}") for i in range(5000)]
    examples, methods = [], {f"method-{m}": [] for m in range(4)}
    for q in range(10_000):
        pool = tuple(names[i] for i in rng.choice(5000, 20, replace=False))
        examples.append(RankingExample(f"test-{q:05}", f"question number {q}", pool, (1.0, *[0.0] * 19), pool[:5]))
        for predicted in methods.values():
            predicted.append(evaluate.from_scores(rng.standard_normal(20), 10, 5))
    found = evaluate.compare(examples, methods, (5,), "method-0", resamples=2)
    text = pages.render(found, report.manifest({}, {}, {}, None), {}, beside=Beside({"": LOGS}))
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    tab.look()
    started = time.perf_counter()
    tab.open(f"file://{tmp_path}/report.html")
    took = time.perf_counter() - started
    assert tab.text("#count") == "10,000 of 10,000 queries" and tab.console() == []
    nodes = tab.run("return document.querySelectorAll('*').length")
    ready = tab.run("return Number(document.documentElement.dataset.ready)")
    print(json.dumps({"megabytes": len(text) / 1e6, "seconds": took, "ready_ms": ready, "elements": nodes}))
    assert nodes < 3000  # only what is seen is made
