"""Rows of a table, whose gradients are added in float32 and, on GPUs, in one order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from fgrpo_jax.models import layers

ROWS, WIDTH = 7, 3


@pytest.mark.parametrize("index", [[3], [0, 6, 6, 2, 6, 0, 0, 6], list(range(7)), [5] * 9, [-1, 6, -7, 0]])
@pytest.mark.parametrize("add", [layers.add_scattered, layers.add_in_order])
def test_gradients_are_sums_of_what_belongs_to_a_row(add, index, monkeypatch):
    """Of rows that occur once, often and never, the first and the last; counted from the end too."""
    monkeypatch.setattr(layers, "add_scattered", add)
    rng = np.random.default_rng(0)
    table, weight = (jnp.asarray(rng.normal(size=(n, WIDTH)), jnp.float32) for n in (ROWS, len(index)))
    index = jnp.array(index)

    @quick_jit
    def of(table):
        return jax.value_and_grad(lambda table: (layers.take(table, index) ** 2 * weight).sum())(table)

    value, grad = of(table)
    wanted = np.zeros((ROWS, WIDTH))
    np.add.at(wanted, np.asarray(index), 2 * np.float64(table)[index] * weight)
    np.testing.assert_allclose(grad, wanted, atol=1e-6)
    np.testing.assert_allclose(value, (np.float64(table)[index] ** 2 * weight).sum(), rtol=1e-5)


@pytest.mark.parametrize("add", [layers.add_scattered, layers.add_in_order])
def test_it_is_mapped_over_queries(add):
    rng = np.random.default_rng(1)
    index, x = jnp.asarray(rng.integers(0, ROWS, (4, 20))), jnp.asarray(rng.normal(size=(4, 20, WIDTH)), jnp.float32)
    found = quick_jit(jax.vmap(functools.partial(add, ROWS)))(index, x)
    wanted = np.zeros((4, ROWS, WIDTH))
    for total, i, row in zip(wanted, index, x, strict=True):
        np.add.at(total, np.asarray(i), np.float64(row))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_frequent_token_keeps_its_gradient_in_bfloat16():
    """2,000 times 1: added in bfloat16 it stops at 256, where 1 more is rounded off."""
    table, index = jnp.zeros((3, 1), jnp.bfloat16), jnp.ones(2000, jnp.int32)

    def grad(take):
        return quick_jit(jax.grad(lambda table: take(table, index).astype(jnp.float32).sum()))(table)[:, 0]

    assert grad(layers.take).tolist() == [0, 2000, 0] and grad(lambda table, index: table[index])[1] == 256
