"""config.json of a Hugging Face checkpoint of one of the families, read and written.

What the decoder does not compute (other biases, other rope scaling, quantized weights) is refused by
field and value.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fgrpo_jax.errors import ModelFilesError
from fgrpo_jax.models import gguf
from fgrpo_jax.models.decoder import DecoderSpec
from fgrpo_jax.models.families import FAMILIES, Family

# Fields of config.json that, when present, must have one of these values, whatever the family.
_FIXED = {"attention_dropout": (0, None), "partial_rotary_factor": (1.0, None), "quantization_config": (None,)}
# Kinds of rotary embedding, and what each is given besides theta: DecoderSpec.rope_scaling.
_SCALING = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_config(checkpoint: str | Path) -> dict[str, Any]:
    """The checkpoint's config.json, or what a GGUF file says in its place.

    Raises ModelFilesError when there is none to read.
    """
    folder = gguf.locate(checkpoint)
    if gguf.is_meant(folder):
        return gguf.read_config(folder)
    if not folder.is_dir():
        raise ModelFilesError(f"model.checkpoint: {folder} is not a directory")
    return read_json(folder / "config.json")


def read_spec(checkpoint: str | Path, **numerics: Any) -> DecoderSpec:
    """The sizes of a checkpoint, from its config.json; numerics: fields of the spec that it does not decide.

    Reads what transformers 4 (`rope_theta`) and 5 (`rope_parameters`) write. Raises
    ModelFilesError naming the field and its value for every model we do not compute.
    """
    config, path = read_config(checkpoint), gguf.locate(checkpoint)
    path = path if path.is_file() else path / "config.json"
    family = _family(config, path)

    def size(name: str, left_out: int | None = None) -> int:
        value = config.get(name)
        value = left_out if value is None and name in family.optional else _field(config, name, path)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelFilesError(f"{path}: {name}={value!r} must be a positive integer")
        return value

    tied = family.optional.get("tie_word_embeddings")
    if "tie_word_embeddings" in config or tied is None:
        tied = _field(config, "tie_word_embeddings", path)
    if not isinstance(tied, bool):
        raise ModelFilesError(f"{path}: tie_word_embeddings={tied!r} must be true or false")
    width, heads = size("hidden_size"), size("num_attention_heads")
    theta, scaling = _rope(config, family, path)
    spec = DecoderSpec(
        vocab_size=size("vocab_size"),
        hidden_size=width,
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", width // heads),
        mlp_size=size("intermediate_size"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_positive(_field(config, "rms_norm_eps", path), "rms_norm_eps", path),
        tie_embeddings=tied,
        **family.spec,
        **numerics,
    )
    _check_heads(spec, path)
    return spec


def _check_heads(spec: DecoderSpec, path: Path) -> None:
    if spec.num_heads % spec.num_kv_heads:
        raise ModelFilesError(
            f"{path}: num_attention_heads={spec.num_heads} is not a multiple of num_key_value_heads={spec.num_kv_heads}"
        )
    if spec.head_dim % 2:
        raise ModelFilesError(f"{path}: head_dim={spec.head_dim} must be even (rotary embedding)")


def _family(config: dict[str, Any], path: Path) -> Family:
    """The row of FAMILIES. Fields that, when present, must have a value that the decoder computes are checked."""
    found = config.get("model_type")
    if found not in FAMILIES:
        raise ModelFilesError(f"{path}: model_type={found!r} is not supported; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[found]
    for name, values in (_FIXED | family.fixed).items():
        if name in config and config[name] not in values:
            raise ModelFilesError(f"{path}: {name}={config[name]!r} is not supported, only {values[0]!r} is")
    for kind in config.get("layer_types") or ():
        if kind != "full_attention":
            raise ModelFilesError(f"{path}: layer_types holds {kind!r}; only 'full_attention' is supported")
    return family


def _rope(config: dict[str, Any], family: Family, path: Path) -> tuple[float, tuple[float, ...]]:
    """theta and scaling, which must be the same wherever they are given."""
    thetas, scalings = {}, {}
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name) or {}
        if not isinstance(rope, dict):
            raise ModelFilesError(f"{path}: {name}={rope!r} must be an object")
        if rope:
            scalings[name] = _scaling(rope, name, path)
        if "rope_theta" in rope:
            thetas[f"{name}.rope_theta"] = rope["rope_theta"]
    if "rope_theta" in config:
        thetas["rope_theta"] = config["rope_theta"]
    if not thetas and "rope_theta" in family.optional:
        thetas["rope_theta"] = family.optional["rope_theta"]
    if not thetas:
        raise ModelFilesError(f"{path} has neither rope_theta nor rope_parameters.rope_theta")
    for given in (thetas, scalings):
        if len(set(given.values())) > 1:
            both = ", ".join(f"{k}={v!r}" for k, v in given.items())
            raise ModelFilesError(f"{path} contradicts itself: {both}")
    name, value = next(iter(thetas.items()))
    return _positive(value, name, path), next(iter(scalings.values()), ())


def _scaling(rope: dict[str, Any], where: str, path: Path) -> tuple[float, ...]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    unscaled = kind == "default" and "factor" in rope
    if kind not in _SCALING or rope.get("partial_rotary_factor", 1.0) != 1.0 or unscaled:
        raise ModelFilesError(
            f"{path}: {where}={rope!r} is not supported, only rope_type {', '.join(_SCALING)} of whole heads"
        )
    if missing := [name for name in _SCALING[kind] if name not in rope]:
        raise ModelFilesError(f"{path}: {where}={rope!r} has no {missing[0]}")
    scaling = tuple(_positive(rope[name], f"{where}.{name}", path) for name in _SCALING[kind])
    if kind == "llama3" and scaling[2] <= scaling[1]:
        raise ModelFilesError(f"{path}: {where}={rope!r}: high_freq_factor must exceed low_freq_factor")
    return scaling


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
    name = _name(spec)
    kind = next(kind for kind, names in _SCALING.items() if len(names) == len(spec.rope_scaling))
    scaling = dict(zip(_SCALING[kind], (_number(x) for x in spec.rope_scaling), strict=True))
    rope = {"rope_theta": spec.rope_theta, "rope_type": kind} | scaling
    return (
        config
        | {field: values[0] for field, values in FAMILIES[name].fixed.items()}
        | {
            "architectures": [FAMILIES[name].architecture],
            "model_type": name,
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden_size,
            "num_hidden_layers": spec.num_layers,
            "num_attention_heads": spec.num_heads,
            "num_key_value_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "intermediate_size": spec.mlp_size,
            "rms_norm_eps": spec.norm_eps,
            "tie_word_embeddings": spec.tie_embeddings,
            # transformers 4 reads the first (and the scaling), 5 the second.
            "rope_theta": spec.rope_theta,
            "rope_parameters": rope,
            "dtype": dtype,
        }
        | ({"rope_scaling": rope} if scaling else {})
    )


def _name(spec: DecoderSpec) -> str:
    """The `model_type` of the family that agrees with a spec."""
    fields = spec._asdict()
    for name, family in FAMILIES.items():
        if all(fields[field] == value for field, value in family.spec.items()):
            return name
    found = ", ".join(f"{field}={fields[field]!r}" for field in FAMILIES["qwen3"].spec)
    raise ModelFilesError(f"transformers has no family with {found}: such a model cannot be exported")


def _number(x: float) -> float | int:
    """As config.json writes it: lengths are whole numbers."""
    return int(x) if x.is_integer() else x
