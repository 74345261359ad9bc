"""Your own data with a Hugging Face Qwen3 checkpoint, candidates named by their number.

    python train.py configs/qwen.py --data.manual-dir my_data --model.checkpoint DIR --tokenizer DIR

Meant for an accelerator; the settings were not tuned.
"""

from fgrpo_jax.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    StageConfig,
    TranscriptConfig,
)


def get_config() -> Config:
    return Config(
        run_dir="runs/qwen",
        tokenizer="Qwen3-0.6B",
        data=DataConfig(name="jsonl", manual_dir="my_data", prompt_buckets=(512, 1024, 2048, 4096, 8192)),
        transcript=TranscriptConfig(
            identifier="index", separator=" > ", slate_min=1, slate_max=10, rank_min=1, rank_max=5
        ),
        model=ModelConfig(checkpoint="Qwen3-0.6B", dtype="bfloat16", remat=True),
        sft=StageConfig(
            steps=100,
            source="logged",
            batch_queries=16,
            group_size=1,
            microbatches=4,
            eval_every=25,
            optim=OptimConfig(learning_rate=1e-5, warmup_steps=10, decay="cosine", b2=0.95),
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
