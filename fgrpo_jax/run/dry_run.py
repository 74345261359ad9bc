"""What a training would begin with, told without a step: `train.py --dry-run`."""

from __future__ import annotations

from collections.abc import Iterator

import jax

from fgrpo_jax import policies
from fgrpo_jax.data.batches import make_batches
from fgrpo_jax.run.experiment import Experiment
from fgrpo_jax.stages import stages
from fgrpo_jax.types import PyTree, RankingExample


def lines(experiment: Experiment) -> Iterator[str]:
    """Shapes of every stage that would be trained, then an example.

    Raises DataError and ConfigError for a query that cannot be encoded.
    """
    for name, stage in stages(experiment.config).items():
        if stage.steps:
            batch = make_batches(experiment.dataset, experiment.config, name, stage).batch_at(0)
            yield f"\n{name}"
            yield from (f"  {line}" for line in _arrays(experiment.policy(name).encode(batch)))
    yield from ["", "example", *_example(experiment)]
    yield "\nnothing was trained or written to the run directory; without --dry-run this would start"


def _arrays(query: PyTree) -> Iterator[str]:
    yield "first batch:"
    for path, array in jax.tree_util.tree_leaves_with_path(query):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        yield f"  {name} {array.dtype} {list(array.shape)}"


def _example(experiment: Experiment) -> list[str]:
    """A training query as its policy is shown it, and what it would imitate; or as it is."""
    seen = policies.example(experiment.config, experiment.dataset)
    if seen:
        prompt, transcript = seen
        return [prompt, f"--- and the transcript to imitate, from the labels, {'-' * 20}", transcript]
    split = "train" if "train" in experiment.dataset.splits else next(iter(experiment.dataset.splits))
    return as_it_is(experiment.dataset.splits[split][0])


def as_it_is(example: RankingExample) -> list[str]:
    """Its texts, and the gain of each candidate."""
    said = [f"query {example.query_id}: {example.query}".rstrip(": ")]
    if example.history:
        said.append(f"history: {', '.join(text for _, text in example.history)}")
    rows = zip(example.candidates, example.relevance, strict=True)
    return said + [f"  {gain:g}  {text}" for (_, text), gain in rows]
