"""Your own recommendation data: histories and items that recur, a small model from scratch.

    python train.py configs/jsonl.py --data.manual-dir my_data

The settings are those of configs/next_item.py; a larger catalogue wants more steps and width.
"""

import dataclasses

from configs.next_item import get_config as next_item
from fgrpo_jax.config import Config, DataConfig, EvalConfig


def get_config() -> Config:
    base = next_item()
    return dataclasses.replace(
        base,
        run_dir="runs/jsonl",
        data=DataConfig(name="jsonl", manual_dir="my_data", prompt_buckets=(40, 80, 160)),
        transcript=dataclasses.replace(base.transcript, slate_min=1, rank_min=1),
        sft=dataclasses.replace(base.sft, subset=(0.0, 1.0)),
        rl=dataclasses.replace(base.rl, subset=(0.0, 1.0)),
        eval=EvalConfig(split="validation", train_queries=0),
    )
