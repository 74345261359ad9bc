"""The default: a generated world of readers with several interests, SFT and then F-GRPO, from random weights.

    python train.py

Three minutes on one CPU core. 1,000 test queries, mean of seeds 0 to 4: NDCG@5 33.7 after SFT, 43.7 after F-GRPO
(BM25 28.7, co-visitation 27.8), slate recall 59.0 and 72.2. Variants: configs/synthetic_study.py.
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
        # the order of gain SFT is better by itself, and its rankings are copies of the slate's first five (67 % of
        # them, here 12 %), which F-GRPO, that credits slates as sets, scrambles before it mends them.
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
            optim=OptimConfig(learning_rate=2e-3, decay="linear"),
        ),
        eval=EvalConfig(split="test", train_queries=0, metrics=("recall", "hit", "ndcg", "slate_ndcg")),
    )
