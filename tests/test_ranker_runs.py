"""Whole runs of a ranker: the table, resuming, moving, and what is refused."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import quick_runs, two_processes
from tiny import ROOT, changed, config_file, rows, run_training, write_world
from tiny_lists import write_lists

import eval as evaluation
from fgrpo_jax.config_files import from_json, to_json
from fgrpo_jax.data.datasets import load
from fgrpo_jax.run import directory
from fgrpo_jax.run.compute import products
from fgrpo_jax.run.experiment import assemble
from fgrpo_jax.run.finished import best_params
from fgrpo_jax.run.stage import Stage
from fgrpo_jax.stages import stages

TRAINED = (
    "evaluator", "pointwise", "dlcm", "prm", "imitation", "generators", "two_phase", "goalrank", "grpo", "fgrpo",
)  # fmt: skip
SELECTED = ("g_e", "mg_e_3", "mmr_0.8")


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_runs():
        yield


@pytest.fixture
def whole(ranker_run):
    return ranker_run


def scores(run_dir):
    return json.loads((Path(run_dir) / "eval" / "validation" / "metrics.json").read_text())


def test_every_stage_has_a_row_and_so_have_the_selections(whole):
    config, _ = whole
    found = scores(config.run_dir)
    assert set(found["methods"]) == {"random", "retrieval", *TRAINED, *SELECTED}
    assert all(0 <= one["alpha_ndcg@2"]["mean"] <= 1 for one in found["methods"].values())
    for method, outcomes in found["outcomes"].items():
        assert outcomes == {"ok": 12}, method


def test_it_is_said_how_many_parameters_made_a_list(whole):
    """A generator-evaluator reads its generators and the evaluator; a baseline that counts, none."""
    found = scores(whole[0].run_dir)["parameters"]
    assert set(found) == {*TRAINED, *SELECTED}
    assert found["g_e"] == found["imitation"] + found["evaluator"] and found["generators"] == found["imitation"]
    assert found["mg_e_3"] == 3 * found["generators"] + found["evaluator"] and found["goalrank"] == found["grpo"]
    assert found["mmr_0.8"] == found["pointwise"]
    shapes = jax.tree.map(lambda x: x.size, whole[1]["imitation", 4].params)
    assert found["imitation"] == sum(jax.tree.leaves(shapes))


def test_it_is_said_how_much_a_list_computes(whole):
    """A generator-evaluator writes several lists and judges them; one built greedily is judged for every candidate."""
    found = scores(whole[0].run_dir)["flops"]
    assert set(found) == {*TRAINED, *SELECTED}
    assert found["generators"] == found["imitation"] == found["goalrank"] < found["two_phase"]
    assert found["pointwise"] == found["mmr_0.8"] < found["evaluator"]
    assert found["imitation"] < found["g_e"] < found["mg_e_3"]
    config = whole[0]
    experiment = assemble(config, load(config.data), Path(config.run_dir))
    policy, params = experiment.policy("imitation"), best_params(experiment, Path(config.run_dir), "imitation")
    alone = policy.encode(list(experiment.dataset.splits["test"])[:1])  # whatever the batches of the evaluation were
    assert found["imitation"] == products(jax.make_jaxpr(policy.greedy)(params, {}, alone).jaxpr)


def test_what_a_group_was_like_is_logged(whole):
    config, _ = whole
    logged = rows(config.run_dir, "goalrank")[1]
    assert logged["kept_groups"] > 0 and logged["reward/rank"] > 0
    assert sum(value for name, value in logged.items() if name.startswith("gap_")) == pytest.approx(1)
    assert not any(name.startswith("reward/") for name in rows(config.run_dir, "evaluator")[1])


def test_stages_begin_where_they_are_told(whole):
    """Each at a random start of its own; GRPO and GoalRank at the imitation, F-GRPO at the one of two phases."""
    config, _ = whole
    evaluated = {name: [row for row in rows(config.run_dir, name) if "eval/ndcg@2" in row] for name in TRAINED}
    found = {name: [row["eval/ndcg@2"] for row in of_stage] for name, of_stage in evaluated.items()}
    first = {name: values[0] for name, values in found.items()}
    assert first["goalrank"] == first["grpo"] == first["imitation"]
    assert first["imitation"] != first["generators"] and first["fgrpo"] == max(found["two_phase"])


# The reward model, the generator's start, and GoalRank on both.
KEPT = ("evaluator", "pointwise", "imitation", "goalrank")


def fewer(config, run_dir, **fields):
    """The run with the stages that GoalRank needs."""
    left_out = {f"{name}.steps": 0 for name in TRAINED if name not in KEPT}
    return changed(config, {"run_dir": str(run_dir), **left_out, **fields})


def test_a_run_that_was_stopped_goes_on_to_the_bit(whole, states, tmp_path, monkeypatch):
    config, expected = whole
    config = fewer(config, tmp_path / "run")
    on_step, stop = Stage.on_step, ("goalrank", 2)

    def stopping(self, state, metrics, examples, stopping):
        return on_step(self, state, metrics, examples, stopping=(self.name, self._step + 1) == stop)

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "on_step", stopping)
        assert run_training(config) == 0
    assert not (tmp_path / "run" / "goalrank" / "done.json").exists()
    states.clear()
    assert run_training(config) == 0
    assert min(step for name, step in states if name == "goalrank") == 3
    for key, state in states.items():
        jax.tree.map(np.testing.assert_array_equal, state, expected[key])
    found, theirs = scores(config.run_dir)["methods"], scores(whole[0].run_dir)["methods"]
    assert found == {name: theirs[name] for name in found} and set(KEPT) <= set(found)


def test_two_processes_train_what_one_does(whole, tmp_path):
    """The rows of one process up to rounding."""
    config = fewer(whole[0], tmp_path / "run", **{"mesh.fsdp": 2})
    command = [sys.executable, str(ROOT / "train.py"), config_file(config, tmp_path / "config.py")]
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    with two_processes(command, **quick) as both:
        said = [child.communicate(timeout=600) for child in both]
    assert [child.returncode for child in both] == [0, 0], said[0][1][-3000:] + said[1][1][-3000:]
    assert "2 x cpu (2 process(es)), mesh data 1 x fsdp 2 x tensor 1" in said[0][0]
    assert "goalrank 4/4  reward/rank" in said[0][0] and "reward/slate" not in said[0][0]  # which nothing rewards
    for name in KEPT:
        ours, theirs = rows(config.run_dir, name), rows(whole[0].run_dir, name)
        assert [row.keys() for row in ours] == [row.keys() for row in theirs] and len(ours) > 1
        for our, their in zip(ours, theirs, strict=True):
            assert our == pytest.approx(their, abs=1e-4), name


def test_a_run_that_was_moved_is_evaluated_without_its_training_data(whole, tmp_path):
    config, _ = whole
    moved, data = tmp_path / "moved", tmp_path / "data"
    shutil.copytree(config.run_dir, moved)
    data.mkdir()
    shutil.copy(Path(config.data.manual_dir) / "validation.jsonl", data)
    before = scores(moved)
    command = [str(moved), "--data.manual-dir", str(data), "--data.prepared-dir", str(tmp_path / "prepared")]
    assert evaluation.main([*command, "--eval.baselines", "retrieval"]) == 0
    after = scores(moved)
    for method in (*TRAINED, *SELECTED):
        assert after["methods"][method] == before["methods"][method], method


def test_another_run_is_compared(whole, tmp_path):
    """Its selections have rows too."""
    config, _ = whole
    shutil.copytree(config.run_dir, tmp_path / "other")
    shutil.copytree(config.run_dir, tmp_path / "this")
    assert evaluation.main([str(tmp_path / "this"), "--compare", str(tmp_path / "other")]) == 0
    methods = scores(tmp_path / "this")["methods"]
    assert methods["other.mg_e_3"] == methods["mg_e_3"] and methods["other.goalrank"] == methods["goalrank"]


def test_the_configuration_is_read_back(whole):
    config, _ = whole
    assert from_json(to_json(config)) == config and list(stages(config)) == list(TRAINED)


# --------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"goalrank.group_size": 3}, "goalrank.group_size=3 has no room for own samples beside the 3 lists"),
        ({"grpo.group_size": 1}, "grpo.group_size=1: an advantage centred by its group is then always 0"),
        ({"goalrank.group_size": 1}, "goalrank.group_size=1: the softmax over a group of one list is always 1"),
        (
            {"goalrank.objective.name": "clipped_pg"},
            "goalrank.source='mixed': the policy gradient of clipped_pg is of lists that the policy drew itself",
        ),
        ({"goalrank.frozen_from": ("evaluator",)}, "goalrank: proposal 'pointwise' reads the stage 'pointwise'"),
        ({"grpo.frozen_from": ()}, "grpo: reward 'reward_model' reads the stage 'evaluator'"),
        ({"evaluator.steps": 0}, "goalrank.frozen_from: stage 'evaluator' is skipped, its steps are 0"),
        ({"proposals.mix": (("oracle", 1),)}, "proposals.mix: 'oracle' is not one of retriever, popularity"),
        ({"network.hidden_size": 9}, "network.hidden_size=9 must be a multiple of num_heads=2"),
        ({"goalrank.credit.terms": (("rank", "ndcg", 1.0), ("rank", "hit", 1.0))}, "group_softmax' reads one reward"),
        ({"selection.mmr": (0.8, 0.8)}, "selection.mmr=(0.8, 0.8) must be different weights in [0, 1]"),
        ({"selection.mmr": (float("nan"),)}, "selection.mmr=(nan,) must be different weights in [0, 1]"),
        ({"selection.sizes": (1, 4)}, "selection.sizes=(1, 4) must differ, from 1 to selection.generators=3"),
        ({"network.sees_retrieval": False}, "dlcm reads the pool in the first stage's order, which"),
        ({"generators.policy": "generator"}, "generators.policy='generator': this stage is read as the generators"),
        (
            {"grpo.credit.terms": (("rank", "ndcg", 1.0),), "grpo.credit.scheme": "exact"},
            "grpo.credit.scheme='exact' reads the slate of a ranking, and a generator writes none",
        ),
        (
            {"goalrank.credit.normalise": "each"},
            "goalrank.objective.name='group_softmax' reads the reward as it is: leave goalrank.credit.normalise",
        ),
        ({"goalrank.credit.terms": (("rank", "ndcg", 0.5),)}, "'group_softmax' reads the reward as it is"),
        (
            {f"{name}.steps": 0 for name in TRAINED if name != "pointwise"}
            | {"bias.kind": "noise", "bias.weight": 1.0},
            "bias.kind='noise': no stage that is trained reads the evaluator",
        ),
        ({"bias.kind": "noise"}, "bias: kind='noise' with weight=0.0; give both, or neither"),
        ({"network.list_length": 9}, "candidates, fewer than the 9 items of a list"),
        ({"imitation.target.fill": "first"}, "imitation.target: a ranker imitates network.labels, and reads no target"),
        ({"evaluator.policy": "pointwise"}, "evaluator.policy='pointwise': this stage is read as the evaluator"),
        ({"fgrpo.policy": "judge"}, "fgrpo.policy='judge' is not one of generator"),
        ({"selection.lists": 0}, "selection.generators and selection.lists must be at least 1"),
        ({"fgrpo.source": "mixed"}, "fgrpo: proposal 'pointwise' reads the stage 'pointwise'"),
        ({"grpo.credit.terms": (("slate", "reward_model", 1.0),)}, "grpo.credit.terms: its lists are rankings"),
        ({"evaluator.source": "sampled", "evaluator.objective.name": "clipped_pg"}, "evaluator.group_size=1"),
    ],
)
def test_what_cannot_run_is_refused(whole, tmp_path, capsys, fields, message):
    config = changed(whole[0], fields | {"run_dir": str(tmp_path / "run")})
    assert run_training(config) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_query_of_any_evaluation_split_is_refused_before_training(whole, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(whole[0].data.manual_dir, data)
    *some, last = (data / "test.jsonl").read_text().splitlines()
    row = json.loads(last) | {"query_id": "small", "logged": []}
    row |= {name: row[name][:2] for name in ("candidates", "relevance", "retrieval", "topics")}
    (data / "test.jsonl").write_text("\n".join([*some, json.dumps(row)]) + "\n")
    assert run_training(changed(whole[0], {"run_dir": str(tmp_path / "run"), "data.manual_dir": str(data)})) == 2
    assert "query 'small' has 2 candidates, fewer than" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_data_without_shown_lists_are_refused(whole, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    write_world(data)
    assert run_training(changed(whole[0], {"run_dir": str(tmp_path / "run"), "data.manual_dir": str(data)})) == 2
    assert "has no shown lists (`logged`)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("retrieval", {}, "has no first-stage scores (`retrieval`), and dlcm reads pools in their order: give scores"),
        ("retrieval", {"dlcm.steps": 0}, "proposals.mix asks for retriever: give scores, or leave that out"),
        ("topics", {}, "has no topics (`topics`), and selection.mmr asks for them: give topics, or leave that out"),
    ],
)
def test_data_without_what_something_orders_by_are_refused(whole, tmp_path, capsys, name, fields, message):
    """Without it, that would order by nothing."""
    data = tmp_path / "data"
    shutil.copytree(whole[0].data.manual_dir, data)
    lines = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    for line in lines:
        del line[name]
    (data / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = changed(whole[0], fields | {"run_dir": str(tmp_path / "run"), "data.manual_dir": str(data)})
    assert run_training(config) == 2
    assert message in capsys.readouterr().err


def test_a_reward_model_of_other_sizes_or_items_is_refused(whole, tmp_path, capsys):
    start = {
        "run_dir": str(tmp_path / "run"),
        "start_from": whole[0].run_dir,
        "evaluator.steps": 0,
        "pointwise.steps": 0,
        "eval.versus": "goalrank",
    }
    assert run_training(changed(whole[0], start | {"network.mlp_size": 16})) == 2
    assert "holds another ranker: mlp_size: 8 -> 16" in capsys.readouterr().err
    other = tmp_path / "data"
    other.mkdir()
    write_lists(other, train=20, validation=4, test=2, seed=5)
    assert run_training(changed(whole[0], start | {"data.manual_dir": str(other)})) == 2
    assert "numbers other items" in capsys.readouterr().err and not (tmp_path / "run").exists()
    elsewhere = shutil.copytree(whole[0].run_dir, tmp_path / "elsewhere")
    described = json.loads((elsewhere / "items.json").read_text())
    described["counts"][0] += 1
    (elsewhere / "items.json").write_text(json.dumps(described))
    assert run_training(changed(whole[0], start | {"start_from": str(elsewhere)})) == 2
    assert f"{elsewhere} was trained on other queries" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_start_may_be_read_by_more_stages_later(whole, tmp_path):
    """And is recorded with what they take from it; another start under its name is still noticed."""
    first = {"run_dir": str(tmp_path), "start_from": whole[0].run_dir, "eval.versus": "goalrank"}
    first |= {f"{name}.steps": 0 for name in TRAINED if name != "goalrank"}
    config = changed(whole[0], first)
    directory.record_start(tmp_path, config)
    more = changed(config, {"grpo.starts_from": "imitation", "grpo.steps": 4})
    assert directory.lacking_start(tmp_path, more) == ""
    directory.record_start(tmp_path, more)
    record = json.loads((tmp_path / "start.json").read_text())
    assert {"seed", "evaluator", "pointwise", "imitation"} == set(record["mark"])
    record["mark"]["evaluator"]["best_step"] += 1
    (tmp_path / "start.json").write_text(json.dumps(record))
    assert "is not, or no more, the run" in directory.lacking_start(tmp_path, more)


def test_an_item_that_was_never_numbered_is_named(whole, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    line = json.loads((Path(whole[0].data.manual_dir) / "validation.jsonl").read_text().splitlines()[0])
    line["candidates"][1]["id"], line["logged"] = "new", []
    (data / "validation.jsonl").write_text(json.dumps(line) + "\n")
    command = [whole[0].run_dir, "--data.manual-dir", str(data), "--data.prepared-dir", str(tmp_path / "prepared")]
    assert evaluation.main(command) == 2
    assert "item 'new' of its candidates is not in the catalogue" in capsys.readouterr().err
