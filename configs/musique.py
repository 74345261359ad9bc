"""MuSiQue-Ans: rank 20 passages for a multi-hop question, from a Hugging Face Qwen3 directory.

    python train.py configs/musique.py --data.manual-dir DIR --model.checkpoint QWEN3 --tokenizer QWEN3
    python train.py configs/musique.py:lora --data.manual-dir DIR --model.checkpoint QWEN3 --tokenizer QWEN3

Prompts are 2,000 to 5,000 tokens. Meant for an accelerator; the settings were not tuned.
"""

import dataclasses

from configs.qwen import get_config as qwen
from fgrpo_jax.config import Config, DataConfig


def get_config(variant: str = "") -> Config:
    base = qwen(variant)
    return dataclasses.replace(
        base,
        run_dir="_".join(filter(None, ["runs/musique", variant])),
        data=DataConfig(name="musique", manual_dir="data/musique", prompt_buckets=(4096, 8192)),
        transcript=dataclasses.replace(base.transcript, slate_min=2, rank_min=2),
        # All of the file, in an order of its own: it is sorted by hops, and the first ones are to be like the rest.
        eval=dataclasses.replace(base.eval, queries=2417),
    )
