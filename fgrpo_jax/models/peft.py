"""Adapters as `peft` stores them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from fgrpo_jax.models.decoder import DecoderSpec, holders
from fgrpo_jax.models.hf import addressable, check_free, write_whole
from fgrpo_jax.models.hf_layout import TENSORS
from fgrpo_jax.types import PyTree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save(directory: str | Path, spec: DecoderSpec, adapters: PyTree, base: str) -> None:
    """Write what `peft.PeftModel.from_pretrained` loads onto the checkpoint `base`, in the type of the adapters.

    Raises ModelFilesError when the directory is not empty, or when parameters lie on other hosts.
    """
    target, flat = check_free(directory), addressable(adapters)
    tensors, modules = {}, []
    for name in adapters["layers"]:
        module = TENSORS[f"layers/{name}"].name.removesuffix(".weight")
        modules.append(module.rpartition(".")[2])
        for place, layer in enumerate(holders(spec, name)):
            a, b = (np.asarray(flat[f"layers/{name}/{part}"][place]) for part in ("a", "b"))
            stored = {
                "A": a.reshape(-1, spec.lora.rank).T,
                "B": b.reshape(spec.lora.rank, -1).T,
            }  # [rank, in], [out, rank]
            for part, array in stored.items():
                key = f"base_model.model.{module.format(layer)}.lora_{part}.weight"
                tensors[key] = np.ascontiguousarray(array)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": spec.lora.rank,
        "lora_alpha": spec.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
        "inference_mode": True,
    }

    def write(folder: Path) -> None:
        safetensors.numpy.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    write_whole(target, write, CONFIG)
