"""Attention of rows to one part's keys, in Pallas kernels that never write scores to memory.

What attention_blocks.part_forward and part_backward compute, as FlashAttention-2 does it
(arXiv 2307.08691, algorithms 1 and 2), in three kernels over a grid of (query and kv head, block):

    forward   a block of rows walks over blocks of keys with a running softmax
    d_q       the same walk; weights come back from the log-sum-exp over all parts
    d_k, d_v  a block of keys walks over blocks of rows, so nothing is added to twice

A row sees the keys up to its own `last`, or from its `first` to there. Blocks of keys before or after
those that rows of a block see are not visited, nor, in the third kernel, the leading blocks of rows that
do not see the block of keys (nor, of windows, the trailing ones): half of causal attention, a padded
prompt's rest, and what windows leave out. Where a walk begins and ends is computed before the
kernel. It departs from the paper in that rows need not be ordered, and in that
scores of keys out of sight are masked in every block.

One source serves Triton (GPU) and Mosaic (TPU): blocks are an axis of their own, chosen by the
leading index of a reference, and what belongs to each row lies as [blocks, 1, rows]. `Target`
holds what differs. On TPU what is walked over stays in VMEM, all of it for one query and kv head,
which bounds rows and keys (bfloat16, 128 channels): 65 000 fit 128 MiB, 32 000 fit 64 MiB. TPU v4
and older have 16 MiB, too little for long prompts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as mosaic
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec

from fgrpo_jax import shards
from fgrpo_jax.types import Array

_MASKED = -1e30  # finite: a row that sees nothing gives no nan, and weighs nothing among parts
_WIDE = jnp.float32


class Target(NamedTuple):
    """What differs between platforms."""

    held: int  # rows (or keys) of a block that walks, if they are of 256 bytes or less ...
    walked: int  # ... and of a block it walks over ...
    walked_back: int  # ... in the backward pass, which reads twice as many arrays
    least: int  # rows (or keys) of the smallest block
    params: Callable[[int], Any]  # of the compiler, from the bytes that all the blocks of a step fill
    scalars: Any = None  # where a kernel finds single numbers
    interpret: bool = False


def _triton(_: int) -> triton.CompilerParams:
    return triton.CompilerParams(num_warps=8, num_stages=2)


def _mosaic(size: int) -> mosaic.CompilerParams:
    """VMEM for the blocks of two steps, of which one is being fetched, and for scores."""
    return mosaic.CompilerParams(vmem_limit_bytes=2 * size + 16 * 2**20)


# On GPU, blocks fit the 99 KiB of shared memory that even small ones have, up to 128 channels.
GPU = Target(128, 64, 32, 16, _triton)
TPU = Target(512, 512, 512, 128, _mosaic, mosaic.SMEM)
INTERPRET = Target(32, 16, 16, 16, lambda size: None, interpret=True)  # as plain JAX, for tests


def part_forward(
    target: Target, q: Array, k: Array, v: Array, last: Array, first: Array | None = None
) -> tuple[Array, Array]:
    """Attention of rows to one part, and its log-sum-exp, in float32: [B,J,M,E] and [B,J,M].

    q: [B,J,M,E], scaled. k, v: [B,J,S,E]. last, first: int32, broadcastable to [B,J,M]; row m sees
    keys first <= s <= last; none: then its log-sum-exp is about -1e30 and its output finite.
    """
    return _split(_forward, target, 2, q, k, v, *_limits(q, last, first))


def part_backward(
    target: Target, q: Array, d_out: Array, lse: Array, delta: Array, k: Array, v: Array, last: Array,
    first: Array | None = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients of q, k, v in float32, given log-sum-exp and d_out . out of all parts [B,J,M]."""
    return _split(_backward, target, 3, q, d_out, lse, delta, k, v, *_limits(q, last, first))


def _limits(q: Array, last: Array, first: Array | None) -> list[Array]:
    return [jnp.broadcast_to(x, q.shape[:-1]) for x in (last, first) if x is not None]


