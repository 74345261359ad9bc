"""Where else numbers and samples go."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import types

import pytest
from tiny import ROOT

from fgrpo_jax.config import Config, ConfigError
from fgrpo_jax.config_files import absent, from_json, to_json
from fgrpo_jax.evaluation.evaluate import Prediction
from fgrpo_jax.run import log as log_lib
from fgrpo_jax.run import trackers
from fgrpo_jax.run.log import MetricsLog, as_text, sample
from fgrpo_jax.types import OK, Outcome, RankingExample

EXAMPLE = RankingExample(
    "q1", "", (("a", "alpha"), ("b", "beta <b>"), ("c", "c" * 900)), (0.0, 1.0, 0.0), (("h", "first"), ("i", "last"))
)


def test_a_sample_says_what_was_written_and_what_was_relevant():
    said = sample(EXAMPLE, Prediction((1, 0), (1,), OK))
    assert said == {
        "query_id": "q1", "query": "", "last": "last", "slate": ["beta <b>", "alpha"], "ranking": ["beta <b>"],
        "outcome": "ok", "relevant": ["beta <b>"],
    }  # fmt: skip
    assert as_text(said) == "q1: after last\nslate:   *beta <b> | alpha\nranking: *beta <b>\nok"
    assert len(sample(EXAMPLE, Prediction((2,), (), Outcome("rank_empty", "rank")))["slate"][0]) == 200


class Fake(types.ModuleType):
    """Records calls of everything it is asked for."""

    def __init__(self, name, calls):
        super().__init__(name)
        self.__spec__ = importlib.util.spec_from_loader(name, None)
        self._calls = calls

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments, **named):
            self._calls.append((name, *arguments, *named.values()))
            return self

        return call


@pytest.fixture
def calls(monkeypatch):
    found = []
    for name in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, name, Fake(name, found))
    return found


def test_tensorboard_gets_numbers_and_samples_as_they_are(tmp_path, calls):
    log = MetricsLog(tmp_path, ("tensorboard",), is_main=True)
    log.write("sft", 1, {"loss": 2.0})
    log.write_samples("sft", 1, [sample(EXAMPLE, Prediction((1,), (1,)))])
    log.close()
    text = "    q1: after last\n    slate:   *beta <b>\n    ranking: *beta <b>\n    ok\n"
    assert calls == [
        ("SummaryWriter", str(tmp_path / "tensorboard")), ("add_scalar", "sft/loss", 2.0, 1),
        ("add_text", "sft/samples", text, 1), ("close",),
    ]  # fmt: skip


def test_wandb_goes_on_with_its_run_and_counts_stages_apart(tmp_path, calls):
    """The directory remembers which run of W&B it is."""
    for step in (1, 2):
        log = MetricsLog(tmp_path, ("wandb",), True, {"seed": 3})
        log.write("sft", step, {"loss": 2.0})
        log.write("rl", step, {"loss": 0.0})
        log.close()
    inits = [call for call in calls if call[0] == "init"]
    assert inits[0] == inits[1] and {"seed": 3} in inits[0] and "allow" in inits[0]
    assert [call[1:] for call in calls if call[0] == "log"][:2] == [
        ({"sft/step": 1, "sft/loss": 2.0},), ({"rl/step": 1, "rl/loss": 0.0},),
    ]  # fmt: skip
    assert [call[1:] for call in calls if call[0] == "define_metric"][:2] == [
        ("sft/*", "sft/step"),
        ("rl/*", "rl/step"),
    ]
    calls.clear()
    MetricsLog(tmp_path, ("wandb",), True).write_samples("rl", 3, [sample(EXAMPLE, Prediction((1,), (1,)))])
    (html,) = (call[1] for call in calls if call[0] == "Html")
    assert "beta &lt;b&gt;" in html and "<b>" not in html


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_one_that_is_not_installed_is_refused_before_anything_starts(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, trackers.TRACKERS[name][0], None)
    with pytest.raises(ConfigError, match=f"^trackers: {name} needs the `log` extra: pip install -e '.\\[log\\]'$"):
        trackers.check((name,))
    assert MetricsLog(tmp_path, (name,), is_main=False)  # other hosts write nothing


def test_a_run_of_an_earlier_version_keeps_its_board():
    for said, expected in ((True, ("tensorboard",)), (False, ())):
        old = json.loads(to_json(Config()))
        del old["trackers"]
        text = json.dumps(old | {"tensorboard": said})
        assert from_json(text).trackers == expected and absent(text) == []


def test_samples_beyond_the_checkpoint_are_forgotten(tmp_path):
    log = MetricsLog(tmp_path, (), is_main=True)
    for step in (0, 5, 10):
        log.write_samples("rl", step, [{"query_id": "a"}, {"query_id": "b"}])
        log.write_samples("sft", step, [{"query_id": "a"}])

    def left():
        return [(row["stage"], row["step"]) for row in map(json.loads, log.samples_path.read_text().splitlines())]

    before = left()
    with log.samples_path.open("a") as file:
        file.write('{"stage": "rl", "st')  # when it was killed
    log.forget_after("rl", 5)
    assert left() == [row for row in before if row != ("rl", 10)]
    log.forget_last("sft", 10, logged=True, evaluated=False)
    assert ("sft", 10) in left()
    log.forget_last("sft", 10, logged=False, evaluated=True)
    assert left() == [("rl", 0), ("rl", 0), ("sft", 0), ("rl", 5), ("rl", 5), ("sft", 5)]


OFFLINE = """
    import pathlib
    from fgrpo_jax.run.log import MetricsLog
    for _ in range(2):
        log = MetricsLog(pathlib.Path({folder!r}), ("wandb",), True, {{"seed": 3, "rl": {{"steps": 2}}}})
        log.write("sft", 1, {{"loss": 2.0}})
        sample = {{"query_id": "q", "query": "<b>", "slate": ["a"], "ranking": [], "outcome": "ok", "relevant": []}}
        log.write_samples("sft", 1, [sample])
        log.close()
"""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="no wandb: pip install -e '.[log]'")
def test_wandb_without_a_network(tmp_path):
    script = textwrap.dedent(OFFLINE).format(folder=str(tmp_path))
    environ = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 2


def test_the_log_has_no_other_readers_of_its_files(tmp_path):
    """A line that is no row is named with its file."""
    log = MetricsLog(tmp_path, (), is_main=True)
    log.samples_path.write_text('["not a row"]\n')
    with pytest.raises(ConfigError, match="samples.jsonl, line 1, is not a row of samples"):
        log.forget_after("rl", 1)
    assert log_lib.read_rows(tmp_path / "nothing.jsonl") == []
