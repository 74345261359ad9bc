"""MuSiQue-Ans: rank 20 passages for a multi-hop question, from a Hugging Face Qwen3 directory.

    python train.py configs/musique.py --data.manual-dir DIR --model.checkpoint QWEN3 --tokenizer QWEN3

Prompts are 2,000 to 5,000 tokens. Meant for an accelerator; the settings were not tuned.
"""

from fgrpo_jax.config import (
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


def get_config() -> Config:
    optim = OptimConfig(learning_rate=1e-5, warmup_steps=10, decay="cosine", b2=0.95)
    return Config(
        run_dir="runs/musique",
        tokenizer="Qwen3-0.6B",
        data=DataConfig(name="musique", manual_dir="data/musique", prompt_buckets=(4096, 8192)),
        transcript=TranscriptConfig(
            identifier="index", separator=" > ", slate_min=2, slate_max=10, rank_min=2, rank_max=5
        ),
        model=ModelConfig(checkpoint="Qwen3-0.6B", dtype="bfloat16", remat=True),
        reward=RewardConfig(k=5),
        sft=StageConfig(
            steps=100,
            source="logged",
            batch_queries=16,
            group_size=1,
            microbatches=4,
            eval_every=25,
            optim=optim,
            objective=ObjectiveConfig(name="nll"),
        ),
        rl=StageConfig(
            steps=200,
            batch_queries=16,
            group_size=8,
            microbatches=8,
            eval_every=25,
            optim=OptimConfig(learning_rate=1e-6, warmup_steps=10, b2=0.95),
        ),
        eval=EvalConfig(baselines=("random", "bm25"), batch_queries=16, train_queries=64),
    )