# --------------------------------------------------------------------- devices


def runs_on(device: jax.Device) -> bool:
    """Whether the kernels compile for it.

    Triton wants compute capability 8.0; TPUs before v5 have too little VMEM for long prompts.
    """
    if device.platform == "tpu":
        return not device.device_kind.startswith(("TPU v2", "TPU v3", "TPU v4"))
    if device.platform != "gpu":
        return False
    capability = device.compute_capability  # "9.0"; of AMD's a name
    return capability.replace(".", "").isdigit() and float(capability) >= 8


def _split(function, target: Target, results: int, *args: Array) -> tuple[Array, ...]:
    """`function` of every device's own kv heads.

    XLA splits programs over the tensor axis, but kernels it cannot split; queries are split already
    (shards.by_query). Heads that the axis does not divide are computed by all of its devices.
    """
    function, mesh = functools.partial(function, target), jax.sharding.get_abstract_mesh()
    if "tensor" not in mesh.auto_axes or mesh.shape["tensor"] == 1:
        return function(*args)
    place = PartitionSpec(None, "tensor" if shards.tensor_parts(args[0].shape[1]) > 1 else None)
    return shards.over_tensor(function, place, (place,) * results)(*args)


# --------------------------------------------------------------------- kernels
#
# References: where the walk ends or begins, [1, blocks], or of windows both, [2, blocks]; the block that walks;
# the blocks walked over, [blocks, ...]; results, blocks like the first. The limits of what rows see are
# [1, rows], or of windows [2, rows]: the last key and the first.


def _forward_kernel(seen_ref, q_ref, limits_ref, k_ref, v_ref, out_ref, lse_ref):
    q, limits = q_ref[...], [_turn(limits_ref[n : n + 1]) for n in range(limits_ref.shape[0])]

    def step(i, state):
        out, peak, total = state
        score = _mask(_product(q, k_ref[i], 1), i, limits, 1, _MASKED)
        higher = jnp.maximum(peak, score.max(1, keepdims=True))
        weight, fade = jnp.exp(score - higher), jnp.exp(peak - higher)
        out = out * fade + _product(weight.astype(v_ref.dtype), v_ref[i], 0)
        return out, higher, total * fade + weight.sum(1, keepdims=True)

    none = jnp.full((q.shape[0], 1), _MASKED, _WIDE), jnp.zeros((q.shape[0], 1), _WIDE)
    out, peak, total = jax.lax.fori_loop(*_walk(seen_ref), step, (jnp.zeros(q.shape, _WIDE), *none))
    total = jnp.where(total == 0, 1.0, total)  # of blocks that see nothing
    out_ref[...] = out / total
    lse_ref[...] = _turn(peak + jnp.log(total))


def _walk(seen_ref):
    """The blocks of keys that some row of this block sees."""
    block = pl.program_id(1)
    return seen_ref[1, block] if seen_ref.shape[0] == 2 else 0, seen_ref[0, block]


def _d_q_kernel(seen_ref, q_ref, d_out_ref, lse_ref, delta_ref, limits_ref, k_ref, v_ref, d_q_ref):
    q, d_out = q_ref[...], d_out_ref[...]
    lse, delta = (_turn(x[...]) for x in (lse_ref, delta_ref))
    limits = [_turn(limits_ref[n : n + 1]) for n in range(limits_ref.shape[0])]

    def step(i, d_q):
        weight = _mask(jnp.exp(_product(q, k_ref[i], 1) - lse), i, limits, 1, 0.0)
        d_score = weight * (_product(d_out, v_ref[i], 1) - delta)
        return d_q + _product(d_score.astype(q.dtype), k_ref[i], 0)

    d_q_ref[...] = jax.lax.fori_loop(*_walk(seen_ref), step, jnp.zeros(q.shape, _WIDE))


