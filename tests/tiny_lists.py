"""A world of two dozen items with shown lists, and a ranker's run on it: what the tests of whole runs share."""

import dataclasses
import json

from tiny import tiny_config, write_world

from fgrpo_jax.policies.ranker.config import NetworkConfig, ProposalsConfig, RankerConfig, SelectionConfig
from fgrpo_jax.stages import stages

LENGTH = 3


def write_lists(folder, **sizes):
    """`write_world` with the fields that rankers learn from: two lists shown of each pool."""
    write_world(folder, **sizes)
    for path in folder.glob("*.jsonl"):
        lines = []
        for number, line in enumerate(path.read_text().splitlines()):
            row = json.loads(line)
            ids = [item["id"] for item in row["candidates"]]
            gains = dict(zip(ids, row["relevance"], strict=True))
            row["retrieval"] = [int(i) / 24 + gains[i] for i in ids]
            row["topics"] = [int(i) % 5 for i in ids]
            shown = (ids[:LENGTH], ids[::-1][: LENGTH - number % 2])
            row["logged"] = [{"items": items, "feedback": [gains[i] for i in items]} for items in shown]
            lines.append(json.dumps(row) + "\n")
        path.write_text("".join(lines))
    return folder


def tiny_ranker(data, prepared, run_dir, steps=4):
    """A ranker's run as small as it gets: every stage `steps` long."""
    like = tiny_config(data, prepared, run_dir, rl_steps=steps)
    shared = {f.name: getattr(like, f.name) for f in dataclasses.fields(RankerConfig) if hasattr(like, f.name)}
    config = RankerConfig(
        **shared,
        network=NetworkConfig(
            hidden_size=8, num_heads=2, mlp_size=8, list_length=LENGTH, labels="feedback", init_std=0.3
        ),
        proposals=ProposalsConfig(mix=(("retriever", 1), ("pointwise", 1), ("perturbed", 1))),
        selection=SelectionConfig(lists=6, mmr=(0.8,)),
    )
    small = {"steps": steps, "batch_queries": 8, "eval_every": 4, "optim": like.rl.optim}
    made = {}
    for name, stage in stages(config).items():
        size = {} if stage.source == "logged" else {"group_size": 6}
        made[name] = dataclasses.replace(stage, **small, **size)
    evaluation = dataclasses.replace(
        like.eval,
        metric="ndcg@2",
        versus="pointwise",
        baselines=("random", "retrieval"),
        metrics=("ndcg", "alpha_ndcg"),
    )
    return dataclasses.replace(config, eval=evaluation, **made)
