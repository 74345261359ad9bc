"""Runs of adapters, which train, keep and hand on nothing else."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bpe import train_bpe
from helpers import quick_runs, random_params, run_on_8_devices
from tiny import ROOT, changed, rows, run_training, tiny_config, write_world

import eval as evaluation
from fgrpo_jax.config import ConfigError, LoraConfig
from fgrpo_jax.export import export
from fgrpo_jax.models import decoder, head, hf, lora
from fgrpo_jax.models.lora import Lora
from fgrpo_jax.policies.llm.validation import problems
from fgrpo_jax.run import directory, memory
from fgrpo_jax.run.checkpoint import Checkpoints
from fgrpo_jax.run.experiment import assemble
from fgrpo_jax.run.finished import prompts_of
from fgrpo_jax.run.ranking import Ranker
from fgrpo_jax.types import map_params, num_params

ALL = LoraConfig().projections
SPEC = decoder.DecoderSpec(
    vocab_size=262, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_size=8,
    norm_eps=1e-5, init_std=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint, another one, and a finished run of adapters on the first: SFT, then F-GRPO with a KL term."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "data").mkdir()
    write_world(folder / "data", train=8, validation=4, test=1)
    tokenizer = train_bpe(["bytes alone"], SPEC.vocab_size)
    for name, seed in (("first", 0), ("other", 1)):
        params = random_params(SPEC, seed)
        hf.save(folder / name, SPEC, params, {"model_type": "qwen3"}, tokenizer)
    config = changed(
        tiny_config(folder / "data", folder / "prepared", folder / "run", sft_steps=2, rl_steps=4),
        {
            "model.checkpoint": str(folder / "first"),
            "model.lora.rank": 2,
            "model.lora.base_dtype": "bfloat16",
            "tokenizer": str(folder / "first"),
            "transcript.identifier": "index",
            "transcript.separator": " > ",
            "data.prompt_buckets": (256,),
            "eval.baselines": ("random",),
            "eval.transcripts": 1,  # which read the base too
            "sft.eval_every": 2,
            "rl.eval_every": 2,
            "rl.group_size": 2,
            "rl.objective.kl_weight": 0.1,
        },
    )
    with quick_runs():
        assert run_training(config) == 0
    return folder, config


@pytest.fixture
def copied(made, tmp_path, monkeypatch):
    """The run elsewhere, its checkpoint out of sight."""
    folder, config = made
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.move(folder / "first", folder / "hidden")
    yield folder, tmp_path / "run", changed(config, {"run_dir": str(tmp_path / "run")})
    shutil.move(folder / "hidden", folder / "first")


def test_checkpoints_hold_adapters_and_their_moments_alone(made):
    folder, _ = made
    with Checkpoints(folder / "run" / "rl" / "checkpoints", 1, read_only=True) as checkpoints:
        tree = checkpoints._manager.item_metadata(4)["state"].tree
    sizes = {x.shape for x in jax.tree.leaves(tree) if x.shape}
    assert all(2 in shape[1:] for shape in sizes), sizes  # the rank
    names = {
        "/".join(str(getattr(k, "key", k)) for k in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(tree["params"])
    }
    assert names == {f"layers/{name}/{part}" for name in ALL for part in "ab"}


def test_a_stopped_run_goes_on_to_the_bit(made, tmp_path):
    folder, config = made
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "rl" / "checkpoints" / "4")
    (tmp_path / "run" / "rl" / "done.json").unlink()
    with quick_runs():
        assert run_training(changed(config, {"run_dir": str(tmp_path / "run")})) == 0
    ours, theirs = (directory.read_done(place, "rl") for place in (tmp_path / "run", folder / "run"))
    assert ours == theirs
    both = [
        (place / "eval" / "validation" / "per_query.jsonl").read_bytes() for place in (tmp_path / "run", folder / "run")
    ]
    assert both[0] == both[1]


def test_a_stopped_run_goes_on_with_no_other_base(copied, capsys):
    """Nor does a stage that takes its parameters from no other one, and so from no finished run."""
    folder, run, config = copied
    shutil.rmtree(run / "rl")
    (run / "sft" / "done.json").unlink()
    (run / "base").symlink_to(folder / "other")
    before = sorted(path.name for path in (run / "sft").rglob("*"))
    assert run_training(config) == 2
    assert f"and {run / 'base'} has other weights" in capsys.readouterr().err
    assert sorted(path.name for path in (run / "sft").rglob("*")) == before


def test_a_moved_run_asks_for_its_base_and_takes_no_other(copied, capsys):
    folder, run, _ = copied
    assert evaluation.main([str(run)]) == 2
    assert f"is not there: put that checkpoint, or a link to it, at {run / 'base'}" in capsys.readouterr().err
    (run / "base").symlink_to(folder / "other")
    assert evaluation.main([str(run)]) == 2
    assert f"{folder / 'first'}, and {run / 'base'} has other weights" in capsys.readouterr().err
    (run / "base").unlink()
    (run / "base").symlink_to(folder / "hidden")
    before = json.loads((run / "eval" / "validation" / "metrics.json").read_text())
    with quick_runs():
        assert evaluation.main([str(run)]) == 0
    assert json.loads((run / "eval" / "validation" / "metrics.json").read_text()) == before


def test_adapters_of_another_base_are_no_start(made, tmp_path, capsys):
    folder, config = made
    other = {"start_from": str(folder / "run"), "run_dir": str(tmp_path / "run"), "sft.steps": 0}
    assert run_training(changed(config, other | {"model.checkpoint": str(folder / "other")})) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: start_from: ") and f"and {folder / 'other'} has other weights" in said


def test_an_export_ranks_as_the_run_does(made, tmp_path):
    """Merged weights are written in the adapters' type: in the base's own they would be rounded."""
    folder, config = made
    export(str(folder / "run"), str(tmp_path / "model"))
    query = json.loads((folder / "data" / "test.jsonl").read_text().splitlines()[0])
    with quick_runs():
        ours, theirs = (Ranker.open(place).rank_batch([query])[0] for place in (folder / "run", tmp_path / "model"))
    assert ours[:6] == theirs[:6] and ours.logp == pytest.approx(theirs.logp, abs=1e-4)
    with pytest.raises(ConfigError, match="form='lora': this run has only model, adapter"):
        export(str(folder / "run"), str(tmp_path / "else"), form="lora")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_peft_computes_what_the_run_does(made, tmp_path):
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    peft = pytest.importorskip("peft", reason="the parity extra is not installed")
    import transformers

    folder, config = made
    export(str(folder / "run"), str(tmp_path / "adapter"), form="adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "first", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    prompt = np.random.default_rng(0).integers(0, SPEC.vocab_size, (1, 7))
    actions = np.random.default_rng(1).integers(0, SPEC.vocab_size, (1, 1, 5))
    with torch.no_grad():
        logits = model(torch.tensor(np.concatenate([prompt, actions[0]], 1))).logits[0, 6:-1]
    wanted = torch.log_softmax(logits, -1).numpy()[np.arange(5), actions[0, 0]]

    spec = SPEC._replace(init_std=0.02, lora=Lora(2, 32.0, ALL), logit_chunk=8)
    with Checkpoints(folder / "run" / "rl" / "checkpoints", 1, read_only=True) as checkpoints:
        best = directory.read_done(folder / "run", "rl")["best_step"]
        _, table = lora.split(decoder.param_table(spec))
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = map_params(lambda p: jax.ShapeDtypeStruct(p.shape, "float32", sharding=here), table)
        adapters = checkpoints.restore_part(best, {"params": shapes})["params"]
    base = hf.load(folder / "first", spec._replace(lora=None))
    params = decoder.whole_ends(spec, lora.join(base, adapters, spec.lora))
    hidden = decoder.completions(spec, params, jnp.asarray(prompt), jnp.array([7]), jnp.asarray(actions))
    found = head.action_logprobs(spec, params, hidden, jnp.asarray(actions))[0, 0]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert max(np.abs(adapter["b"]).max() for adapter in adapters["layers"].values()) > 0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model.lora.rank": -1}, "model.lora.rank=-1: choose at least 1, or 0 to train the whole model"),
        ({"model.checkpoint": ""}, "model.lora.rank=2 needs model.checkpoint"),
        ({"model.lora.alpha": 0.0}, "model.lora.alpha=0.0 must be positive"),
        ({"model.lora.projections": ()}, "must name at least one weight"),
        ({"model.lora.projections": ("q", "q")}, "each once"),
        (
            {"model.lora.rank": 0},
            "model.lora.base_dtype: 'float32' -> 'bfloat16': only adapters read it; set model.lora",
        ),
    ],
)
def test_impossible_adapters_are_refused(made, fields, message):
    _, config = made
    (found,) = problems(changed(config, fields))
    assert message in found


def test_a_rank_that_a_projection_cannot_have_is_refused(made, tmp_path, capsys):
    _, config = made
    fields = {"run_dir": str(tmp_path / "run"), "model.lora.rank": 5}
    assert run_training(changed(config, fields)) == 2
    assert "model.lora.rank=5: projection 'k' of this checkpoint has no rank above 4" in capsys.readouterr().err
    without = {"model.lora.projections": ("q", "o", "gate"), "sft.steps": 1, "rl.steps": 0}
    with quick_runs():
        assert run_training(changed(config, fields | without)) == 0
    assert "note: model.lora.rank" not in capsys.readouterr().out


def test_projections_that_a_checkpoint_lacks_are_refused(made, tmp_path, capsys):
    _, config = made
    fields = {"run_dir": str(tmp_path / "run"), "model.lora.projections": ("q", "delta_qkv", "delta_o")}
    assert run_training(changed(config, fields)) == 2
    said = capsys.readouterr().err
    assert "model.lora.projections: this checkpoint has no delta_qkv and no delta_o in any layer" in said


def test_a_whole_checkpoint_trained_at_the_rate_of_adapters_is_said(made, tmp_path, capsys):
    folder, config = made
    fields = {"run_dir": str(tmp_path / "run"), "model.lora.rank": 0, "model.lora.base_dtype": "float32"}
    with quick_runs():
        assert run_training(changed(config, fields | {"sft.steps": 1, "rl.steps": 0})) == 0
    said = (
        f"note: model.lora.rank=0 trains all parameters of {folder / 'first'}: rates such as sft.optim.learning_rate="
    )
    assert said in capsys.readouterr().out


def test_adapters_at_the_rate_of_a_whole_checkpoint_and_a_base_in_float32_are_said(made, tmp_path, capsys):
    folder, config = made
    fields = {"run_dir": str(tmp_path / "run"), "sft.optim.learning_rate": 1e-6, "sft.steps": 1, "rl.steps": 0}
    with quick_runs():
        assert run_training(changed(config, fields)) == 0
    said = capsys.readouterr().out
    assert "rates such as sft.optim.learning_rate=1e-06 are meant for whole checkpoints" in said
    assert "base_dtype" not in said
    wide = {"model.dtype": "bfloat16", "model.lora.base_dtype": "float32", "run_dir": str(tmp_path / "wide")}
    with quick_runs():
        assert run_training(changed(config, fields | wide | {"sft.optim.learning_rate": 1e-3})) == 0
    said = capsys.readouterr().out
    assert "note: model.lora.base_dtype='float32' keeps weights" in said and "rates such as" not in said


def test_a_run_keeps_its_adapters(made, capsys):
    folder, config = made
    assert run_training(changed(config, {"model.lora.rank": 3})) == 2
    assert "model.lora.rank: 2 -> 3" in capsys.readouterr().err
    assert directory.read_config(folder / "run").model.lora.rank == 2


def test_the_reference_of_a_kl_term_is_the_start_or_the_base(made, tmp_path):
    """One step of F-GRPO from the adapters of SFT, which differ from the base, and from new ones, which do not."""
    folder, config = made
    one = {"rl.steps": 1, "rl.eval_every": 1, "log_every": 1, "eval.versus": "random"}
    after_sft, kl = {"sft.steps": 0, "start_from": str(folder / "run")}, {}
    for name, fields in {
        "start": after_sft,
        "base": after_sft | {"rl.objective.kl_reference": "base"},
        "new": {"sft.steps": 0, "rl.objective.kl_reference": "base"},
    }.items():
        with quick_runs():
            assert run_training(changed(config, one | fields | {"run_dir": str(tmp_path / name)})) == 0
        (kl[name],) = (row["kl"] for row in rows(tmp_path / name) if "kl" in row)
    assert abs(kl["start"]) < 1e-6 and abs(kl["new"]) < 1e-6 and kl["base"] > 1e-5, kl
    run_on_8_devices(ON_A_MESH.format(root=str(ROOT), run=str(tmp_path / "base")))
    (on_a_mesh,) = (row["kl"] for row in rows(tmp_path / "base_mesh") if "kl" in row)
    assert on_a_mesh == pytest.approx(kl["base"], rel=1e-3)


ON_A_MESH = """
    import sys
    sys.path[:0] = [{root!r}, {root!r} + "/tests"]
    from pathlib import Path
    import jax
    import eval as evaluation
    from fgrpo_jax.run import directory
    from tiny import changed, run_training

    jax.config.update("jax_disable_most_optimizations", True)
    evaluation.evaluate_run = lambda *paths: None
    mesh = {{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}}
    config = directory.read_config(Path({run!r}))
    assert run_training(changed(config, mesh | {{"run_dir": {run!r} + "_mesh"}})) == 0
