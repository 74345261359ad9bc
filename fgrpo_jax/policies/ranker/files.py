"""What a run directory says of its ranker: items.json, with the items it numbers and its sizes.

With it the directory can be moved and used where the data that it was trained on are not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from fgrpo_jax.config import ConfigError
from fgrpo_jax.files import read_json, write_atomically
from fgrpo_jax.policies.ranker.network import RankerSpec
from fgrpo_jax.types_of_policies import PolicyFiles

_ITEMS = "items.json"
# Not described: how it is computed, which may differ, and what the policies of one run differ in.
_NOT_DESCRIBED = ("dtype", "remat", "two_phase")


class Catalogue(NamedTuple):
    """items: their ids; the number of the first is 1. counts: how often each was consumed in training."""

    items: tuple[str, ...]
    counts: tuple[int, ...]


def saved_catalogue(run_dir: Path) -> Catalogue | None:
    """None for a run that has none yet. Raises ConfigError for a file that is damaged."""
    path = run_dir / _ITEMS
    if not path.is_file():
        return None
    found = read_json(path, ("items", "counts"))
    return Catalogue(tuple(found["items"]), tuple(found["counts"]))


def policy_files(spec: RankerSpec, catalogue: Catalogue) -> PolicyFiles:
    sizes = {name: value for name, value in spec._asdict().items() if name not in _NOT_DESCRIBED}

    def save(run_dir: Path) -> None:
        if not (run_dir / _ITEMS).is_file():
            described = {**catalogue._asdict(), "sizes": sizes}
            write_atomically(run_dir / _ITEMS, json.dumps(described) + "\n")

    def check(run_dir: Path) -> None:
        found = saved_catalogue(run_dir)
        if found is None:
            raise ConfigError(f"{run_dir} holds no {_ITEMS}: give its training command again, which writes it")
        if found.items != catalogue.items:
            alone = len({*found.items} ^ {*catalogue.items})
            raise ConfigError(
                f"{run_dir} numbers other items than these data have ({len(found.items):,} and "
                f"{len(catalogue.items):,}, {alone:,} of one alone), so its networks cannot read them: restore the "
                "data that it was trained on, or train anew in another run_dir"
            )
        if found.counts != catalogue.counts:
            raise ConfigError(
                f"{run_dir} was trained on other queries: how often they take each item ({_ITEMS}), which its networks "
                "read, differs from these data: restore those, or train anew in another run_dir"
            )
        theirs = read_json(run_dir / _ITEMS, ("sizes",))["sizes"]
        if differing := [name for name in sizes if theirs.get(name) != sizes[name]]:
            lines = "; ".join(f"{name}: {theirs.get(name)} -> {sizes[name]}" for name in differing)
            raise ConfigError(f"{run_dir} holds another ranker: {lines}; configure it as it was, or train anew")

    return PolicyFiles(save, check, {})
