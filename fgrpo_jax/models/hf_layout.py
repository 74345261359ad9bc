"""How parameters are called and laid out in a Hugging Face checkpoint: the one place where the two layouts meet.

Which tensors there are, and their shapes, come from `decoder.param_table`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from fgrpo_jax.models.decoder import DecoderSpec, holders, param_table
from fgrpo_jax.types import Param


class Stored(NamedTuple):
    """How a parameter is called and laid out in a checkpoint.

    ours: the axes of our array, one letter each, without the layer axis (letters as in
        types.py, F the width of the MLP, C channels of a convolution).
    stored: the axes of the checkpoint's array, each a product of ours; "" is an axis of one.
    """

    name: str  # "{}" is the layer's number
    ours: str
    stored: tuple[str, ...]


TENSORS = {
    "embed": Stored("model.embed_tokens.weight", "VD", ("V", "D")),
    "layers/attn_norm": Stored("model.layers.{}.input_layernorm.weight", "D", ("D",)),
    "layers/q": Stored("model.layers.{}.self_attn.q_proj.weight", "DHE", ("HE", "D")),
    "layers/k": Stored("model.layers.{}.self_attn.k_proj.weight", "DHE", ("HE", "D")),
    "layers/v": Stored("model.layers.{}.self_attn.v_proj.weight", "DHE", ("HE", "D")),
    "layers/q_bias": Stored("model.layers.{}.self_attn.q_proj.bias", "HE", ("HE",)),
    "layers/k_bias": Stored("model.layers.{}.self_attn.k_proj.bias", "HE", ("HE",)),
    "layers/v_bias": Stored("model.layers.{}.self_attn.v_proj.bias", "HE", ("HE",)),
    "layers/q_norm": Stored("model.layers.{}.self_attn.q_norm.weight", "E", ("E",)),
    "layers/k_norm": Stored("model.layers.{}.self_attn.k_norm.weight", "E", ("E",)),
    "layers/o": Stored("model.layers.{}.self_attn.o_proj.weight", "HED", ("D", "HE")),
    "layers/delta_qkv": Stored("model.layers.{}.linear_attn.in_proj_qkv.weight", "DC", ("C", "D")),
    "layers/delta_z": Stored("model.layers.{}.linear_attn.in_proj_z.weight", "DHE", ("HE", "D")),
    "layers/delta_b": Stored("model.layers.{}.linear_attn.in_proj_b.weight", "DH", ("H", "D")),
    "layers/delta_a": Stored("model.layers.{}.linear_attn.in_proj_a.weight", "DH", ("H", "D")),
    "layers/delta_conv": Stored("model.layers.{}.linear_attn.conv1d.weight", "CT", ("C", "", "T")),
    "layers/delta_dt_bias": Stored("model.layers.{}.linear_attn.dt_bias", "H", ("H",)),
    "layers/delta_a_log": Stored("model.layers.{}.linear_attn.A_log", "H", ("H",)),
    "layers/delta_out_norm": Stored("model.layers.{}.linear_attn.norm.weight", "E", ("E",)),
    "layers/delta_o": Stored("model.layers.{}.linear_attn.out_proj.weight", "HED", ("D", "HE")),
    "layers/mlp_norm": Stored("model.layers.{}.post_attention_layernorm.weight", "D", ("D",)),
    "layers/gate": Stored("model.layers.{}.mlp.gate_proj.weight", "DF", ("F", "D")),
    "layers/up": Stored("model.layers.{}.mlp.up_proj.weight", "DF", ("F", "D")),
    "layers/down": Stored("model.layers.{}.mlp.down_proj.weight", "FD", ("D", "F")),
    "final_norm": Stored("model.norm.weight", "D", ("D",)),
    "head": Stored("lm_head.weight", "VD", ("V", "D")),
}

# With norms of what attention and MLP add, the names of the norms mean others.
_POST_NORMED = {
    "layers/attn_out_norm": Stored("model.layers.{}.post_attention_layernorm.weight", "D", ("D",)),
    "layers/mlp_norm": Stored("model.layers.{}.pre_feedforward_layernorm.weight", "D", ("D",)),
    "layers/mlp_out_norm": Stored("model.layers.{}.post_feedforward_layernorm.weight", "D", ("D",)),
}


class Tensor(NamedTuple):
    """One tensor of a checkpoint: (a layer of) the parameter at `path`."""

    path: str
    layer: int | None  # its place in the stack
    stored: Stored
    name: str
    shape: tuple[int, ...]  # of our array, without the layer axis
    stored_shape: tuple[int, ...]


def tensors_of(spec: DecoderSpec) -> Iterator[Tensor]:
    """Every tensor a checkpoint of this model has, in the order they are written."""
    names = TENSORS | (_POST_NORMED if spec.post_norms else {})
    for path, param in flat_table(spec).items():
        stacked = param.axes[0] == "layers"
        shape = param.shape[1:] if stacked else param.shape
        stored = names[path]
        size = dict(zip(stored.ours, shape, strict=True))
        stored_shape = tuple(math.prod(size[a] for a in axes) for axes in stored.stored)
        if not stacked:
            yield Tensor(path, None, stored, stored.name, shape, stored_shape)
            continue
        for place, layer in enumerate(holders(spec, path.removeprefix("layers/"))):
            yield Tensor(path, place, stored, stored.name.format(layer), shape, stored_shape)


def flat_table(spec: DecoderSpec) -> dict[str, Param]:
    return flatten_dict(param_table(spec), sep="/")


def to_ours(tensor: Tensor, array: np.ndarray) -> np.ndarray:
    ours, axes = tensor.stored.ours, "".join(tensor.stored.stored)
    size = dict(zip(ours, tensor.shape, strict=True))
    return array.reshape([size[a] for a in axes]).transpose([axes.index(a) for a in ours])


def to_stored(tensor: Tensor, array: np.ndarray) -> np.ndarray:
    """C-contiguous: safetensors writes the buffer of an array as it lies in memory."""
    ours, axes = tensor.stored.ours, "".join(tensor.stored.stored)
    moved = array.transpose([ours.index(a) for a in axes]).reshape(tensor.stored_shape)
    return np.ascontiguousarray(moved)
