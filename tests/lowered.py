"""The lowered text of every program of every file in configs/, for a tiny model and world.

    python lowered.py FOLDER

FOLDER: holds `data` (tiny.write_world) and `model`, a Hugging Face directory with a tokenizer and weights
of the sizes in LLM. Gets PROCESS.json, of the same in every process of a run.
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from tiny import ROOT, changed
from tiny_lists import LENGTH

import train
from fgrpo_jax.algorithm.rewards import REWARDS
from fgrpo_jax.config import DataConfig
from fgrpo_jax.config_files import load_file, to_json
from fgrpo_jax.data import datasets
from fgrpo_jax.data.batches import make_batches
from fgrpo_jax.run import processes, sharding
from fgrpo_jax.run.checkpoint import placed
from fgrpo_jax.run.experiment import KNOWN, Predictor, assemble, encode, initial_params, random_key
from fgrpo_jax.run.validation import validate
from fgrpo_jax.stages import stages
from fgrpo_jax.types import TrainState

EVERYWHERE = {
    "mesh.fsdp": 2,
    "eval.batch_queries": 8,
    "eval.split": "validation",
    "eval.train_queries": 0,
    "eval.baselines": ("random",),
}
RANKER = {
    "network.num_layers": 1,
    "network.list_layers": 1,
    "network.hidden_size": 8,
    "network.num_heads": 2,
    "network.mlp_size": 8,
    "network.list_length": LENGTH,
    "eval.metrics": ("ndcg", "alpha_ndcg"),
}
LLM = {
    "model.checkpoint": "",
    "model.hidden_size": 8,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.head_dim": 4,
    "model.mlp_size": 8,
}
STAGE = {"batch_queries": 8, "eval_every": 100, "microbatches": 1, "subset": (0.0, 1.0), "patience": 0}
EVERYTHING = {
    "rl.credit.terms": tuple((phase, name, 0.5) for name in REWARDS for phase in ("slate", "rank")),
    "rl.credit.normalise": "each",
    "rl.objective.kl_weight": 0.1,
    "rl.objective.epochs": 2,
    "rl.microbatches": 2,
    "reward.rules": (("slate_duplicate", -0.5), ("rank_too_short", -0.2)),
}
# Files whose programs are those of another one but for numbers, or fewer of them.
ALIKE = {"jsonl": "interactions", "ml1m_study": "interactions", "synthetic_study": "synthetic"}


def configs(folder):
    """Name of a file in configs/ -> its configuration on the tiny world; and one that uses every reward."""
    found = {}
    for path in sorted((ROOT / "configs").glob("*.py")):
        config = load_file(path)
        data = DataConfig(name="jsonl", manual_dir=f"{folder}/data", prepared_dir=f"{folder}/prepared")
        fields = EVERYWHERE | {"data": data, "run_dir": f"{folder}/run"}
        fields |= {f"{stage}.{name}": value for stage in stages(config) for name, value in STAGE.items()}
        fields |= {f"{name}.steps": min(stage.steps, 100) for name, stage in stages(config).items()}
        fields |= LLM if config.SYSTEM == "llm" else RANKER
        if config.SYSTEM == "llm" and config.tokenizer != "catalogue":
            fields["tokenizer"] = f"{folder}/model"
        if config.SYSTEM == "llm" and config.model.lora.rank:
            fields |= {"model.checkpoint": f"{folder}/model", "model.lora.rank": 2}
        found[path.stem] = changed(config, fields)
    return found | {"everything": changed(found["jsonl"], EVERYTHING)}


def programs(config, platforms=None):
    """Name -> text, for the devices here or for other platforms; only the parameters' initialisation is compiled."""
    validate(config, KNOWN)
    experiment = assemble(config, datasets.load(config.data), Path(config.run_dir))
    texts = {}

    def params_of(policy):
        return placed(jax.eval_shape(lambda: initial_params(experiment, policy)), experiment.shardings(policy))

    for name, stage in stages(config).items():
        if not stage.steps:
            continue
        policy = experiment.policy(name)
        params = params_of(policy)
        collect, update, optimizer, places = train.make_step(experiment, policy, stage)
        batches = make_batches(experiment.dataset, config, name, stage)
        query = encode(experiment, policy, batches.batch_at(0))
        frozen = {"reference": params} if stage.objective.kl_weight else {}
        frozen |= {other: params_of(experiment.policy(other)) for other in stage.frozen_from}
        frozen |= experiment.base(policy)
        key = random_key(config.seed, name, "rollout", 0)
        lowered = collect.trace(params, frozen, query, key).lower(lowering_platforms=platforms)
        texts[f"{name} collect"] = lowered.as_text()
        state = jax.eval_shape(lambda p: TrainState(jax.numpy.int32(0), p, optimizer.init(p)), params)
        batch = on_queries(experiment.mesh, lowered.out_info[0])
        traced = update.trace(placed(state, places), frozen, batch)
        texts[f"{name} update"] = traced.lower(lowering_platforms=platforms).as_text()
    traced = Predictor(experiment, policy).program.trace(params, experiment.base(policy), query)
    texts["greedy"] = traced.lower(lowering_platforms=platforms).as_text()
    return texts


def on_queries(mesh, batch):
    place = sharding.query_sharding(mesh)
    return placed(batch, jax.tree.map(lambda x: place, batch))


def main(folder):
    processes.initialize_distributed()
    made, found = {}, {}
    for name, config in configs(folder).items():
        if name in ALIKE:
            continue
        said = to_json(config)  # of several it is the same, now that they are on the same data
        found[name] = made[said] = made.get(said) or programs(config)
    (Path(folder) / f"{jax.process_index()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
