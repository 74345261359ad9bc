"""A world of two dozen items, and runs on it: what the tests of whole runs share."""

import contextlib
import dataclasses
import json
import random
import sys
from pathlib import Path

import jax

from fgrpo_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RewardConfig,
    StageConfig,
    TranscriptConfig,
)
from fgrpo_jax.config_files import to_json

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # train.py and eval.py are no part of the package

ITEMS = [f"item {letter}" for letter in "abcdefghijklmnopqrstuvwx"]


def write_world(folder, train=40, validation=12, test=9, seed=0):
    """JSONL files with pools of 4 to 7 and histories of 1 to 3; an item's successor is relevant,
    and the one after it a bit. The first training query has no relevant candidate."""
    rng = random.Random(seed)
    for split, size in (("train", train), ("validation", validation), ("test", test)):
        lines = []
        for number in range(size):
            seen = rng.sample(range(24), rng.randint(1, 3))
            gains = {(seen[-1] + 1) % 24: 1.0, (seen[-1] + 2) % 24: 0.5}
            rest = [i for i in range(24) if i not in gains and i not in seen]
            pool = [*gains] * bool(number or split != "train") + rng.sample(rest, rng.randint(4, 5))
            row = {
                "query_id": f"{split}-{number}",
                "query": "",
                "candidates": [{"id": str(i), "text": ITEMS[i]} for i in pool],
                "relevance": [gains.get(i, 0.0) for i in pool],
                "history": [{"id": str(i), "text": ITEMS[i]} for i in seen],
            }
            lines.append(json.dumps(row) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def tiny_config(data, prepared, run_dir, sft_steps=0, rl_steps=0):
    """A run on `write_world(data)`, as small as it gets."""
    optim = OptimConfig(learning_rate=0.03, warmup_steps=0)
    return Config(
        run_dir=str(run_dir),
        data=DataConfig(name="jsonl", manual_dir=str(data), prepared_dir=str(prepared), prompt_buckets=(16,)),
        transcript=TranscriptConfig(slate_min=3, slate_max=3, rank_min=2, rank_max=2),
        model=ModelConfig(
            hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4, mlp_size=8, init_std=0.3
        ),
        reward=RewardConfig(k=2),
        sft=StageConfig(
            steps=sft_steps,
            source="logged",
            batch_queries=8,
            group_size=1,
            eval_every=4,
            optim=optim,
            objective=ObjectiveConfig(name="nll"),
        ),
        rl=StageConfig(steps=rl_steps, batch_queries=8, group_size=4, eval_every=4, optim=optim),
        eval=EvalConfig(
            metric="ndcg@2",
            cutoffs=(1, 2),
            batch_queries=8,
            baselines=("random", "bm25"),
            bootstrap=20,
            transcripts=0,  # a program of their own
            versus="sft" if sft_steps else "rl",
        ),
        checkpoint=CheckpointConfig(every=2),
        log_every=3,
        compilation_cache="",
        keep_memory=False,  # of the process that runs all tests
    )


def changed(config, fields):
    """`changed(config, {"rl.optim.learning_rate": 1.0})`."""
    for path, value in fields.items():
        config = _set(config, path.split("."), value)
    return config


def _set(config, names, value):
    first, *rest = names
    return dataclasses.replace(config, **{first: _set(getattr(config, first), rest, value) if rest else value})


def config_file(config, path):
    """A configs/NAME.py that returns this configuration."""
    text = "from fgrpo_jax.config_files import from_json\n\n\ndef get_config():\n    return from_json({!r})\n"
    path.write_text(text.format(to_json(config)))
    return str(path)


def run_training(config, *flags):
    """`python train.py FILE flags`, in this process."""
    import train

    return train.main([config_file(config, Path(f"{config.run_dir}.py")), *flags])


@contextlib.contextmanager
def quick_programs():
    """Inside, programs are compiled quickly to slow code."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def rows(run_dir, stage=None):
    """metrics.jsonl without the clock."""
    found = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name not in ("queries_per_s", "tokens_per_s")}
        for row in found
        if stage in (None, row["stage"])
    ]


def contents(folder):
    """Every file below, by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
