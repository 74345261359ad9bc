"""FLOPs of traced programs, against what can be counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from fgrpo_jax.run.compute import products

A, B = jnp.ones((3, 5)), jnp.ones((5, 5))
ONCE = 2 * 3 * 5 * 5


def scanned(a):
    return jax.lax.scan(lambda a, _: (a @ B, None), a, length=4)[0]


def either(a):
    return jax.lax.cond(a.sum() > 0, lambda a: a @ B @ B, lambda a: a @ B, a)


def until(a):
    return jax.lax.while_loop(lambda a: a.sum() < 9, lambda a: a @ B, a)


def batched(a):
    return jnp.einsum("bij,bjk->bik", jnp.stack([a, a]), jnp.stack([B, B]))


@pytest.mark.parametrize(
    "program, expected",
    [
        (lambda a: a + 1, 0),
        (jax.jit(lambda a: a @ B), ONCE),
        (batched, 2 * ONCE),
        (scanned, 4 * ONCE),
        (lambda a: jax.lax.map(scanned, jnp.stack([a, a])), 8 * ONCE),
        (either, 2 * ONCE),
        (until, None),
        (lambda a: jax.jit(until)(a @ B), None),
    ],
)
def test_products_are_counted_as_often_as_they_run(program, expected):
    assert products(jax.make_jaxpr(program)(A).jaxpr) == expected


def test_shards_are_counted_together():
    mesh, rows = AbstractMesh((4,), ("data",)), PartitionSpec("data")
    mapped = jax.shard_map(lambda a: a @ B, mesh=mesh, in_specs=rows, out_specs=rows)
    assert products(jax.make_jaxpr(mapped)(jnp.ones((8, 5))).jaxpr) == 2 * 8 * 5 * 5
