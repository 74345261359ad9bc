"""The default: a synthetic world of 500 items, SFT and then F-GRPO from scratch.

    python train.py
"""

from fgrpo_jax.config import Config, DataConfig, ModelConfig, OptimConfig, StageConfig, ObjectiveConfig, TargetConfig


def get_config() -> Config:
    return Config(
        run_dir="runs/synthetic",
        data=DataConfig(name="synthetic", prompt_buckets=(40,)),
        model=ModelConfig(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=192),
        sft=StageConfig(
            steps=1000,
            source="logged",
            batch_queries=128,
            group_size=1,
            eval_every=200,
            optim=OptimConfig(learning_rate=3e-3, decay="cosine"),
            objective=ObjectiveConfig(name="nll"),
            target=TargetConfig(fill="first"),
        ),
        rl=StageConfig(
            steps=200,
            batch_queries=64,
            group_size=8,
            eval_every=50,
            optim=OptimConfig(learning_rate=1e-3, decay="linear"),
        ),
    )
