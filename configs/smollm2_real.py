"""SmolLM2-135M-Instruct on real data: adapters, SFT on labels, then F-GRPO.

    python train.py configs/smollm2_real.py:ml1m --data.manual-dir ml        # titles; README: Logs of interactions
    python train.py configs/smollm2_real.py:hotpotqa --data.manual-dir DIR   # 10 passages a question, 2 needed
    python train.py configs/smollm2_real.py:musique --data.manual-dir DIR    # 20 passages a question, 2 to 4 needed

Meant for a night on two CPU cores; `:ml1m_gpu` and so on for one GPU: bfloat16, larger batches, ten times the queries,
fewer shapes. The settings were not tuned; a step of `:ml1m` takes 30 s (SFT) and 70 s (F-GRPO) of one core, and a short
run of it is all that went to its end.
"""

import dataclasses

from configs.smollm2 import get_config as smollm2
from fgrpo_jax.config import Config, ConfigError, DataConfig, EvalConfig, InteractionsConfig, LoraConfig, RewardConfig

LETTERS = {"identifier": "letter", "separator": ","}
DATA = {
    "ml1m": DataConfig(
        name="interactions",
        manual_dir="ml",
        history_max=10,
        prompt_buckets=(512, 640, 768),
        interactions=InteractionsConfig(
            text=("title",), rating="rating", min_rating=4.0, kcore=5, history=10, windows=3
        ),
    ),
    "hotpotqa": DataConfig(name="hotpotqa", manual_dir="data/hotpotqa", prompt_buckets=(1024, 1536, 2048, 4096)),
    "musique": DataConfig(name="musique", manual_dir="data/musique", prompt_buckets=(2048, 3072, 4096, 6144)),
}
LISTS = {  # slate_min, slate_max, rank_min, rank_max
    "ml1m": {"identifier": "text", "separator": " | ", "slate_min": 6, "slate_max": 6, "rank_min": 3, "rank_max": 3},
    "hotpotqa": {**LETTERS, "slate_min": 4, "slate_max": 4, "rank_min": 2, "rank_max": 2},
    "musique": {**LETTERS, "slate_min": 5, "slate_max": 5, "rank_min": 3, "rank_max": 3},
}
# Of one GPU, where every shape of an update costs a quarter of a minute of compiling: the lengths of nine tenths of the
# prompts or more, and of the longest (by `fgrpo_jax.data check`); the width of any title.
FEWER_SHAPES = {
    "ml1m": ({"prompt_buckets": (512, 896)}, {"identifier_width": 36}),
    "hotpotqa": ({"prompt_buckets": (2048, 4096)}, {}),
    "musique": ({"prompt_buckets": (4096, 6144)}, {}),
}


def get_config(variant: str = "ml1m") -> Config:
    name, _, machine = variant.partition("_")
    if name not in DATA or machine not in ("", "gpu"):
        raise ConfigError(f"there is no variant {variant!r}, only {', '.join(DATA)}, and each with _gpu")
    base, k = smollm2(), LISTS[name]["rank_max"]
    stages = {"sft": (150, 8), "rl": (75, 4)} if not machine else {"sft": (400, 32), "rl": (200, 16)}
    at_once = 16 if machine else 4  # queries whose activations exist together
    trained = {
        stage: dataclasses.replace(
            getattr(base, stage), steps=steps, batch_queries=n, microbatches=n // at_once, eval_every=steps // 3
        )
        for stage, (steps, n) in stages.items()
    }
    data, lists = ({}, {}) if not machine else FEWER_SHAPES[name]
    gpu = {"dtype": "bfloat16", "lora": LoraConfig(rank=16, base_dtype="bfloat16")} if machine else {}
    return dataclasses.replace(
        base,
        run_dir=f"runs/smollm2_{variant}",
        data=dataclasses.replace(DATA[name], **data),
        transcript=dataclasses.replace(base.transcript, **{"identifier_width": 1, **LISTS[name], **lists}),
        model=dataclasses.replace(base.model, remat=True, **gpu),
        reward=RewardConfig(k=k),
        eval=EvalConfig(
            split="validation",
            metric=f"ndcg@{k}",
            cutoffs=(1, k),
            batch_queries=8 if not machine else 250,
            queries=300 if not machine else 2000,
            train_queries=64 if not machine else 500,
            baselines=("random", "bm25") if name != "ml1m" else ("random", "popularity", "covisitation", "bm25"),
        ),
        **trained,
    )
