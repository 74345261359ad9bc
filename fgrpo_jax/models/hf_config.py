"""config.json of a Hugging Face checkpoint of one of the families, read and written.

What the decoder does not compute (other biases, other rope scaling, quantized weights) is refused by
field and value.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fgrpo_jax.errors import ModelFilesError
from fgrpo_jax.models import gguf, hf_rope
from fgrpo_jax.models.decoder import DELTA, LOCAL, DecoderSpec, layer_kinds, pattern_of
from fgrpo_jax.models.families import FAMILIES, Family
from fgrpo_jax.models.hf_rope import positive

GENERATION = "generation_config.json"
SAID_OF_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Fields of config.json that, when present, must have one of these values, whatever the family.
_FIXED = {
    "attention_dropout": (0, None),
    "quantization_config": (None,),
    "mlp_bias": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (1, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
}
_PERIODS = ("sliding_window_pattern", "full_attention_interval")  # layers to one that sees everything
# model_type of the whole, and of its text_config, with what transformers takes that to be where it is left out.
_WITH_IMAGES = {
    "qwen3_5": ("qwen3_5_text", {}),
    "gemma3": (
        "gemma3_text",
        {
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "rms_norm_eps": 1e-6,
            "query_pre_attn_scalar": 256,
        },
    ),
}
_SHARED = ("tie_word_embeddings", *SAID_OF_TOKENS)  # that the whole may say
_DELTA = (  # of delta.Sizes
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)


def read_config(checkpoint: str | Path) -> dict[str, Any]:
    """The checkpoint's config.json, or what a GGUF file says in its place; eos_token_id with those of
    generation_config.json, as a chat's turn may end with another token than a text.

    Raises ModelFilesError when there is none to read.
    """
    folder = gguf.locate(checkpoint)
    if gguf.is_meant(folder):
        return gguf.read_config(folder)
    check_there(folder)
    config = _of_text(read_json(folder / "config.json"), folder / "config.json")
    if not (folder / GENERATION).is_file():
        return config
    ends = (*ends_of(config, folder), *ends_of(read_json(folder / GENERATION), folder / GENERATION))
    return config | _with_ends(ends)


def ends_of(config: dict[str, Any], source: str | Path) -> tuple[int, ...]:
    """Its eos_token_id: one, several or none. source: what an error names. Raises ModelFilesError for anything else."""
    value = config.get("eos_token_id")
    ends = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(end, int) and not isinstance(end, bool) and end >= 0 for end in ends):
        raise ModelFilesError(f"{source}: eos_token_id={value!r} must be a token's number, or a list of such")
    return ends


def _with_ends(ends: Iterable[int]) -> dict[str, Any]:
    """The field of a configuration that says them: a number where there is one alone."""
    ends = [*dict.fromkeys(ends)]
    return {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}


def check_there(folder: Path) -> None:
    """Raises ModelFilesError where there is no directory."""
    if not folder.is_dir():
        raise ModelFilesError(
            f"model.checkpoint: {folder} is not there: give a Hugging Face directory, a GGUF file or smollm2"
        )


def _of_text(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Of a model of images and text, what it says of its text model, which is all that is read."""
    if config.get("model_type") not in _WITH_IMAGES:
        return config
    name, left_out = _WITH_IMAGES[config["model_type"]]
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise ModelFilesError(f"{path}: text_config={text!r} must be an object")
    shared = {field: config[field] for field in _SHARED if field in config}
    return left_out | shared | {"model_type": name} | text


