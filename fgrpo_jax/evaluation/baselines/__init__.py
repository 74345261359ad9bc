"""Baselines: they score the same candidates as the policies and are cut to the same list lengths."""

from fgrpo_jax.evaluation.baselines.base import Fit, Method, NotApplicable
from fgrpo_jax.evaluation.baselines.bm25 import fit_bm25
from fgrpo_jax.evaluation.baselines.covisitation import ORDERED, PLAIN, WINDOW, fit_covisitation
from fgrpo_jax.evaluation.baselines.simple import fit_popularity, fit_random, fit_retrieval

BASELINES: dict[str, Fit] = {
    "random": fit_random,
    "popularity": fit_popularity,
    "retrieval": fit_retrieval,
    "covisitation": fit_covisitation(PLAIN),
    "covisitation_window": fit_covisitation(WINDOW),
    "covisitation_ordered": fit_covisitation(ORDERED),
    "bm25": fit_bm25,
}

__all__ = ["BASELINES", "Fit", "Method", "NotApplicable"]
