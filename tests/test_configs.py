"""The configurations that come along: all of them are possible, and their variants what they say."""

import dataclasses
import runpy

import pytest
from tiny import ROOT, changed

from fgrpo_jax.config import ConfigError
from fgrpo_jax.config_files import differences, from_json, load_file, to_json
from fgrpo_jax.run.experiment import KNOWN
from fgrpo_jax.run.validation import validate
from fgrpo_jax.stages import stages

STAGE_SIZES = ("steps", "batch_queries", "microbatches", "eval_every")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_the_configs_that_come_along_are_possible(path):
    config = load_file(path)
    validate(config, KNOWN)
    assert from_json(to_json(config)) == config
    assert "python train.py" in runpy.run_path(str(path))["__doc__"]


def test_every_variant_of_the_studies_is_possible():
    """And differs from the others; the files' own rule for names is followed by get_config alone."""
    path = ROOT / "configs" / "goalrank_study.py"
    study = runpy.run_path(str(path))
    names = study["VARIANTS"]
    found = [load_file(f"{path}:{name}") for name in names]
    for config in found:
        validate(config, KNOWN)
    assert len({to_json(dataclasses.replace(config, run_dir="")) for config in found}) == len(names) - 1
    assert changed(load_file(f"{path}:group_20"), {"run_dir": ""}) == changed(load_file(path), {"run_dir": ""})
    for name, config in zip(names, found, strict=True):
        trained = {stage for stage, fields in stages(config).items() if fields.steps}
        if name in study["PARTS"]:
            assert config.start_from == "runs/goalrank" and trained in ({"goalrank"}, {"goalrank", "grpo"})
        else:
            growing = {"evaluator", "pointwise", "imitation", "generators", "goalrank"}
            few = {"evaluator", "generators"} if name in ("mg_e_100", "longer_generators") else growing
            assert not config.start_from and trained == few
    with pytest.raises(ConfigError, match="goalrank_study.py: 'x' is not one of as_it_is, no_proposals"):
        load_file(f"{path}:x")
    with pytest.raises(ConfigError, match=r"jsonl.py: get_config\(\) failed: .* takes 0 positional"):
        load_file(f"{ROOT / 'configs' / 'jsonl.py'}:x")


def test_every_variant_of_the_default_is_possible():
    """Each differs from the others; those of credit in `rl` alone, with the start of the run that they name."""
    path = ROOT / "configs" / "synthetic_study.py"
    study = runpy.run_path(str(path))
    found = {name: load_file(f"{path}:{name}") for name in study["VARIANTS"]}
    for config in found.values():
        validate(config, KNOWN)
    assert len({to_json(dataclasses.replace(config, run_dir="")) for config in found.values()}) == len(found)
    default = load_file(ROOT / "configs" / "synthetic.py")
    for name, config in found.items():
        changes = {field.split(".")[0] for field in differences(default, config)} - {"run_dir"}
        if name in study["FROM_SFT"]:
            assert changes <= {"start_from", "sft", "rl"} and config.start_from == default.run_dir
            assert set(differences(changed(default, {"sft.steps": 0}).sft, config.sft, "sft")) == set()
        else:
            assert changes <= {"data", "sft", "rl"} and not config.start_from
    with pytest.raises(ConfigError, match="synthetic_study.py: there is no variant 'x', only as_it_is, grpo"):
        load_file(f"{path}:x")
    small, joint = (load_file(f"{path}:pool_40{credit}") for credit in ("", "+grpo"))
    validate(joint, KNOWN)
    assert joint.start_from == small.run_dir and joint.rl.credit == found["grpo"].rl.credit
    assert set(differences(small, joint)) == {"run_dir", "start_from", "sft.steps", "rl.credit.terms"}
    for wrong in ("x+grpo", "pool_40+x", "grpo+exact", "pool_40+", "+grpo", "+"):
        with pytest.raises(ConfigError, match="there is no variant"):
            load_file(f"{path}:{wrong}")