def is_whole_for_transformers(folder: Path) -> bool:
    """Whether transformers' AutoModelForCausalLM opens it as a model of images and text, with other names of tensors.

    It does for `gemma3`; for `qwen3_5` it opens the text model.
    """
    return read_json(folder / "config.json").get("model_type") == "gemma3"


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
    head_dim = size("head_dim", width // heads)
    periods = [size(name) for name in _PERIODS if config.get(name) is not None]
    period = periods[0] if periods else None
    pattern = _pattern(config, family, size("num_hidden_layers"), period, path)
    scalar = positive(config.get("query_pre_attn_scalar", head_dim), "query_pre_attn_scalar", path)
    spec = DecoderSpec(
        vocab_size=size("vocab_size"),
        hidden_size=width,
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        head_dim=head_dim,
        mlp_size=size("intermediate_size"),
        pattern=pattern,
        window=size("sliding_window") if LOCAL in pattern else 0,
        delta=tuple(size(name) for name in _DELTA) if DELTA in pattern else (),
        query_scalar=None if scalar == head_dim else scalar,
        norm_eps=positive(_field(config, "rms_norm_eps", path), "rms_norm_eps", path),
        tie_embeddings=tied,
        **hf_rope.read(config, family, path),
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
    rotated = spec.head_dim * spec.rotary_fraction
    if rotated % 2:
        of_it = f" times partial_rotary_factor={spec.rotary_fraction}" if spec.rotary_fraction != 1 else ""
        raise ModelFilesError(f"{path}: head_dim={spec.head_dim}{of_it} must be even (rotary embedding)")
    if spec.delta and spec.delta[1] % spec.delta[0]:
        raise ModelFilesError(f"{path}: {_DELTA[1]}={spec.delta[1]} is not a multiple of {_DELTA[0]}={spec.delta[0]}")


def _family(config: dict[str, Any], path: Path) -> Family:
    """The row of FAMILIES. Fields that, when present, must have a value that the decoder computes are checked."""
    found = config.get("model_type")
    if found not in FAMILIES:
        raise ModelFilesError(f"{path}: model_type={found!r} is not supported; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[found]
    for name, values in (_FIXED | family.fixed).items():
        if name in config and config[name] not in values:
            known = "leave it out" if values == (None,) else f"only {values[0]!r} is"
            raise ModelFilesError(f"{path}: {name}={config[name]!r} is not supported, {known}")
    return family


def _pattern(config: dict[str, Any], family: Family, layers: int, period: int | None, path: Path) -> tuple[str, ...]:
    """The kinds of layers that repeat, as few as can be; period: layers to the family's last kind."""
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = (*family.pattern[:1] * (period - 1), family.pattern[-1]) if period else family.pattern
        kinds = [kinds[i % len(kinds)] for i in range(layers)]
    if not isinstance(kinds, list):
        raise ModelFilesError(f"{path}: layer_types={kinds!r} must be a list")
    for kind in kinds:
        if kind not in family.pattern:
            known = " or ".join(repr(name) for name in dict.fromkeys(family.pattern))
            raise ModelFilesError(f"{path}: layer_types holds {kind!r}; only {known} is supported")
    if len(kinds) != layers:
        raise ModelFilesError(f"{path}: layer_types are {len(kinds)}, num_hidden_layers={layers}")
    return pattern_of(kinds)


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
    fields are kept; None for a model from scratch, which gets the token ids given. eos_token_id: what ends a
    transcript, beside what the original says ends a text.
    """
    config = dict({"pad_token_id": pad_token_id} if original is None else original)
    own = () if eos_token_id is None else (eos_token_id,)
    config |= _with_ends((*ends_of(config, "config.json"), *own))
    for stale in ("torch_dtype", "rope_scaling", "transformers_version", "_name_or_path"):
        config.pop(stale, None)
    name = _name(spec)
    family = FAMILIES[name]
    return (
        config
        | {field: values[0] for field, values in family.fixed.items()}
        | {
            "architectures": [family.architecture],
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
            "dtype": dtype,
        }
        | hf_rope.write(spec)
        | _of_kinds(spec, family)
    )


def _of_kinds(spec: DecoderSpec, family: Family) -> dict[str, Any]:
    """What families with several kinds of layers say of them."""
    config: dict[str, Any] = {"layer_types": list(layer_kinds(spec))} if len(family.pattern) > 1 else {}
    if LOCAL in family.pattern:
        scalar = spec.head_dim if spec.query_scalar is None else spec.query_scalar
        config["query_pre_attn_scalar"] = int(scalar) if float(scalar).is_integer() else scalar
    if LOCAL in spec.pattern:
        config["sliding_window"] = spec.window
    return config | (dict(zip(_DELTA, spec.delta, strict=True)) if spec.delta else {})


def _name(spec: DecoderSpec) -> str:
    """The `model_type` of the family that agrees with a spec."""
    fields = spec._asdict()
    for name, family in FAMILIES.items():
        alike = all(fields[field] == value for field, value in family.spec.items())
        if alike and set(spec.pattern) <= set(family.pattern):
            return name
    found = ", ".join(f"{field}={fields[field]!r}" for field in (*FAMILIES["qwen3"].spec, "pattern"))
    raise ModelFilesError(f"transformers has no family with {found}: such a model cannot be exported")
