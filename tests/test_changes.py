"""What may change in a configuration between two starts of a run, and what a stage that goes on becomes."""

import json
import operator
import shutil

import jax
import numpy as np
import pytest
from helpers import quick_runs
from tiny import changed, contents, rows, run_training, tiny_config, write_world

from fgrpo_jax.config import Config
from fgrpo_jax.config_files import to_json
from fgrpo_jax.policies.ranker.config import RankerConfig
from fgrpo_jax.run import changes, meter
from fgrpo_jax.run import directory as run
from fgrpo_jax.run.changes import Reached
from fgrpo_jax.run.checkpoint import Checkpoints
from fgrpo_jax.run.stage import Stage
from fgrpo_jax.stages import stages

NEW, BEGUN = Reached(None, None), Reached(300, None)


def refused(fields, sft=NEW, rl=NEW, **before):
    old = changed(Config(), {"sft.steps": 600, "rl.steps": 500} | before)
    return changes.refused(old, changed(old, fields), {"sft": sft, "rl": rl})


def has(config, path):
    try:
        operator.attrgetter(path)(config)
    except AttributeError:
        return False
    return True


def test_what_keeps_the_meaning_may_change():
    """Always: where things lie, what is shown and kept, how it is computed, in either system."""
    known = {system: {name for name in changes.ALWAYS if has(system(), name)} for system in (Config, RankerConfig)}
    assert set.union(*known.values()) == changes.ALWAYS
    for system, names in known.items():
        reached = {name: Reached(stage.steps, stage.steps) for name, stage in stages(system()).items()}
        assert changes.refused(system(), changed(system(), dict.fromkeys(names, "other")), reached) == []


def test_what_changes_the_meaning_is_refused():
    fields = {"run_dir": "other"}
    assert refused(fields | {"seed": 1, "eval.metric": "mrr", "data.history_max": 3}, sft=BEGUN) == [
        "seed: 0 -> 1", "data.history_max: 10 -> 3",
        "eval.metric: 'ndcg@5' -> 'mrr' (by it checkpoints were chosen; eval.py may be given another)",
    ]  # fmt: skip


def test_a_stage_that_has_not_begun_may_change():
    ended = Reached(600, 600)
    assert refused({"rl.steps": 50, "rl.optim.learning_rate": 1.0, "rl.group_size": 4}, sft=ended) == []
    assert refused({"rl.optim.learning_rate": 1.0}, sft=ended, rl=BEGUN) == ["rl.optim.learning_rate: 0.003 -> 1.0"]
    assert refused({"sft.steps": 0}, rl=BEGUN) == ["sft.steps: 600 -> 0"]  # what it began from


@pytest.mark.parametrize(
    "fields, sft, reason",
    [
        ({"sft.steps": 1000}, BEGUN, None),
        ({"sft.steps": 1000}, Reached(600, 600), None),
        ({"sft.steps": 1000}, Reached(400, 400), None),
        ({"sft.steps": 301}, BEGUN, None),
        ({"sft.steps": 300}, BEGUN, " (300 are done: choose more)"),
        ({"sft.steps": 1000}, Reached(500, 600), " (its last checkpoint, of step 600, is gone)"),
        ({"sft.patience": 3}, Reached(400, 400), None),
        ({"sft.patience": 0}, Reached(400, 400), None),
        ({"sft.patience": 3}, Reached(300, 400), " (its last checkpoint, of step 400, is gone)"),
        ({"sft.patience": 1}, BEGUN, ""),
    ],
)
def test_more_of_a_stage(fields, sft, reason):
    (name, value), before = *fields.items(), {"sft.steps": 600, "sft.patience": 2}
    expected = [] if reason is None else [f"{name}: {before[name]} -> {value}{reason}"]
    assert refused(fields, sft, **before) == expected


def test_steps_are_not_more_where_the_schedule_ends_with_them():
    (line,) = refused({"sft.steps": 1000}, BEGUN, **{"sft.optim.decay": "cosine"})
    assert line.endswith("(the learning rate of every step depends on it, as sft.optim.decay='cosine')")


def test_only_what_was_trained_with_a_result_holds_it():
    """A ranker's stages: those that start from another or keep it frozen, and not those that only come later."""
    steps = {f"{name}.steps": 300 for name in stages(RankerConfig())}
    old = changed(RankerConfig(), steps | {"grpo.starts_from": "imitation"})
    ended = dict.fromkeys(("evaluator", "pointwise", "imitation", "goalrank"), Reached(300, 300))

    def lines(fields, **reached):
        known = dict.fromkeys(stages(old), NEW) | ended | reached
        return changes.refused(old, changed(old, fields), known)

    assert lines({"imitation.steps": 400}) == []  # goalrank began elsewhere
    reason = "(grpo was trained with its result: choose another run_dir, or remove grpo/ there)"
    assert lines({"imitation.steps": 400}, grpo=BEGUN) == [f"imitation.steps: 300 -> 400 {reason}"]
    (line,) = lines({"evaluator.steps": 400})
    assert "(goalrank was trained with its result: " in line
    assert lines({"imitation.group_size": 2}, imitation=NEW) == []
    assert lines({"pointwise.steps": 200}, pointwise=NEW) == ["pointwise.steps: 300 -> 200"]
    # Of the new configuration too: it would have started from what it did not.
    fields = {"imitation.steps": 400, "goalrank.starts_from": "imitation"}
    assert [line.split(":")[0] for line in lines(fields)] == ["imitation.steps", "goalrank.starts_from"]


