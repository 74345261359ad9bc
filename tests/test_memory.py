"""The memory that a stage needs: counted as arrays take it, told in the plan, refused where it is not there."""

import types
from pathlib import Path

import jax
import numpy as np
import pytest
from one_step import build
from tiny import changed

import train
from fgrpo_jax.config import ConfigError
from fgrpo_jax.models import decoder
from fgrpo_jax.models.families import FAMILIES
from fgrpo_jax.models.memory import activations
from fgrpo_jax.policies.llm import sampling
from fgrpo_jax.policies.llm.query import Query
from fgrpo_jax.run import host_memory, memory
from fgrpo_jax.run.checks import check_training
from fgrpo_jax.run.experiment import assemble, plan
from fgrpo_jax.types import Rollout, num_params


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return build(tmp_path_factory.mktemp("memory"))


def having(patch, size):
    patch.setattr(memory, "of_device", lambda device: size)


def with_fields(experiment, **fields):
    config = changed(experiment.config, {name.replace("__", "."): value for name, value in fields.items()})
    return assemble(config, experiment.dataset, Path(config.run_dir))


@pytest.mark.parametrize("dtype, kl_weight", [("float32", 0.0), ("bfloat16", 0.1)])
def test_parameters_and_moments_are_counted_as_they_lie(experiment, dtype, kl_weight):
    """Against the train state itself."""
    experiment = with_fields(experiment, model__param_dtype=dtype, rl__objective__kl_weight=kl_weight)
    policy = experiment.policy("rl")
    *_, optimizer, _ = train.make_step(experiment, policy, experiment.config.rl)
    state = jax.eval_shape(optimizer.init, policy.shapes())
    moments = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)
    parameters = num_params(policy.table) * jax.numpy.dtype(dtype).itemsize
    assert memory.state(experiment, "rl") == {
        "parameters": parameters * (2 if kl_weight else 1),
        "moments": moments,
    }


def test_parameters_are_split_over_fsdp(experiment):
    """A device of four holds a quarter of what is split, and all of the norms."""
    mesh = jax.sharding.AbstractMesh((1, 4, 1), ("data", "fsdp", "tensor"))
    table = experiment.policy("rl").table
    here, norms = memory.state(experiment._replace(mesh=mesh), "rl"), 0
    for name, p in table["layers"].items():
        norms += 4 * int(jax.numpy.prod(jax.numpy.array(p.shape))) if "norm" in name else 0
    norms += 4 * table["final_norm"].shape[0]
    whole = 4 * num_params(table)
    assert here["parameters"] == (whole - norms) // 4 + norms


def test_what_does_not_fit_is_refused_with_the_fields_that_help(experiment, tmp_path, monkeypatch):
    need = sum(memory.state(experiment, "sft").values())
    having(monkeypatch, need)
    check_training(experiment, tmp_path)
    having(monkeypatch, need - 1)
    with pytest.raises(ConfigError, match=r"sft: parameters .*set model.param_dtype='bfloat16', or a larger mesh.fsdp"):
        check_training(experiment, tmp_path)
    having(monkeypatch, None)  # a device that does not tell
    check_training(experiment, tmp_path)


def test_the_plan_tells(experiment, monkeypatch):
    having(monkeypatch, 2**30)
    told = [line.strip() for line in plan(experiment).splitlines() if "memory of a device" in line]
    assert len(told) == 2 and all(" of 1.0 GiB (parameters " in line for line in told)
    assert "caches" not in told[0] and "caches" in told[1]  # nothing is decoded in SFT
    having(monkeypatch, 2**10)
    assert "may not fit: more sft.microbatches, fewer sft.batch_queries, model.remat=True" in plan(experiment)


def test_microbatches_and_remat_lessen_what_is_kept(experiment):
    query = experiment.policy("rl").encode(experiment.dataset.splits["train"][1:9])

    def kept(microbatches=1, **fields):
        return with_fields(experiment, **fields).policy("rl").footprint.beside(query, 8, 4, microbatches, 1)

    usual = kept()
    assert kept(4)["activations"] == usual["activations"] / 4 and kept(4)["caches"] == usual["caches"]
    tokens, of_projections = 8 * (16 + 4 * 8), 8 + (2 * 2 + 2 * 2) * 4 + 2 * 8  # of one layer, kept or not
    assert usual["activations"] - kept(model__remat=True)["activations"] == tokens * of_projections * 4
    of_token = 2 * 2 * 4  # keys and values of two heads of four
    assert usual["caches"] == tokens * of_token * 4
    assert usual["copies"] == 4 * num_params(experiment.policy("rl").table)  # gathered and cast to decode with
    assert kept(model__dtype="bfloat16")["copies"] == usual["copies"] / 2


