"""Low-rank adapters (LoRA, arXiv 2106.09685): what is trained of a model whose weights stay as they are.

    x W  becomes  x W + alpha / rank * (x A) B,    A [in, rank] random, B [rank, out] zero at first

so a policy begins as its base. Adapters are parameters of their own: a stage's state, moments and checkpoints
hold nothing else, and the base is frozen beside them, perhaps in another type. The decoder takes a weight with
its adapter (`layers.Adapted`) for a weight: rollouts and log-probabilities compute the same sums, and no merged
copy exists, which in bfloat16 would round small adapters away.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fgrpo_jax.models.layers import Adapted
from fgrpo_jax.types import Array, Param, PyTree, map_params


class Lora(NamedTuple):
    """rank, alpha: as in the paper. projections: which weights of every layer have an adapter."""

    rank: int
    alpha: float
    projections: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


AXES_IN = {"o": 2, "delta_o": 2}  # axes of a projection's input; 1 elsewhere


def adapted(table: PyTree, lora: Lora) -> PyTree:
    """The table of a model with its adapters."""

    def with_adapter(name: str, base: Param) -> Param | Adapted:
        if name not in lora.projections:
            return base
        (stack, *shape), (stack_axis, *axes), n = base.shape, base.axes, AXES_IN.get(name, 1)
        a = Param((stack, *shape[:n], lora.rank), (stack_axis, *axes[:n], "rank"), "uniform", decay=True)
        b = Param((stack, lora.rank, *shape[n:]), (stack_axis, "rank", *axes[n:]), "zeros", decay=True)
        return Adapted(base, a, b, lora.scale)

    return {**table, "layers": {name: with_adapter(name, base) for name, base in table["layers"].items()}}


def smallest_side(table: PyTree, lora: Lora) -> tuple[str, int]:
    """Of a model's table without adapters: the adapted weight with the fewest inputs or outputs, and how many."""

    def side(name: str) -> int:
        shape, n = table["layers"][name].shape[1:], AXES_IN.get(name, 1)
        return min(math.prod(shape[:n]), math.prod(shape[n:]))

    name = min(lora.projections, key=side)
    return name, side(name)


def split(params: PyTree) -> tuple[PyTree, PyTree]:
    """Base and adapters of a tree, or table, of both."""
    layers = params["layers"]
    adapters = {name: {"a": w.a, "b": w.b} for name, w in layers.items() if isinstance(w, Adapted)}
    base = {name: w.base if isinstance(w, Adapted) else w for name, w in layers.items()}
    return {**params, "layers": base}, {"layers": adapters}


def join(base: PyTree, adapters: PyTree, lora: Lora) -> PyTree:
    """The tree that the decoder computes with."""
    layers = dict(base["layers"])
    for name, adapter in adapters["layers"].items():
        layers[name] = Adapted(layers[name], adapter["a"], adapter["b"], lora.scale)
    return {**base, "layers": layers}


def init(adapters: PyTree, key: Array, dtype: str) -> PyTree:
    """The first adapters of a table of them: A uniform within 1 / sqrt(inputs), as PEFT draws it, B zero."""
    count = 0

    def one(p: Param) -> Array:
        nonlocal count
        count += 1
        if p.init == "zeros":
            return jnp.zeros(p.shape, dtype)
        bound = 1 / math.sqrt(math.prod(p.shape[1:-1]))
        drawn = jax.random.uniform(jax.random.fold_in(key, count), p.shape, jnp.float32, -bound, bound)
        return drawn.astype(dtype)

    return map_params(one, adapters)


def merged(weight: Adapted) -> np.ndarray:
    """One layer's weight with its adapter in it, in float32 and on the host: a device need not have room for it."""
    w, a, b = (np.asarray(x).astype(np.float32) for x in (weight.base, weight.a, weight.b))
    low, wide = a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)
    return w + weight.scale * (low @ wide).reshape(w.shape)
