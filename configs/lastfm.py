"""LastFM (LLaRA sequences): next artist among 20, from scratch.

    python train.py configs/lastfm.py --data.manual-dir DIR

Six minutes on two CPU cores. 2,767 validation queries, mean of seeds 0 to 2: NDCG@5 75.9 after SFT,
77.5 after F-GRPO (Popularity 42.4, co-visitation 62.2 to 71.9, with the order of pairs 84.7).
"""

import dataclasses

from configs.next_item import get_config as next_item
from fgrpo_jax.config import Config, DataConfig, EvalConfig


def get_config() -> Config:
    base = next_item()
    return dataclasses.replace(
        base,
        run_dir="runs/lastfm",
        data=DataConfig(name="lastfm", manual_dir="data/lastfm", prompt_buckets=(40,)),
        sft=dataclasses.replace(base.sft, steps=1500, subset=(0.0, 0.6), eval_every=250, patience=0),
        rl=dataclasses.replace(base.rl, subset=(0.6, 1.0)),
        eval=EvalConfig(
            baselines=("random", "popularity", "covisitation", "covisitation_window", "covisitation_ordered"),
            train_queries=1000,
        ),
    )
