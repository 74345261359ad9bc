"""Your own data with a Hugging Face Qwen3 checkpoint, candidates named by their number.

    python train.py configs/qwen.py --data.manual-dir my_data --model.checkpoint DIR --tokenizer DIR
    python train.py configs/qwen.py:lora --data.manual-dir my_data --model.checkpoint DIR --tokenizer DIR

`:lora` trains adapters of an instruction-tuned checkpoint (Qwen3-4B-Instruct-2507, say), which stays as it is in
bfloat16, by prompts in its chat template and at the higher rates that adapters take. Llama, Qwen2, Gemma 3 and Qwen3.5
directories are read as well. Meant for an accelerator; the settings were not tuned.
"""

import dataclasses

from fgrpo_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PromptConfig,
    StageConfig,
    TranscriptConfig,
)


def get_config(variant: str = "") -> Config:
    config = Config(
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
    if variant == "":
        return config
    if variant != "lora":
        raise ConfigError(f"there is no variant {variant!r}, only lora")

    def at_rate(stage: StageConfig, rate: float) -> StageConfig:
        return dataclasses.replace(stage, optim=dataclasses.replace(stage.optim, learning_rate=rate))

    return dataclasses.replace(
        config,
        run_dir="runs/qwen_lora",
        prompt=PromptConfig(chat=True),
        model=dataclasses.replace(config.model, lora=LoraConfig(rank=16, base_dtype="bfloat16")),
        sft=at_rate(config.sft, 2e-4),
        rl=at_rate(config.rl, 5e-5),
    )
