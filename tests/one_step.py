"""Two steps of a stage through train.make_step; as a script, on a mesh of simulated devices.

python one_step.py FOLDER DATA FSDP TENSOR OUT.npz
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}

import jax
import jax.numpy as jnp
import numpy as np
from tiny import changed, tiny_config, write_world

import train
from fgrpo_jax.data import datasets
from fgrpo_jax.data.batches import make_batches
from fgrpo_jax.run.experiment import KNOWN, assemble, encode, initial_params, random_key
from fgrpo_jax.run.validation import validate
from fgrpo_jax.stages import stages
from fgrpo_jax.types import TrainState


def build(folder, **fields):
    """The experiment of a tiny world in `folder`, which is made where it is not there yet."""
    data = Path(folder) / "data"
    if not data.is_dir():
        data.mkdir()
        write_world(data)
    config = tiny_config(data, Path(folder) / "prepared", Path(folder) / "run", sft_steps=2, rl_steps=2)
    config = changed(config, {name.replace("__", "."): value for name, value in fields.items()})
    validate(config, KNOWN)
    return assemble(config, datasets.load(config.data), Path(config.run_dir))


def two_steps(experiment, name):
    """(state, the last batch, a row of metrics per step, how often the update was compiled)."""
    config = experiment.config
    stage, policy = stages(config)[name], experiment.policy(name)
    collect, update, optimizer, places = train.make_step(experiment, policy, stage)
    params = initial_params(experiment, policy)
    frozen = {"reference": jax.tree.map(jnp.copy, params)}
    frozen |= {other: initial_params(experiment, experiment.policy(other)) for other in stage.frozen_from}
    state = jax.jit(lambda p: TrainState(jnp.int32(0), p, optimizer.init(p)), out_shardings=places)(params)
    batches = make_batches(experiment.dataset, config, name, stage)
    seen = []
    for step in range(2):
        query = encode(experiment, policy, batches.batch_at(step))
        batch, described = collect(state.params, frozen, query, random_key(config.seed, name, "rollout", step))
        state, metrics = update(state, frozen, batch)
        seen.append({key: mean.value() for key, mean in (described | metrics).items()})
    return state, batch, seen, update._cache_size()


def numbers(steps):
    """{stage: what `two_steps` returned} -> every number in it, by name."""
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(steps)}


def main(folder, data, fsdp, tensor, out):
    experiment = build(folder, mesh__data=int(data), mesh__fsdp=int(fsdp), mesh__tensor=int(tensor))
    assert len(jax.devices()) == 8
    steps = {name: two_steps(experiment, name) for name in ("sft", "rl")}
    shardings = experiment.shardings(experiment.policy("rl"))
    for state, *_, compiled in steps.values():
        assert compiled == 1, "the second step compiled again: its state lies elsewhere than the first one's"
        (moments,) = (x for x in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(x))
        for tree in (state.params, moments.mu, moments.nu):
            jax.tree.map(_check_place, tree, shardings)
    np.savez(out, **numbers(steps))


def _is_adam(x):
    return hasattr(x, "mu")


def _check_place(x, place):
    assert x.sharding.is_equivalent_to(place, x.ndim), (x.shape, x.sharding, place)


if __name__ == "__main__":
    main(*sys.argv[1:])
