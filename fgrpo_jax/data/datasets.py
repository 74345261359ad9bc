"""Data sets: one TFDS builder each, all read back as `RankingExample`.

    dataset = datasets.load(cfg.data)
    dataset.splits["validation"][0]

A data set is prepared once, under `data.prepared_dir/NAME/FINGERPRINT/`, the fingerprint
being that of the raw files and of everything else the result depends on. A split whose raw
file is absent is absent from `splits`.

To add one: a module here with a subclass of `builder.RankingBuilder`, and a line in DATASETS.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fgrpo_jax.errors import UserError

if TYPE_CHECKING:
    from fgrpo_jax.config import DataConfig
    from fgrpo_jax.types import RankingExample

Item = tuple[str, str]  # (id, text)

# Module and class, by name: TensorFlow Datasets is only imported by the one that is used.
DATASETS = {
    "synthetic": "fgrpo_jax.data.synthetic:Synthetic",
    "next_item": "fgrpo_jax.data.next_item:NextItem",
    "lastfm": "fgrpo_jax.data.lastfm:Lastfm",
    "musique": "fgrpo_jax.data.musique:Musique",
    "hotpotqa": "fgrpo_jax.data.hotpotqa:Hotpotqa",
    "jsonl": "fgrpo_jax.data.jsonl:Jsonl",
    "interactions": "fgrpo_jax.data.interactions:Interactions",
    "ir": "fgrpo_jax.data.ir:Ir",
    "categories": "fgrpo_jax.data.categories:Categories",
    "goalrank_world": "fgrpo_jax.data.goalrank_world:GoalrankWorld",
    "goalrank_ml1m": "fgrpo_jax.data.goalrank:GoalrankMl1m",
    "goalrank_book": "fgrpo_jax.data.goalrank:GoalrankBook",
}


class DataError(UserError, ValueError):
    """Data that cannot be used; the message says what is wrong, where, and what to do."""


class Note(NamedTuple):
    """about: "time", where what is said of times makes their order doubtful, or "data"."""

    about: str
    text: str


def one_line(text: str) -> str:
    """Every run of white space as one space, none at the ends: an item is a line of the prompt."""
    if text.isprintable() and "  " not in text and text.strip() is text:  # most are; no other white space is printable
        return text
    return " ".join(text.split())


class Split(Sequence):
    """A random-access split whose rows are decoded when first asked for.

    query_ids: of all rows, in order.
    trainable: for all rows, whether there is anything to learn from (`is_trainable`).
    read: row indices -> examples; several at once are much faster than one by one.
    keep: hold decoded rows in memory (small rows only).
    has_lists: whether rows may hold shown lists.
    """

    BLOCK = 1024  # rows decoded at once while iterating

    def __init__(
        self,
        read: Callable[[list[int]], list[RankingExample]],
        query_ids: Sequence[str],
        trainable: Sequence[bool],
        keep: bool,
        has_lists: bool = True,
    ):
        self.query_ids, self.trainable = tuple(query_ids), tuple(trainable)
        self._read, self._keep, self._has_lists = read, keep, has_lists
        self._rows: dict[int, RankingExample] = {}

    @functools.cached_property
    def relevant(self) -> tuple[bool, ...]:
        """For all rows, whether a candidate is relevant. Where rows may hold shown lists, all are read for it."""
        return tuple(map(has_relevant, self)) if self._has_lists else self.trainable

    def __len__(self) -> int:
        return len(self.query_ids)

    def __getitem__(self, index: int | slice) -> RankingExample | list[RankingExample]:
        chosen = range(len(self))[index]  # bounds and negative indices as in a list
        return self.rows(chosen) if isinstance(index, slice) else self.rows([chosen])[0]

    def __iter__(self) -> Iterator[RankingExample]:
        for start in range(0, len(self), self.BLOCK):
            yield from self.rows(range(start, min(start + self.BLOCK, len(self))))

    def rows(self, indices: Sequence[int]) -> list[RankingExample]:
        """The rows at `indices`, in that order; repetitions are allowed."""
        missing = sorted({i for i in indices if i not in self._rows})
        new = dict(zip(missing, self._read(missing), strict=True)) if missing else {}
        if self._keep:
            self._rows |= new
        return [new[i] if i in new else self._rows[i] for i in indices]


def has_relevant(example: RankingExample) -> bool:
    return any(gain > 0 for gain in example.relevance)


def is_trainable(example: RankingExample) -> bool:
    """Whether a candidate is relevant, or a list was shown: feedback that is all negative teaches too."""
    return has_relevant(example) or bool(example.logged)


def in_memory(examples: Iterable[RankingExample]) -> Split:
    """The same interface over examples already at hand."""
    rows = tuple(examples)
    ids, trainable = [r.query_id for r in rows], [is_trainable(r) for r in rows]
    return Split(lambda indices: [rows[i] for i in indices], ids, trainable, keep=False)


class Dataset(NamedTuple):
    """kind: "recommendation" or "qa": which prompt template fits.
    instruction: the default first line(s) of the prompt.
    catalogue: every item that can be a candidate; () where pools are given.
    splits: evaluation splits hold frozen pools in their frozen order. Where negatives are
        sampled, a training row's candidates are its relevant items only.
    fingerprints: content hash of each split (with the catalogue, where it is drawn from).
    weights: of the catalogue's items, where negatives are not drawn uniformly; else ().
    notes: what was found in the raw files and decided about it.
    """

    name: str
    kind: str
    instruction: str
    catalogue: tuple[Item, ...]
    splits: dict[str, Split]
    sampled_negatives: bool
    fingerprints: dict[str, str]
    weights: tuple[float, ...] = ()
    notes: tuple[Note, ...] = ()


def builder_class(name: str) -> Any:
    """The RankingBuilder of that name. Raises DataError for a name that does not exist."""
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}: data.name is one of {', '.join(DATASETS)}")
    module, _, attribute = DATASETS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def load(config: DataConfig, catalogue: Sequence[Item] | None = None) -> Dataset:
    """Prepare the data set unless it already is, and open it.

    catalogue: the items of a trained run, for raw files that name items but do not come
    with the list of them (a test file on its own).
    Raises DataError for raw files that are missing or malformed.
    """
    from fgrpo_jax.data import builder

    chosen = builder_class(config.name)
    given = None if catalogue is None else tuple((str(i), str(t)) for i, t in catalogue)
    return builder.load(chosen, config, given)
