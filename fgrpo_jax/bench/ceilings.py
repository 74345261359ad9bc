"""What the machine could do at most: the rates that bench.py compares a step with."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fgrpo_jax.bench.measure import timed
from fgrpo_jax.types import Array


def ceilings(dtype: str) -> tuple[float, float]:
    """What a step is compared with here: GFLOP/s of matrix products in the compute type, GB/s of copies.

    On a GPU they are short: several in one program, so that its launch does not count.
    """
    if jax.default_backend() == "cpu":
        return matmul_gflops(dtype, 4096, 1), copy_gbytes(2**28, 1)
    return matmul_gflops(dtype, 8192, 16), copy_gbytes(2**30, 16)


def matmul_gflops(dtype: str, size: int, count: int, repeats: int = 3) -> float:
    """Rate of `count` size x size matrix products, of random numbers: constants run faster on GPUs."""
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype) * size**-0.5
    return 2 * size**3 * count / _fastest(_repeated(lambda y: y @ x, count), x.copy(), repeats) / 1e9


def copy_gbytes(size: int, count: int, repeats: int = 3) -> float:
    """GB/s read and written by `count` copies of `size` bytes, in place."""
    copy = _repeated(lambda y: y + 1, count)
    return 2 * size * count / _fastest(copy, jnp.zeros(size // 4, jnp.float32), repeats) / 1e9


def _repeated(once: Callable, count: int) -> Callable:
    many = once if count == 1 else lambda x: jax.lax.fori_loop(0, count, lambda _, y: once(y), x)
    return jax.jit(many, donate_argnums=0)


def _fastest(program: Callable, x: Array, repeats: int) -> float:
    """Seconds of the fastest call, after one that compiles; each takes what the last one gave."""
    seconds = []
    for _ in range(repeats + 1):
        s, x = timed(program, x)
        seconds.append(s)
    return min(seconds[1:])