# --------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_runs():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    (folder / "data").mkdir()
    write_world(folder / "data")
    return tiny_config(folder / "data", folder / "prepared", "", sft_steps=4)


CASES = {
    # 7 is a multiple of neither log_every 3 nor eval_every 4: its rows are there only because it is the last step.
    "sft": ({"sft.steps": 7}, {"sft.steps": 14}, 7),
    "rl": ({"sft.steps": 2, "rl.steps": 4, "eval.versus": "sft"}, {"rl.steps": 9}, 4),
    "patience": ({"sft.steps": 16, "sft.patience": 1, "sft.optim.learning_rate": 1e-5}, {"sft.patience": 0}, 4),
    "sft of an earlier version": ({"sft.steps": 7}, {"sft.steps": 14}, 7),
    # Stays where it stopped: a run of more steps would have stopped there too.
    "stopped": ({"sft.steps": 16, "sft.patience": 1, "sft.optim.learning_rate": 1e-5}, {"sft.steps": 20}, None),
}


@pytest.fixture
def measured(monkeypatch):
    """Step 7 is the best one, as long as it is one that is evaluated; then step 4, or step 12."""
    told = {0: 0.1, 7: 0.9, 8: 0.3, 12: 0.4, 14: 0.2}
    evaluate, score, steps = Stage._evaluate_and_save, meter.score, []

    def scored(*arguments):
        return score(*arguments) | {"ndcg@2": np.full(12, told[steps[-1]])}

    def noted(self, state, step):
        steps.append(step)
        evaluate(self, state, step)

    def use(at_4):
        told[4] = at_4
        monkeypatch.setattr(meter, "score", scored)
        monkeypatch.setattr(Stage, "_evaluate_and_save", noted)

    return use


@pytest.mark.parametrize("case", CASES)
def test_extended_equals_longer_from_the_start(base, states, tmp_path, capsys, monkeypatch, measured, case):
    first, more, goes_on_from = CASES[case]
    config = changed(base, first)
    if first == {"sft.steps": 7}:
        measured(at_4=0.5 if case == "sft" else 0.2)  # what an earlier version did not keep cannot be the best
    with monkeypatch.context() as patch:
        if case == "sft of an earlier version":  # which kept the metric of the last step, whatever its number
            save = Checkpoints.save
            patch.setattr(Checkpoints, "save", lambda *given: save(*given[:-1], 0.9 if given[1] == 7 else given[-1]))
        assert run_training(changed(config, {"run_dir": str(tmp_path / "extended")})) == 0
    assert first != {"sft.steps": 7} or run.read_done(tmp_path / "extended", "sft")["best_step"] == 7
    states.clear()
    assert run_training(changed(config, {**more, "run_dir": str(tmp_path / "long")})) == 0
    long = states.copy()
    states.clear()
    capsys.readouterr()
    config = changed(config, {**more, "run_dir": str(tmp_path / "extended")})
    assert run_training(config) == 0
    said = capsys.readouterr().out
    name = "rl" if case == "rl" else "sft"
    assert all(f"changed   {field}: " in said for field in more)
    if goes_on_from is None:
        assert not states and "goes on" not in said
    else:
        assert f"{name}: goes on from step {goes_on_from}\n" in said and (name, goes_on_from + 1) in states
        assert (name, goes_on_from) not in states
    for key, state in states.items():
        jax.tree.map(np.testing.assert_array_equal, state, long[key])
    assert run.read_config(tmp_path / "extended") == config
    assert rows(tmp_path / "extended") == rows(tmp_path / "long")
    for part in ("eval", "sft/done.json", *(["rl/done.json"] if case == "rl" else [])):
        one, other = tmp_path / "extended" / part, tmp_path / "long" / part
        assert contents(one) == contents(other) if one.is_dir() else one.read_bytes() == other.read_bytes()
    kept = []
    for folder in ("long", "extended"):
        with Checkpoints(tmp_path / folder / name / "checkpoints", 2, read_only=True) as checkpoints:
            kept.append((checkpoints.steps(), checkpoints.pinned(), checkpoints.best_step()))
    assert kept[0] == kept[1]


def test_a_killed_extension_is_what_it_was(base, tmp_path, monkeypatch, capsys):
    """Between the first thing undone and the new configuration: the old command still ends it."""
    config = changed(base, {"run_dir": str(tmp_path / "run")})
    assert run_training(config) == 0
    before = contents(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(run.MetricsLog, "forget_last", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_training(changed(config, {"sft.steps": 8}))
    assert not run.is_done(tmp_path / "run", "sft")
    assert run_training(config) == 0
    assert contents(tmp_path / "run") == before


def test_a_run_of_an_earlier_version_goes_on(base, tmp_path, capsys):
    config = changed(base, {"run_dir": str(tmp_path / "run")})
    assert run_training(config) == 0
    saved = tmp_path / "run" / "config.json"
    old = json.loads(to_json(config))
    del old["sft"]["optim"]["eps"], old["trackers"]
    saved.write_text(json.dumps(old))
    shutil.rmtree(tmp_path / "run" / "eval")
    capsys.readouterr()
    assert run_training(changed(config, {"log_every": 5})) == 0
    said = capsys.readouterr().out
    note = f"note: {saved} is of an earlier version, and gets the defaults of trackers, sft.optim.eps\n"
    assert said.startswith(note + "changed   log_every: 3 -> 5\n") and "validation ndcg" not in said
    assert run.read_config(tmp_path / "run").log_every == 5
