"""What devices exchange, counted in the compiled programs of a step on eight simulated devices.

Between shards of the queries only parameters, their gradients and scalars cross, each as often
as it must; inside the decoding loop only what tensor parallelism needs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import simulated

SCALARS = 1024  # bytes: sums of rewards, losses, norms
PARTS = {"rl__microbatches": 2}
FREE = {"transcript__constrained": False, "rl__objective__kl_weight": 0.1, "rl__objective__epochs": 2}
HYBRID = {"model__family": "qwen3_5_text", "model__num_layers": 4, "model__head_dim": 8, "model__delta": [2, 4, 8, 6]}
CASES = {  # data, fsdp, tensor
    "data 8": ((8, 1, 1), {}),
    "fsdp 8": ((1, 8, 1), PARTS),
    "fsdp 4 x tensor 2, jumping ahead": ((1, 4, 2), PARTS | {"tokenizer": "words", "data__prompt_buckets": (32,)}),
    "fsdp 4 x tensor 2, recurrent layers": ((1, 4, 2), PARTS | HYBRID),
    "data 2 x fsdp 2 x tensor 2, free, with a reference": ((2, 2, 2), FREE),
}
BATCH = 16
# Machine code that is quick to make; what devices exchange is decided before.
FLAGS = f"{simulated(8)} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

SCRIPT = """
import dataclasses, json, sys
from pathlib import Path
from tempfile import TemporaryDirectory
import jax, jax.numpy as jnp
from one_step import build
import train
from fgrpo_jax.bench import hlo
from fgrpo_jax.data.batches import make_batches
from fgrpo_jax.policies.llm import files
from fgrpo_jax.policies.llm import policy as llm
from fgrpo_jax.run.experiment import encode, initial_params, random_key
from fgrpo_jax.types import Param, TrainState

sizes, batch, fields = json.loads(sys.argv[1])
fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
mesh = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), sizes))
model = dict(model__hidden_size=16, model__num_layers=3, model__mlp_size=24)
with TemporaryDirectory() as folder:
    experiment = build(folder, rl__batch_queries=batch, **mesh, **(model | fields))
    config, dataset, folder = experiment.config, experiment.dataset, Path(experiment.config.run_dir)
    spec = files.make_spec(config.model, 256, folder)  # a vocabulary of which every mesh here has equal parts
    tokenizer = files.load_tokenizer(config, dataset, folder)
    policy = llm.make(config, spec, tokenizer, dataset.kind, dataset.instruction)
    experiment, stage = experiment._replace(policies={"llm": policy}), config.rl
    collect, update, optimizer, places = train.make_step(experiment, policy, stage)
    params = initial_params(experiment, policy)
    frozen = {"reference": params} if stage.objective.kl_weight else {}
    state = jax.jit(lambda p: TrainState(jnp.int32(0), p, optimizer.init(p)), out_shardings=places)(params)
    batches = make_batches(experiment.dataset, experiment.config, "rl", stage)
    query = encode(experiment, policy, batches.batch_at(0))
    collected = collect.lower(params, frozen, query, random_key(0, "rl", "rollout", 0)).compile()
    made, _ = collected(params, frozen, query, random_key(0, "rl", "rollout", 0))
    programs = {"collect": collected, "update": update.lower(state, frozen, made).compile()}

leaves = jax.tree_util.tree_leaves_with_path(experiment.shardings(policy))
found = {
    "params": [
        [jax.tree_util.keystr(path), p.shape, list(place.spec)]
        for (path, place), p in zip(leaves, jax.tree.leaves(policy.table, is_leaf=lambda x: isinstance(x, Param)))
    ],
}
for name, program in programs.items():
    found[name] = [
        dict(one._asdict(), loops=[loop._asdict() for loop in one.loops]) for one in hlo.collectives(program.as_text())
    ]
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def counted(request):
    """Sizes of the mesh, fields of the case, and what SCRIPT found: parameters, and collectives of both programs."""
    sizes, fields = request.param
    env = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), env.get("PYTHONPATH", "")])
    arguments = json.dumps([sizes, BATCH, fields])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return sizes, fields, json.loads(done.stdout.splitlines()[-1])


def crossing(collectives, tensor):
    """Those that leave a tensor group, whose devices are neighbours."""
    return [one for one in collectives if len({device // tensor for device in one["group"]}) > 1]


def moved(collectives, kind):
    return sum(one["bytes"] * one["times"] for one in collectives if one["kind"] == kind)


def size(shape, place, tensor):
    """Bytes of a parameter, or of its part of the tensor axis."""
    count = 4
    for n in shape:
        count *= n
    return count // (tensor if "tensor" in place else 1)


def test_what_crosses_between_queries(counted):
    (data, fsdp, tensor), fields, found = counted
    microbatches, epochs = fields.get("rl__microbatches", 1), fields.get("rl__objective__epochs", 1)
    sharded = {name: size(shape, place, tensor) for name, shape, place in found["params"] if "fsdp" in place}
    others = sum(size(shape, place, tensor) for _, shape, place in found["params"] if "fsdp" not in place)
    total = sum(sharded.values()) if fsdp > 1 else 0
    in_layers = sum(n for name, n in sharded.items() if "layers" in name) if fsdp > 1 else 0

    rollout = crossing(found["collect"], tensor)
    assert not any(one["loops"] and None in [loop["trips"] for loop in one["loops"]] for one in rollout)
    passes = 2 * bool(fields.get("rl__objective__kl_weight"))  # reference and old log-probabilities
    assert total <= moved(rollout, "all-gather") <= total * (1 + passes)
    assert {one["kind"] for one in rollout} <= {"all-gather", "all-reduce"}
    assert moved(rollout, "all-reduce") <= SCALARS

    step = crossing(found["update"], tensor)
    assert {one["kind"] for one in step} <= {"all-gather", "reduce-scatter", "all-reduce"}
    parts = microbatches * epochs
    # Forward, and layers again backward; XLA may keep what all microbatches begin with.
    assert total + in_layers <= moved(step, "all-gather") <= (total + in_layers) * parts
    assert moved(step, "reduce-scatter") == total * parts
    added = moved(step, "all-reduce")
    gradients = others + (sum(sharded.values()) // fsdp if data > 1 else 0)
    assert gradients * epochs <= added <= (gradients + SCALARS) * epochs


def test_the_decoding_loop_holds_tensor_parallelism_alone(counted):
    (_, _, tensor), fields, found = counted
    loops = [one for one in found["collect"] if any(loop["trips"] is None for loop in one["loops"])]
    assert all(set(one["group"]) <= {2 * (one["group"][0] // 2) + i for i in range(tensor)} for one in loops), loops
    assert (len(loops) > 0) == (tensor > 1)
    assert {one["kind"] for one in loops} <= {"all-reduce"}  # no logits, no weights, no lists
