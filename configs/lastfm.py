"""LastFM (LLaRA sequences): next artist among 20, from scratch.

    python train.py configs/lastfm.py --data.manual-dir DIR

Six minutes on two CPU cores. 2,767 validation queries, mean of seeds 0 to 2: NDCG@5 75.9 after SFT,
77.5 after F-GRPO (Popularity 42.4, co-visitation 62.2 to 71.9, with the order of pairs 84.7).
"""

from fgrpo_jax.config import Config, DataConfig, EvalConfig, ModelConfig, ObjectiveConfig, OptimConfig, StageConfig, TargetConfig


def get_config() -> Config:
    return Config(
        run_dir="runs/lastfm",
        data=DataConfig(name="lastfm", manual_dir="data/lastfm", prompt_buckets=(40,)),
        model=ModelConfig(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=192),
        # The two stages see different users: after SFT a model remembers its training queries,
        # and what it is sure of teaches reinforcement learning nothing.
        sft=StageConfig(
            steps=1500,
            source="logged",
            batch_queries=128,
            group_size=1,
            subset=(0.0, 0.6),
            eval_every=250,
            optim=OptimConfig(learning_rate=3e-3, decay="cosine"),
            objective=ObjectiveConfig(name="nll"),
            target=TargetConfig(fill="shuffled", train_fill=False),
        ),
        rl=StageConfig(
            steps=500,
            batch_queries=64,
            group_size=8,
            subset=(0.6, 1.0),
            eval_every=100,
            optim=OptimConfig(learning_rate=5e-4, decay="linear"),
        ),
        eval=EvalConfig(
            baselines=("random", "popularity", "covisitation", "covisitation_window", "covisitation_ordered"),
            train_queries=1000,
        ),
    )
