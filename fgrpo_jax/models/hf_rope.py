"""What config.json says of rotary embedding: fields of DecoderSpec, and back.

transformers 4 writes `rope_theta`, `rope_scaling` and, of layers with a window, `rope_local_base_freq`;
transformers 5 writes `rope_parameters`, one object or one for each kind of layer.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fgrpo_jax.errors import ModelFilesError
from fgrpo_jax.models.decoder import FULL, LOCAL, DecoderSpec
from fgrpo_jax.models.families import Family

# Kinds of rotary embedding, and what each is given besides theta: DecoderSpec.rope_scaling.
_SCALING = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read(config: dict[str, Any], family: Family, path: Path) -> dict[str, Any]:
    """Fields of the spec. Raises ModelFilesError for a kind that is not computed, and for contradictions."""
    objects = {name: _object(config, name, path) for name in ("rope_parameters", "rope_scaling")}
    if LOCAL not in family.pattern:
        theta, scaling = _agreed(objects, "rope_theta", config, family, path)
        fraction = _fraction(objects, config, family, path)
        return {"rope_theta": theta, "rope_scaling": scaling, "rotary_fraction": fraction}
    by_kind, scaled = objects.values()
    if by_kind and set(by_kind) != {FULL, LOCAL}:
        raise ModelFilesError(f"{path}: rope_parameters={by_kind!r} must be of {FULL} and of {LOCAL}")
    of = {kind: {f"rope_parameters.{kind}": _object(by_kind, kind, path)} for kind in (FULL, LOCAL)}
    theta, scaling = _agreed(of[FULL] | {"rope_scaling": scaled}, "rope_theta", config, family, path)
    local, local_scaling = _agreed(of[LOCAL], "rope_local_base_freq", config, family, path)
    if local_scaling:
        raise ModelFilesError(f"{path}: {next(iter(of[LOCAL]))}: rope_type of {LOCAL} must be 'default'")
    return {"rope_theta": theta, "rope_scaling": scaling, "local_rope_theta": local}


def write(spec: DecoderSpec) -> dict[str, Any]:
    """Fields of config.json, for transformers 4 and 5."""
    kind = next(kind for kind, names in _SCALING.items() if len(names) == len(spec.rope_scaling))
    scaling = dict(zip(_SCALING[kind], (_number(x) for x in spec.rope_scaling), strict=True))
    rope = {"rope_theta": spec.rope_theta, "rope_type": kind} | scaling
    if spec.rotary_fraction != 1:
        rope["partial_rotary_factor"] = spec.rotary_fraction
    config = {"rope_theta": spec.rope_theta, "rope_parameters": rope} | ({"rope_scaling": rope} if scaling else {})
    if LOCAL not in spec.pattern:
        return config
    local = {"rope_theta": spec.local_rope_theta, "rope_type": "default"}
    by_kind = {FULL: rope, LOCAL: local}
    return config | {"rope_parameters": by_kind, "rope_local_base_freq": spec.local_rope_theta}


def _fraction(objects: dict[str, dict[str, Any]], config: dict[str, Any], family: Family, path: Path) -> float:
    """The part of a head that is rotated: all of it, but in families that may say something else."""
    field = "partial_rotary_factor"
    given = [where[field] for where in (*objects.values(), config) if where.get(field) is not None]
    if not given:
        return family.optional.get(field, 1.0)
    fraction = positive(given[0], field, path)
    if fraction > 1 or any(other != fraction for other in given):
        raise ModelFilesError(f"{path}: {field}={given!r} must be one number up to 1")
    if fraction != 1 and field not in family.optional:
        raise ModelFilesError(f"{path}: {field}={given[0]!r} is not supported, only 1.0 is")
    return fraction


def positive(value: Any, name: str, path: Path) -> float:
    """Raises ModelFilesError for what is no positive number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ModelFilesError(f"{path}: {name}={value!r} must be a positive number")
    return float(value)


def _object(config: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise ModelFilesError(f"{path}: {name}={value!r} must be an object")
    return value


def _agreed(
    objects: dict[str, dict[str, Any]], field: str, config: dict[str, Any], family: Family, path: Path
) -> tuple[float, tuple[float, ...]]:
    """theta and scaling, which must be the same wherever they are given: in objects, and theta as a field."""
    scalings = {name: _scaling(rope, name, path) for name, rope in objects.items() if rope}
    thetas = {f"{name}.rope_theta": rope["rope_theta"] for name, rope in objects.items() if "rope_theta" in rope}
    if field in config:
        thetas[field] = config[field]
    if not thetas and field in family.optional:
        thetas[field] = family.optional[field]
    if not thetas:
        raise ModelFilesError(f"{path} has neither {field} nor {next(iter(objects))}.rope_theta")
    for given in (thetas, scalings):
        if len(set(given.values())) > 1:
            both = ", ".join(f"{k}={v!r}" for k, v in given.items())
            raise ModelFilesError(f"{path} contradicts itself: {both}")
    name, value = next(iter(thetas.items()))
    return positive(value, name, path), next(iter(scalings.values()), ())


def _scaling(rope: dict[str, Any], where: str, path: Path) -> tuple[float, ...]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    unscaled = kind == "default" and "factor" in rope
    if kind not in _SCALING or unscaled:
        raise ModelFilesError(f"{path}: {where}={rope!r} is not supported, only rope_type {', '.join(_SCALING)}")
    if missing := [name for name in _SCALING[kind] if name not in rope]:
        raise ModelFilesError(f"{path}: {where}={rope!r} has no {missing[0]}")
    scaling = tuple(positive(rope[name], f"{where}.{name}", path) for name in _SCALING[kind])
    if kind == "llama3" and scaling[2] <= scaling[1]:
        raise ModelFilesError(f"{path}: {where}={rope!r}: high_freq_factor must exceed low_freq_factor")
    return scaling


def _number(x: float) -> float | int:
    """As config.json writes it: lengths are whole numbers."""
    return int(x) if x.is_integer() else x
