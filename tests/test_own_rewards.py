"""Rewards in files of the user's: a run that is credited with them, and what is said of those that cannot be used."""

import re
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_runs, recorded_states
from tiny import changed, rows, run_training, tiny_config, write_world

import eval as evaluation
from fgrpo_jax.algorithm.rewards import broken_values, term_rewards
from fgrpo_jax.run import own_rewards
from fgrpo_jax.run.command import parse_run
from fgrpo_jax.run.experiment import KNOWN
from fgrpo_jax.run.ranking import Ranker
from fgrpo_jax.run.validation import problems_of
from fgrpo_jax.types import OK, Credit, Lists, Outcome

# The built-in recall of the slate, and ndcg of the ranking, again.
FILE = """
from fgrpo_jax import metrics


def found(k):
    def reward(lists, query, frozen):
        pool = query.relevance[:, None]
        return metrics.recall(metrics.take_gains(pool, lists.slate), pool, (lists.slate >= 0).sum(-1)).astype("float32")

    return reward


def well_ranked(k):
    def reward(lists, query, frozen):
        pool = query.relevance[:, None]
        return metrics.ndcg(metrics.take_gains(pool, lists.ranking), pool, k).astype("float32")

    return reward
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_runs():
        yield


def test_a_run_that_is_credited_with_them(data, tmp_path, capsys):
    """It is that of the built-in rewards that they repeat; only training needs the file."""
    file, prepared = tmp_path / "mine.py", data.parent / "prepared"
    file.write_text(FILE)
    own = (("found", "slate", f"{file}:found"), ("well_ranked", "rank", f"{file}:well_ranked"))
    fields = {"log_every": 1, "reward.broken": -0.3, "transcript.constrained": False}  # so that some break
    plain = changed(tiny_config(data, prepared, tmp_path / "plain", rl_steps=2), fields)
    terms = (("slate", "found", 1.0), ("rank", "well_ranked", 1.0))
    fields |= {"reward.own": own, "rl.credit.terms": terms}
    config = changed(tiny_config(data, prepared, tmp_path / "own", rl_steps=2), fields)
    with recorded_states() as wanted:
        assert run_training(plain) == 0
    with recorded_states() as found:
        assert run_training(config) == 0
    assert rows(tmp_path / "own") == rows(tmp_path / "plain")
    jax.tree.map(np.testing.assert_array_equal, found["rl", 2].params, wanted["rl", 2].params)

    file.unlink()
    assert "rl" in evaluation.evaluate_run(Path(config.run_dir))
    assert Ranker.open(config.run_dir).name == "rl"
    capsys.readouterr()
    assert run_training(changed(config, {"rl.steps": 3})) == 2
    assert f"reward.own: 'found': there is no file {file}: mend the path" in capsys.readouterr().err


BODIES = {
    "host": "import numpy as np\ndef f(k):\n    return lambda lists, query, frozen: np.asarray(lists.ranking).sum(-1)",
    "shape": "def f(k):\n    return lambda lists, query, frozen: query.relevance.sum(-1)",
    "type": "def f(k):\n    return lambda lists, query, frozen: lists.ranking[..., 0] >= 0",
    "none": "def f(k):\n    return lambda lists, query, frozen: None",
    "no k": "def f(lists, query, frozen):\n    return query.relevance",
    "syntax": "def f(k)\n",
    "import": "import nowhere_to_be_found\n",
    "name": "def g(k):\n    return None\n",
}


@pytest.mark.parametrize(
    "body, message",
    [
        ("host", "rl.credit.terms: 'mine', of reward.own, cannot be traced .TracerArrayConversionError: .*jax.numpy"),
        ("shape", r"must return float32 \[B,G\], here \[3, 2\], and returns ShapeDtypeStruct\(shape=\(3,\)"),
        (
            "type",
            r"must return float32 \[B,G\], here \[3, 2\], and returns ShapeDtypeStruct\(shape=\(3, 2\), dtype=bool",
        ),
        ("none", r"must return float32 \[B,G\], here \[3, 2\], and returns None"),
        ("no k", "'mine', of reward.own, cannot be traced .TypeError: .*missing 2 required"),
        ("syntax", r"reward.own: 'mine': .*mine.py cannot be imported \(SyntaxError: "),
        ("import", "cannot be imported .ModuleNotFoundError: No module named 'nowhere_to_be_found'.: mend it"),
        ("name", "mine.py has no function 'f': name one of k that returns the reward"),
    ],
)
def test_functions_that_cannot_be_used(data, tmp_path, capsys, body, message):
    """Told in one line, before anything is written or compiled."""
    (tmp_path / "mine.py").write_text(BODIES[body])
    fields = {"reward.own": (("mine", "rank", f"{tmp_path}/mine.py:f"),), "rl.credit.terms": (("rank", "mine", 1.0),)}
    config = changed(tiny_config(data, data.parent / "prepared", tmp_path / "run", rl_steps=1), fields)
    assert run_training(config) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "own, message",
    [
        ((("ndcg", "rank", "mine.py:f"),), "reward.own: another reward is called 'ndcg' too: choose another name"),
        ((("a", "rank", "x.py:f"), ("a", "slate", "x.py:g")), "reward.own: another reward is called 'a' too"),
        ((("a", "rank", "mine.py"),), "reward.own: 'a' is at 'mine.py': write FILE.py:FUNCTION or MODULE:FUNCTION"),
        ((("a", "rank", ":f"),), "reward.own: 'a' is at ':f'"),
        ((("a", "both", "mine.py:f"),), "reward.own=(('a', 'both', 'mine.py:f'),) must be of type tuple"),
    ],
)
def test_what_a_configuration_may_not_say(own, message):
    config = changed(tiny_config("data", "prepared", "run", rl_steps=1), {"reward.own": own})
    assert any(line.startswith(message) for line in problems_of(config, KNOWN))


def test_the_example_is_one(tmp_path, monkeypatch):
    """That of the documentation, of a file and of a module."""
    example = textwrap.dedent(own_rewards.__doc__.split("all of it:\n")[1].split("\n\nThe function of k")[0])
    (tmp_path / "example_of_rewards.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    query = type("Query", (), {"relevance": jnp.array([[0.0, 2.0, 0.0]])})
    lists = Lists(None, jnp.array([[[1, 0], [0, 1], [-1, -1]]]), None)
    for place in (f"{tmp_path}/example_of_rewards.py", "example_of_rewards"):
        fields = {"reward.own": (("first_hit", "rank", f"{place}:first_hit"),)}
        config = changed(tiny_config("", "", ""), fields)
        found = own_rewards.load(config)
        assert own_rewards.text(config) == (example if place.endswith(".py") else "")  # the same on all hosts
        np.testing.assert_array_equal(found["first_hit"](5)(lists, query, {}), [[1, 0, 0]])


@pytest.mark.parametrize("of_slate", [(), ("own",)])
def test_a_reward_of_the_slate_outlives_a_broken_ranking(of_slate):
    broken = broken_values(-1.0, (), (OK, Outcome("short", "rank")))
    lists = Lists(jnp.zeros((1, 2, 1), jnp.int32), jnp.zeros((1, 2, 1), jnp.int32), jnp.array([[0, 1]]))
    credit = Credit((("slate", "own", 1.0),), of_slate=of_slate)
    own = {"own": lambda k: lambda lists, query, frozen: jnp.full((1, 2), 0.5)}
    reward = term_rewards(credit, lists, None, {}, 1, broken, own)
    np.testing.assert_array_equal(reward[..., 0], [[0.5, 0.5 if of_slate else -1.0]])


def test_they_are_named_on_the_command_line():
    arguments = ["--reward.own", "first_hit", "rank", "my_rewards.py:first_hit", "found", "slate", "mine.rewards:found"]
    config, _ = parse_run(arguments, "")
    assert config.reward.own == (
        ("first_hit", "rank", "my_rewards.py:first_hit"),
        ("found", "slate", "mine.rewards:found"),
    )
