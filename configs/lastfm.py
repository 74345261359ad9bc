"""LastFM (LLaRA sequences): next artist among 20, from scratch.

    python train.py configs/lastfm.py --data.manual-dir DIR
"""

from fgrpo_jax.config import Config, DataConfig, EvalConfig, ModelConfig, ObjectiveConfig, OptimConfig, StageConfig, TargetConfig


def get_config() -> Config:
    return Config(
        run_dir="runs/lastfm",
        data=DataConfig(name="lastfm", manual_dir="data/lastfm", prompt_buckets=(40,)),
        model=ModelConfig(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=192),
        sft=StageConfig(
            steps=2500,
            source="logged",
            batch_queries=128,
            group_size=1,
            eval_every=250,
            optim=OptimConfig(learning_rate=3e-3, decay="cosine"),
            objective=ObjectiveConfig(name="nll"),
            target=TargetConfig(fill="first"),
        ),
        rl=StageConfig(
            steps=300,
            batch_queries=64,
            group_size=8,
            eval_every=50,
            optim=OptimConfig(learning_rate=1e-3, decay="linear"),
        ),
        eval=EvalConfig(
            baselines=("random", "popularity", "covisitation", "covisitation_window", "covisitation_ordered"),
            train_queries=1000,
        ),
    )
