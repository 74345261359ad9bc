"""What a traced program computes: FLOPs of its matrix products, a multiplication with its addition counting two."""

from __future__ import annotations

import math
from typing import Any

from jax.extend.core import Jaxpr, jaxprs_in_params


def products(jaxpr: Jaxpr) -> int | None:
    """FLOPs of the matrix products, those inside of calls too, and of a scan's body as often as it runs.

    Of a shard's program, times the devices of the mesh, so what several compute alike counts as often. None where a
    loop runs until something happens: how often is not said. Of alternatives the largest counts. Not counted are
    convolutions, ragged products and what is inside of Pallas kernels.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "while":
            return None
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        inner = [products(one) for one in jaxprs_in_params(params)]
        if None in inner:
            return None
        total += _times(name, params) * (max(inner, default=0) if name == "cond" else sum(inner))
    return total


def _times(name: str, params: dict[str, Any]) -> int:
    if name == "scan":
        return params["length"]
    return params["mesh"].size if name == "shard_map" else 1