def _d_kv_kernel(seen_by_ref, k_ref, v_ref, q_ref, d_out_ref, lse_ref, delta_ref, limits_ref, d_k_ref, d_v_ref):
    """Scores are transposed here, [keys, rows], as the sums over rows want them."""
    k, v, block = k_ref[...], v_ref[...], pl.program_id(1)

    def step(i, state):
        d_k, d_v = state
        limits = [limits_ref[i, n : n + 1] for n in range(limits_ref.shape[1])]
        weight = _mask(jnp.exp(_product(k, q_ref[i], 1) - lse_ref[i]), block, limits, 0, 0.0)
        d_v += _product(weight.astype(k.dtype), d_out_ref[i], 0)
        d_score = weight * (_product(v, d_out_ref[i], 1) - delta_ref[i])
        return d_k + _product(d_score.astype(k.dtype), q_ref[i], 0), d_v

    zero = jnp.zeros(k.shape, _WIDE)
    walk = seen_by_ref[0, block], seen_by_ref[1, block] if seen_by_ref.shape[0] == 2 else q_ref.shape[0]
    d_k_ref[...], d_v_ref[...] = jax.lax.fori_loop(*walk, step, (zero, zero))


def _mask(x: Array, block, limits: list[Array], axis: int, value: float) -> Array:
    """`x`, or `value` where a key, on `axis`, comes after the row's last, or before its first."""
    key = block * x.shape[axis] + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    visible = key <= limits[0]
    for first in limits[1:]:
        visible &= key >= first
    return jnp.where(visible, x, value)


def _product(one: Array, other: Array, axis: int) -> Array:
    """[X,Y] times [Z,Y] (axis 1) or [Y,Z] (axis 0)."""
    return jax.lax.dot_general(one, other, (((1,), (axis,)), ((), ())), preferred_element_type=_WIDE)


def _turn(x: Array) -> Array:
    """[1,X] -> [X,1] and back."""
    return x.T


# --------------------------------------------------------------------- blocks


def _forward(target: Target, q: Array, k: Array, v: Array, *limits: Array) -> tuple[Array, Array]:
    rows, keys = _size(target, target.held, q), _size(target, target.walked, k)
    held = [_cut(q, rows), _cut_limits(limits, rows)]
    walked = [_cut(x, keys) for x in (k, v)]
    like = [held[0], held[1][:, :, :1]]
    out, lse = _call(target, _forward_kernel, _seen(held[1], keys), held, walked, like)
    return _join(out, q.shape), _join(lse, q.shape[:-1])


def _backward(
    target: Target, q: Array, d_out: Array, lse: Array, delta: Array, k: Array, v: Array, *limits: Array
) -> tuple[Array, Array, Array]:
    def by_row(size: int) -> list[Array]:
        scalars = _cut_scalars(lse, size, 0), _cut_scalars(delta, size, 0), _cut_limits(limits, size)
        return [_cut(q, size), _cut(d_out, size), *scalars]

    rows, keys = _size(target, target.held, q), _size(target, target.walked_back, k)
    held, walked = by_row(rows), [_cut(x, keys) for x in (k, v)]
    (d_q,) = _call(target, _d_q_kernel, _seen(held[-1], keys), held, walked, held[:1])

    rows, keys = _size(target, target.walked_back, q), _size(target, target.held, k)
    held, walked = [_cut(x, keys) for x in (k, v)], by_row(rows)
    seen_by = _seen_by(walked[-1], keys, held[0].shape[1])
    d_k, d_v = _call(target, _d_kv_kernel, seen_by, held, walked, held)
    return _join(d_q, q.shape), _join(d_k, k.shape), _join(d_v, v.shape)


