"""What data sets of questions have in common: the official files hold, for each question, paragraphs to choose from."""

from __future__ import annotations

from typing import Any

from fgrpo_jax.data.builder import RankingBuilder


class Questions(RankingBuilder, skip_registration=True):
    """Base of builders whose files, one a split, are read as they lie."""

    kind = "qa"
    instruction = "Choose and rank the passages that are needed to answer the question."

    def frozen(self, split: str) -> dict[str, Any]:
        return {"seed": None, "negatives": "the paragraphs of the official file, in its order"}