"""


def test_the_base_as_reference_needs_adapters_a_term_and_no_memory(made, tmp_path, capsys):
    folder, config = made
    base = changed(config, {"rl.objective.kl_reference": "base"})
    experiment = assemble(base, prompts_of(base, folder / "run"), folder / "run")
    without = assemble(changed(config, {"rl.objective.kl_weight": 0.0}), experiment.dataset, folder / "run")
    assert memory.state(experiment, "rl") == memory.state(without, "rl")
    whole = {"model.lora.rank": 0, "model.lora.base_dtype": "float32", "run_dir": str(tmp_path / "run")}
    for fields, message in (
        (whole, "rl.objective.kl_reference='base' is of adapters, and llm trains all parameters"),
        ({"rl.objective.kl_weight": 0.0}, "kl_reference='base': only a KL term reads it; set rl.objective.kl_weight"),
    ):
        assert run_training(changed(base, fields)) == 2
        assert message in capsys.readouterr().err


def test_the_base_is_counted_in_its_own_type(made):
    folder, config = made
    experiment = assemble(config, prompts_of(config, folder / "run"), folder / "run")
    policy = experiment.policy("sft")
    trained, of_base = num_params(policy.table), num_params(policy.base.table)
    assert memory.state(experiment, "sft") == {"parameters": 4 * trained + 2 * of_base, "moments": 8 * trained}
    assert memory.state(experiment, "rl")["parameters"] == 8 * trained + 2 * of_base  # and a reference
