"""The default: a generated world of readers with several interests, SFT and then F-GRPO, from random weights.

    python train.py

TIMES (see README)
"""

from fgrpo_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    StageConfig,
    TargetConfig,
)


def get_config() -> Config:
    return Config(
        run_dir="runs/synthetic",
        tokenizer="words",
        data=DataConfig(name="synthetic", prompt_buckets=(192,)),
        model=ModelConfig(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=192),
        # The two stages see different readers. What is wanted stands shuffled among fill in the slates to imitate: in
        # the order of gain SFT is better by itself, and learns rankings as copies of the slate's start, which
        # F-GRPO, that credits slates as sets, then has to undo.
        sft=StageConfig(
            steps=300,
            source="logged",
            batch_queries=64,
            group_size=1,
            subset=(0.0, 0.5),
            eval_every=100,
            optim=OptimConfig(learning_rate=5e-3, decay="cosine"),
            objective=ObjectiveConfig(name="nll"),
            target=TargetConfig(fill="shuffled", train_fill=False),
        ),
        rl=StageConfig(
            steps=250,
            batch_queries=32,
            group_size=8,
            subset=(0.5, 1.0),
            eval_every=50,
            optim=OptimConfig(learning_rate=1e-3, decay="linear"),
        ),
        eval=EvalConfig(split="test", train_queries=0, metrics=("recall", "hit", "ndcg", "slate_ndcg")),
    )