def test_recurrent_layers_are_told_as_compiled_programs_have_them(grammar):
    """In bfloat16, of which they make float32: what the gradient of log-probabilities keeps, within a third."""
    layers = {"pattern": (decoder.DELTA, decoder.FULL), "delta": (2, 4, 16, 16, 4), "rotary_fraction": 0.25}
    spec = decoder.DecoderSpec(64, 32, 7, 4, 2, 8, 64, remat=True, dtype="bfloat16", **FAMILIES["qwen3_5_text"].spec)
    spec, sampler_grammar = spec._replace(**layers), grammar._replace(slate_min=10, slate_max=10)
    queries, prompt, group, pool = 4, 64, 4, 20
    length = sampler_grammar.length(pool, 2)

    def zeros(*shape, dtype=np.int32):
        return np.zeros(shape, dtype)

    query = Query(
        zeros(queries, prompt), zeros(queries), zeros(queries, pool, 2), zeros(queries, pool, dtype=np.float32),
        zeros(queries),
    )  # fmt: skip
    rollout = Rollout(*(zeros(queries, group, length, dtype=dtype) for dtype in (np.int32, np.int32, np.float32)))
    sampler = sampling.Sampler(spec, sampler_grammar, True)
    gradient = jax.jit(jax.grad(lambda params: sampling.logprobs(sampler, params, query, rollout).sum()))
    keeps = gradient.lower(decoder.shapes(spec)).compile().memory_analysis().temp_size_in_bytes
    assert activations(spec, queries, prompt, group, length) == pytest.approx(keeps, rel=0.33)


def test_a_cpu_has_its_share_of_what_is_available(monkeypatch):
    cpu = jax.devices()[0]
    for found, share in ((1000 * 1024, 1000 * 1024 // jax.local_device_count()), (0, 0), (None, None)):
        monkeypatch.setattr(host_memory, "available", lambda found=found: found)
        assert memory.of_device(cpu) == share
    told = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 7}, platform="gpu")
    assert memory.of_device(told) == 7


def machine(folder, groups, files):
    """Directories as /proc and /sys/fs/cgroup, 1,000 KiB available."""
    for name, text in {
        "proc/meminfo": "MemTotal: 2000 kB\nMemAvailable: 1000 kB\n",
        "proc/self/cgroup": groups,
        **files,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "proc", folder / "sys"


def group(folder, version, limit, used, cached=0):
    limit_name, used_name, cached_name = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    return {
        f"{folder}/{limit_name}": f"{limit}\n",
        f"{folder}/{used_name}": f"{used}\n",
        f"{folder}/memory.stat": f"anon 1\n{cached_name} {cached}\n",
    }


@pytest.mark.parametrize(
    "groups, files, expected",
    [
        ("", {}, 1024_000),
        ("0::/\n", {}, 1024_000),  # the outermost group says nothing
        ("0::/job\n", group("sys/job", 2, "max", 5), 1024_000),
        ("0::/job\n", group("sys/job", 2, 700_000, 300_000, 100_000), 500_000),
        ("0::/job\n", group("sys/job", 2, 700_000, 800_000), 0),
        ("0::/slice/job\n", group("sys/slice/job", 2, "max", 5) | group("sys/slice", 2, 9_000, 1_000), 8_000),
        ("0::/away/of/the/host\n", group("sys", 2, 9_000, 1_000), 8_000),  # a container sees its own group as the root
        ("4:cpu,memory:/job\n0::/\n", group("sys/memory/job", 1, 60_000, 50_000, 10_000), 20_000),
        ("4:memory:/job\n", group("sys/memory/job", 1, 2**63 - 4096, 5), 1024_000),  # no limit
        ("4:memory:/of/host\n", group("sys/memory", 1, 60_000, 50_000), 10_000),
    ],
)  # fmt: skip
def test_a_control_group_leaves_less_than_the_machine_has(groups, files, expected, tmp_path):
    assert host_memory.available(*machine(tmp_path, groups, files)) == expected


def test_a_system_that_does_not_say_what_it_has(tmp_path):
    assert host_memory.available(tmp_path / "proc", tmp_path / "sys") is None