def _seen(limits: Array, keys: int) -> Array:
    """[N, 1 or 2, row blocks]: the end of the blocks of keys that rows of a block see, and of windows the start."""
    end = limits[:, :, :1].max((2, 3)) // keys + 1
    if limits.shape[2] == 1:
        return end[:, None]
    return jnp.stack([end, jnp.maximum(limits[:, :, 1:].min((2, 3)), 0) // keys], 1)


def _seen_by(limits: Array, keys: int, blocks: int) -> Array:
    """[N, 1 or 2, key blocks]: the first block of rows that sees a block of keys, and of windows the end of those."""
    start = keys * jnp.arange(blocks)
    sees = limits[:, :, :1].max((2, 3)) >= start[:, None, None]  # [key block, N, row block]
    if limits.shape[2] == 2:
        sees &= limits[:, :, 1:].min((2, 3)) < (start + keys)[:, None, None]
    first = jnp.where(sees.any(-1), sees.argmax(-1), sees.shape[-1]).T.astype(jnp.int32)
    if limits.shape[2] == 1:
        return first[:, None]
    return jnp.stack([first, (sees.shape[-1] - sees[..., ::-1].argmax(-1)).T.astype(jnp.int32)], 1)


def _call(target: Target, kernel, bound: Array, held: list[Array], walked: list[Array], like: list[Array]):
    """Run `kernel` on every block of `held`: results in float32, blocks like those of `like`."""

    def one(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda n, i: (n, i, 0, 0))

    def all_of(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda n, i: (n, 0, 0, 0))

    def filled(x: Array, axes: int) -> int:
        """Bytes of a step in memory whose tiles are 8 x 128."""
        shape = *x.shape[axes:-2], -(-x.shape[-2] // 8) * 8, -(-x.shape[-1] // 128) * 128
        return x.dtype.itemsize * math.prod(shape)

    size = sum(filled(x, 2) for x in held + like) + sum(filled(x, 1) for x in walked)
    in_specs = [pl.BlockSpec((None, *bound.shape[1:]), lambda n, i: (n, 0, 0), memory_space=target.scalars)]
    return pl.pallas_call(
        kernel,
        grid=held[0].shape[:2],
        in_specs=in_specs + [one(x) for x in held] + [all_of(x) for x in walked],
        out_specs=[one(x) for x in like],
        out_shape=[jax.ShapeDtypeStruct(x.shape, _WIDE) for x in like],
        compiler_params=target.params(size),
        interpret=target.interpret,
        name=kernel.__name__.strip("_"),
    )(bound, *held, *walked)


def _size(target: Target, size: int, x: Array) -> int:
    """Of a block of x [..., X, E]: fewer if they are wide, and not much more than there are."""
    size = size * 256 // max(256, pl.next_power_of_2(x.shape[-1]) * x.dtype.itemsize)
    return max(target.least, min(size, pl.next_power_of_2(x.shape[-2])))


def _cut(x: Array, size: int) -> Array:
    """[B,J,X,E] -> [B*J, blocks, size, E], the last block filled up with zeros."""
    x = x.reshape(-1, *x.shape[2:])
    head = max(16, pl.next_power_of_2(x.shape[-1]))  # what Triton multiplies
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), (0, head - x.shape[-1])])
    return x.reshape(x.shape[0], -1, size, head)


def _cut_scalars(x: Array, size: int, fill: int) -> Array:
    """[B,J,X] -> [B*J, blocks, 1, size]."""
    x = x.reshape(-1, x.shape[-1])
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)], constant_values=fill)
    return x.reshape(x.shape[0], -1, 1, size)


def _cut_limits(limits: tuple[Array, ...], size: int) -> Array:
    """[B,J,X] each -> [B*J, blocks, 1 or 2, size]; filled up with rows that see nothing, wherever a walk begins."""
    fills = -1, jnp.iinfo(jnp.int32).max
    return jnp.concatenate([_cut_scalars(x, size, fill) for x, fill in zip(limits, fills, strict=False)], 2)


def _join(x: Array, shape: tuple[int, ...]) -> Array:
    """Inverse of both."""
    if len(shape) == 3:
        return x.reshape(x.shape[0], -1)[:, : shape[-1]].reshape(shape)
    return x.reshape(x.shape[0], -1, x.shape[-1])[:, : shape[-2], : shape[-1]].reshape(shape)
