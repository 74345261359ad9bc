"""config.json of a Hugging Face checkpoint of the Qwen3 family, read and written.

What the decoder does not compute (biases, rope scaling, sliding windows, quantized weights)
is refused by field and value.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fgrpo_jax.errors import UserError
from fgrpo_jax.models.decoder import DecoderSpec


class ModelFilesError(UserError, ValueError):
    """A checkpoint directory that cannot be read or written; says which file, tensor or field."""


def read_config(directory: str | Path) -> dict[str, Any]:
    """The checkpoint's config.json. Raises ModelFilesError when there is none to read."""
    folder = Path(directory).expanduser()
    if not folder.is_dir():
        raise ModelFilesError(f"model.checkpoint: {folder} is not a directory")
    return read_json(folder / "config.json")


def read_spec(directory: str | Path, **numerics: Any) -> DecoderSpec:
    """The sizes of a checkpoint, from its config.json; numerics: fields of the spec that it does not decide.

    Reads what transformers 4 (`rope_theta`) and 5 (`rope_parameters`) write. Raises
    ModelFilesError naming the field and its value for every model we do not compute.
    """
    path = Path(directory).expanduser() / "config.json"
    config = read_config(directory)
    _refuse_unsupported(config, path)

    def size(name: str) -> int:
        value = _field(config, name, path)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelFilesError(f"{path}: {name}={value!r} must be a positive integer")
        return value

    tied = _field(config, "tie_word_embeddings", path)
    if not isinstance(tied, bool):
        raise ModelFilesError(f"{path}: tie_word_embeddings={tied!r} must be true or false")
    spec = DecoderSpec(
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=size("num_attention_heads"),
        num_kv_heads=size("num_key_value_heads"),
        head_dim=size("head_dim"),
        mlp_size=size("intermediate_size"),
        rope_theta=_rope_theta(config, path),
        norm_eps=_positive(_field(config, "rms_norm_eps", path), "rms_norm_eps", path),
        tie_embeddings=tied,
        **numerics,
    )
    if spec.num_heads % spec.num_kv_heads:
        raise ModelFilesError(
            f"{path}: num_attention_heads={spec.num_heads} is not a multiple of num_key_value_heads={spec.num_kv_heads}"
        )
    if spec.head_dim % 2:
        raise ModelFilesError(f"{path}: head_dim={spec.head_dim} must be even (rotary embedding)")
    return spec


def _refuse_unsupported(config: dict[str, Any], path: Path) -> None:
    """Fields that, when present, must have the one value the decoder computes."""
    if config.get("model_type") != "qwen3":
        found = config.get("model_type")
        raise ModelFilesError(f"{path}: model_type={found!r} is not supported, only 'qwen3' is")
    supported = {
        "attention_bias": (False, None),
        "attention_dropout": (0, None),
        "hidden_act": ("silu",),
        "use_sliding_window": (False, None),
        "quantization_config": (None,),
    }
    for name, values in supported.items():
        if name in config and config[name] not in values:
            raise ModelFilesError(f"{path}: {name}={config[name]!r} is not supported, only {values[0]!r} is")
    for kind in config.get("layer_types") or ():
        if kind != "full_attention":
            raise ModelFilesError(f"{path}: layer_types holds {kind!r}; only 'full_attention' is supported")


def _rope_theta(config: dict[str, Any], path: Path) -> float:
    thetas = {}
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name) or {}
        if not isinstance(rope, dict):
            raise ModelFilesError(f"{path}: {name}={rope!r} must be an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        partial = rope.get("partial_rotary_factor", 1.0)
        if kind != "default" or partial != 1.0 or "factor" in rope:
            raise ModelFilesError(f"{path}: {name}={rope!r} is not supported, only unscaled rotary embedding")
        if "rope_theta" in rope:
            thetas[f"{name}.rope_theta"] = rope["rope_theta"]
    if "rope_theta" in config:
        thetas["rope_theta"] = config["rope_theta"]
    if not thetas:
        raise ModelFilesError(f"{path} has neither rope_theta nor rope_parameters.rope_theta")
    name, value = next(iter(thetas.items()))
    if any(other != value for other in thetas.values()):
        both = ", ".join(f"{k}={v!r}" for k, v in thetas.items())
        raise ModelFilesError(f"{path} contradicts itself: {both}")
    return _positive(value, name, path)


def _positive(value: Any, name: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ModelFilesError(f"{path}: {name}={value!r} must be a positive number")
    return float(value)


def _field(config: dict[str, Any], name: str, path: Path) -> Any:
    if name not in config:
        raise ModelFilesError(f"{path} has no field {name!r}")
    return config[name]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelFilesError where there is none."""
    if not path.is_file():
        raise ModelFilesError(f"{path} does not exist: a checkpoint holds config.json and safetensors")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFilesError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelFilesError(f"{path} does not hold a JSON object")
    return value


def make_config(
    spec: DecoderSpec,
    dtype: str,
    original: dict[str, Any] | None,
    eos_token_id: int | None,
    pad_token_id: int | None,
) -> dict[str, Any]:
    """The config.json of an exported model, for transformers 4 and 5.

    dtype: of the stored weights. original: the config.json training started from, whose other
    fields are kept; None for a model from scratch, which gets the token ids given.
    """
    tokens = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    config = dict(tokens if original is None else original)
    for stale in ("torch_dtype", "rope_scaling", "transformers_version", "_name_or_path"):
        config.pop(stale, None)
    return config | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.mlp_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_embeddings,
        # transformers 4 reads the first, 5 the second.
        "rope_theta": spec.rope_theta,
        "rope_parameters": {"rope_theta": spec.rope_theta, "rope_type": "default"},
        "dtype": dtype,
    }