@pytest.mark.parametrize("pool, size, wanted", [("hundred", 100, 5), ("converged", 100, 5), ("twenty", 20, 1)])
def test_credits_are_compared_on_films(pool, size, wanted):
    path = ROOT / "configs" / "ml1m_study.py"
    start, exact, more = (load_file(f"{path}:{pool}{credit}") for credit in ("", "+exact", "+more_sft"))
    labels = load_file(f"{path}:{pool}+labels")
    for config in (start, exact, more, labels):
        validate(config, KNOWN)
    assert labels.rl.batch_queries * labels.rl.group_size == exact.rl.batch_queries * exact.rl.group_size
    assert (start.data.pool_size, start.data.interactions.targets) == (size, wanted)
    assert set(differences(start, exact)) == {"run_dir", "start_from", "sft.steps", "rl.credit.scheme"}
    assert exact.start_from == start.run_dir and more.rl.source == "logged"
    whole = pool == "converged"
    assert (start.sft.steps, start.sft.subset) == ((5000, (0.0, 1.0)) if whole else (1500, (0.0, 0.5)))
    assert start.rl.subset == exact.rl.subset == more.rl.subset == ((0.0, 1.0) if whole else (0.5, 1.0))
    with pytest.raises(ConfigError, match="no variant 'x', only hundred, converged, twenty"):
        load_file(f"{path}:x")


def test_the_pretrained_model_is_compared_with_its_like_from_random_weights():
    pretrained, scratch = (load_file(f"{ROOT / 'configs' / 'smollm2.py'}{x}") for x in ("", ":scratch"))
    validate(scratch, KNOWN)
    others = {name for name in differences(pretrained, scratch) if not name.startswith("model.")}
    assert others == {"run_dir", "rl.optim.learning_rate", "sft.optim.learning_rate"}
    assert pretrained.model.checkpoint == "smollm2" and not scratch.model.checkpoint
    with pytest.raises(ConfigError, match="no variant 'x', only scratch"):
        load_file(f"{ROOT / 'configs' / 'smollm2.py'}:x")


@pytest.mark.parametrize("name", ["qwen", "musique"])
def test_adapters_differ_from_the_whole_model_in_what_suits_them(name):
    path = ROOT / "configs" / f"{name}.py"
    whole, adapters = load_file(f"{path}"), load_file(f"{path}:lora")
    for config in (whole, adapters):
        validate(config, KNOWN)
    assert set(differences(whole, adapters)) == {
        "run_dir", "prompt.chat", "model.lora.rank", "model.lora.base_dtype",
        "sft.optim.learning_rate", "rl.optim.learning_rate",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="no variant 'x', only lora"):
        load_file(f"{path}:x")


@pytest.mark.parametrize("name", ["ml1m", "hotpotqa", "musique"])
def test_it_is_configured_for_real_data_on_either_machine(name):
    path = ROOT / "configs" / "smollm2_real.py"
    cores, gpu = (load_file(f"{path}:{name}{machine}") for machine in ("", "_gpu"))
    for config in (cores, gpu):
        validate(config, KNOWN)
        assert config.reward.k == config.transcript.rank_max and config.model.lora.rank
    changes = {
        "run_dir",
        "model.dtype",
        "model.lora.base_dtype",
        "eval.batch_queries",
        "eval.queries",
        "eval.train_queries",
    }
    sizes = {f"{stage}.{field}" for stage in ("sft", "rl") for field in STAGE_SIZES}
    shapes = {"data.prompt_buckets", "transcript.identifier_width"}
    assert set(differences(cores, gpu)) <= changes | sizes | shapes
    assert gpu.data.prompt_buckets[-1] >= cores.data.prompt_buckets[-1]
    with pytest.raises(ConfigError, match="no variant 'films', only ml1m, hotpotqa, musique, and each with _gpu"):
        load_file(f"{path}:films")
