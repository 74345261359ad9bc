"""What a language model is given: prompts and the names of candidates as token ids."""

from __future__ import annotations

import flax.struct

from fgrpo_jax.types import Array


@flax.struct.dataclass
class Query:
    """A batch of encoded queries, on the device.

    Prompts are right-padded; a mask always comes from `prompt_len`, never from a token
    value. `identifiers` and `relevance` are padded with -1 and 0 beyond `n_candidates`.
    """

    prompt: Array  # [B,S] int32
    prompt_len: Array  # [B] int32, >= 1
    identifiers: Array  # [B,C,W] int32, -1 padded: how each candidate is named
    relevance: Array  # [B,C] float32
    n_candidates: Array  # [B] int32, >= 1
