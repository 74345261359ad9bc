"""fgrpo_jax: train a language model to choose a slate and rank it, in one decoding."""

__version__ = "0.1.0"
