"""Your own logs: a table of user, item, time and a table of items; a small model from scratch.

    python train.py configs/interactions.py --data.manual-dir my_logs

my_logs holds interactions.csv (user,item,time) and items.csv (id,text); --data.interactions.user and so on name other
columns (fgrpo_jax/data/interactions.py). `python -m fgrpo_jax.data check`, with the same arguments, first. The
settings are those of configs/next_item.py; a larger catalogue wants more steps and width.
"""

import dataclasses

from configs.next_item import get_config as next_item
from fgrpo_jax.config import Config, DataConfig, EvalConfig


def get_config() -> Config:
    base = next_item()
    return dataclasses.replace(
        base,
        run_dir="runs/interactions",
        data=DataConfig(name="interactions", manual_dir="my_logs", prompt_buckets="auto"),
        eval=EvalConfig(split="validation", train_queries=1000),
    )
