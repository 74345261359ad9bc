"""Networks that score a candidate by what it stands beside: rerankers of the pool, to compare with.

Both read the pool as the first stage ordered it and are trained as the point-wise network is, on the same
labels, so that they differ from it in what they see alone. Their trunks have as many layers less what they
add, so they have about as many parameters.

    prm   (Pei et al., Personalized Re-ranking for Recommendation, 2019) self-attention over the pool, with
          embeddings of first-stage ranks. Theirs adds a pre-trained vector of the user; here the history is read.
    dlcm  (Ai et al., Learning a Deep Listwise Context Model for Ranking Refinement, 2018) a GRU over the pool
          from its last to its first candidate; its last state is the context that each output is compared with.
          Theirs is trained by AttRank on judged lists of one query; here, as all, by the likelihood of labels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fgrpo_jax.models.layers import take
from fgrpo_jax.policies.ranker import network
from fgrpo_jax.policies.ranker.network import RankerSpec
from fgrpo_jax.policies.ranker.query import RankerQuery
from fgrpo_jax.policies.ranker.scorers import POINTWISE, Scorer, score_of
from fgrpo_jax.types import Array, Param, PyTree

_PLACES = 100  # first-stage ranks with an embedding of their own; those beyond share the last


def first_stage_rank(query: RankerQuery) -> Array:
    """[B,C] int32: the place of every candidate by first-stage score, from 0, ties by index; padding comes last."""
    score_BC = jnp.where(network.present(query), query.retrieval, -jnp.inf)
    return jnp.argsort(jnp.argsort(-score_BC, axis=-1), axis=-1)


# --------------------------------------------------------------------- self-attention


def prm_table(spec: RankerSpec) -> PyTree:
    """Ranks have embeddings only where networks see the first stage's scores at all."""
    place = Param((_PLACES, spec.hidden_size), ("position", "embed"), "normal", decay=False)
    return network.pointwise_table(spec) | ({"place": place} if spec.sees_retrieval else {})


def prm_logits(spec: RankerSpec, params: PyTree, query: RankerQuery) -> Array:
    """[B,C] float32: of every candidate beside all others."""
    weights = network.whole(spec, prm_table(spec), params)
    x_BCD = network.candidates(spec, weights, query)
    if spec.sees_retrieval:
        x_BCD += take(weights["place"], jnp.minimum(first_stage_rank(query), _PLACES - 1))
    among = network.present(query)[:, None, None]  # [B,1,1,C]
    return score_of(weights, network.beside_history(spec, weights, query, x_BCD[:, None], among)[:, 0])


# --------------------------------------------------------------------- a recurrent network


def dlcm_table(spec: RankerSpec) -> PyTree:
    """A trunk of `num_layers`; the GRU stands in the place of the other networks' last `list_layers`."""
    square = Param((spec.hidden_size, spec.hidden_size), ("embed", "mlp"), "normal", decay=True)
    bias = Param((spec.hidden_size,), ("norm",), "normal", decay=False)
    gates = {f"{gate}_{part}": square for gate in ("update", "reset", "new") for part in ("in", "state")}
    biases = {f"{gate}_bias": bias for gate in ("update", "reset", "new")}
    return network.pointwise_table(spec._replace(list_layers=0)) | {
        "gru": gates | biases,
        "context": square,
        # At one, so that a score begins as what the GRU says: a product of two that are small learns nothing.
        "context_bias": bias._replace(init="ones"),
    }


def _gru(weights: PyTree, x_BCD: Array, there_BC: Array) -> tuple[Array, Array]:
    """Outputs [B,C,D] and the last state [B,D]; what is not there leaves the state as it was."""

    def step(state_BD: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
        x_BD, there_B = at

        def gate(name: str, of: Array) -> Array:
            return x_BD @ weights[f"{name}_in"] + of @ weights[f"{name}_state"] + weights[f"{name}_bias"]

        update, reset = jax.nn.sigmoid(gate("update", state_BD)), jax.nn.sigmoid(gate("reset", state_BD))
        new_BD = jnp.tanh(gate("new", reset * state_BD))
        state_BD = jnp.where(there_B[:, None], update * state_BD + (1 - update) * new_BD, state_BD)
        return state_BD, state_BD

    last_BD, out_CBD = jax.lax.scan(step, jnp.zeros_like(x_BCD[:, 0]), (jnp.moveaxis(x_BCD, 1, 0), there_BC.T))
    return jnp.moveaxis(out_CBD, 0, 1), last_BD


def dlcm_logits(spec: RankerSpec, params: PyTree, query: RankerQuery) -> Array:
    """[B,C] float32: of every candidate, beside those that the first stage ranks below it, and the whole pool."""
    weights = network.whole(spec, dlcm_table(spec), params)
    alone_BC1D = network.candidates(spec, weights, query)[:, :, None]
    itself = jnp.ones((1, 1, 1, 1), bool)
    x_BCD = network.beside_history(spec, weights, query, alone_BC1D, itself)[:, :, 0]
    rank_BC = first_stage_rank(query)
    best_last_BC = jnp.argsort(-rank_BC, axis=-1)
    sorted_BCD = jax.vmap(take)(x_BCD, best_last_BC)
    there_BC = jnp.take_along_axis(network.present(query), best_last_BC, 1)
    out_BCD, last_BD = _gru(weights["gru"], sorted_BCD, there_BC)
    context_BD = jnp.tanh(last_BD @ weights["context"] + weights["context_bias"])
    score_BC = score_of(weights, out_BCD * context_BD[:, None])
    return jax.vmap(take)(score_BC[..., None], rank_BC.shape[1] - 1 - rank_BC)[..., 0]


# What scores candidates one after the other, by the name of its policy.
SCORERS: dict[str, Scorer] = {
    "pointwise": POINTWISE,
    "dlcm": Scorer(dlcm_table, dlcm_logits),
    "prm": Scorer(prm_table, prm_logits),
}
