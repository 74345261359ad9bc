"""The ranker's benchmark: its FLOPs against the products of the program itself, and a whole small run."""

import json

import jax
import pytest
from tiny import quick_programs

from fgrpo_jax.bench import command, ranker
from fgrpo_jax.bench.flops import RankerSizes, ranker_sample_flops, ranker_step_flops
from fgrpo_jax.policies.ranker import generator
from fgrpo_jax.run.compute import products

SMALL = RankerSizes(batch=2, group=3, pool=8, history=5, length=4, width=16, heads=2, mlp=24, items=30)


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_programs():
        yield


@pytest.mark.parametrize("layers, list_layers, group, together", [(1, 1, 3, 3), (2, 3, 3, 3), (1, 1, 12, 6)])
def test_flops_are_those_of_the_program(layers, list_layers, group, together):
    """But for what the program computes and no one needs: a history's last layer, and scores of other lists' steps.

    together: lists that attend as one.
    """
    n = SMALL._replace(layers=layers, list_layers=list_layers, group=group)
    spec, given = ranker.spec_of(n), ranker.make_inputs(n)

    def read(params, query, actions):
        return generator.logits(spec, generator.encode(spec, params, query), actions)

    found = products(jax.make_jaxpr(read)(given.params, given.query, given.actions).jaxpr)
    pair = 4 * n.width
    later = n.length - 1
    scores = group // together * (together * later) ** 2
    masked = n.list_layers * (scores - group * later * (later + 1) // 2) * pair
    last = n.history * (4 * n.width**2 + 6 * n.width * n.mlp + n.history * pair)
    assert found == ranker_sample_flops(n) + n.batch * (masked + last)
    assert ranker_step_flops(n) == 3 * ranker_sample_flops(n)


def test_more_lists_cost_less_than_in_proportion():
    """The pool is read once, whatever the group."""
    few, many = (ranker_sample_flops(RankerSizes(group=group)) for group in (8, 50))
    assert 3 < many / few < 50 / 8


def test_growth_is_time_over_flops():
    def row(group, seconds, flops):
        each = {job: {"median": seconds} for job in ranker.JOBS}
        return {
            "grows": "group",
            "group": group,
            "ours": each,
            "torch": each,
            "flops": dict.fromkeys(ranker.JOBS, flops),
        }

    lines = ranker.growth([row(8, 1.0, 10), row(20, 3.0, 20)])
    assert len(lines) == 2 and "FLOPs  2.00 times, ours  3.00 times (1.50 of FLOPs)" in lines[0]


def test_a_run_measures_both(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.setattr(ranker, "keep_memory", lambda: False)
    monkeypatch.setattr(ranker, "GROWTH", {"group": (2, 3), "pool": (3,)})
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL._asdict().items()]
    path = tmp_path / "found.json"
    assert command.main(["ranker", *sizes, "--repeats=2", "--threads=1", f"--json={path}"]) == 0
    told = capsys.readouterr().out
    assert "lists/s" in told and "steps/s" in told and "group 2 -> 3, sampling" in told
    found = json.loads(path.read_text())
    assert found["batch"] == 2 and found["torch"]["step"]["n"] == 2 and found["ours"]["sample"]["median"] > 0
    assert [row["group"] for row in found["growth"]] == [2, 3]  # a pool smaller than a list is left out


@pytest.mark.parametrize("flags, told", [
    (["--width=10", "--heads=4"], "--width 10 is not divided by --heads 4"),
    (["--pool=3", "--length=4"], "--pool 3 is smaller than a list"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(flags, told, capsys):
    with pytest.raises(SystemExit):
        command.main(["ranker", *flags])
    assert told in capsys.readouterr().err


def test_without_pytorch_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(ranker, "keep_memory", lambda: False)
    monkeypatch.setattr(ranker.importlib.util, "find_spec", lambda name: None)
    assert command.main(["ranker"]) == 2
    assert capsys.readouterr().err == "error: bench ranker compares with PyTorch: pip install 'fgrpo_jax[parity]'\n"
