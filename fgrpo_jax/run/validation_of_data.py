"""What makes the settings of a data set impossible: the part of validation.py that is about `data`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fgrpo_jax.config import DataConfig, InteractionsConfig, IrConfig, RunConfig
from fgrpo_jax.config_files import differences

if TYPE_CHECKING:
    from fgrpo_jax.run.validation import Registries

# Settings of `data` that only some data sets read.
_READERS = {
    "kcore": ("goalrank_ml1m", "goalrank_book"),
    "retrieved": ("goalrank_ml1m", "goalrank_book"),
    "pool_size": ("interactions", "ir", "lastfm", "next_item"),
    "pool": ("goalrank_ml1m", "goalrank_book", "interactions", "ir"),
}


def unread(d: DataConfig, names: Iterable[str] = tuple(_READERS)) -> list[str]:
    """Which of these settings are not at their default though the data set does not read them."""
    default = DataConfig()
    return [
        f"data.{name}={getattr(d, name)!r}: data.name={d.name!r} does not read it; leave it at its default, "
        f"{getattr(default, name)!r}"
        for name in names
        if getattr(d, name) != getattr(default, name) and d.name not in _READERS[name]
    ]


def unknown(where: str, names: Iterable[str], known: frozenset[str]) -> list[str]:
    listed = ", ".join(sorted(known))
    return [f"{where}: {name!r} is not one of {listed}" for name in names if name not in known]


def data_problems(config: RunConfig, known: Registries) -> list[str]:
    """Of what every data set has."""
    d, problems = config.data, unknown("data.name", [config.data.name], known.datasets)
    if d.prompt_buckets != "auto" and not _ascending(d.prompt_buckets):
        problems.append(f"data.prompt_buckets={d.prompt_buckets} must be ascending, distinct and positive")
    if d.pool_size < 2:
        problems.append(f"data.pool_size={d.pool_size} must be at least 2")
    if d.kcore < 1:
        problems.append(f"data.kcore={d.kcore} must be positive")
    if d.retrieved < 12:
        problems.append(f"data.retrieved={d.retrieved} must be at least 12, two lists of six")
    if not 0 <= d.history_dropout < 1:
        problems.append(f"data.history_dropout={d.history_dropout} must be in [0, 1)")
    if d.history_max < 1:
        problems.append(f"data.history_max={d.history_max} must be at least 1")
    if d.name in known.datasets and not d.manual_dir and (needed := known.raw_files(d.name)):
        problems.append(f"data.name={d.name!r} reads files: set data.manual_dir to their folder, of {needed}")
    return problems


def _ascending(sizes: tuple[int, ...]) -> bool:
    return bool(sizes) and list(sizes) == sorted({*sizes}) and sizes[0] >= 1


def own_data_problems(config: RunConfig) -> list[str]:
    """Options of data sets that have options of their own: set for another one, or impossible."""
    d, problems = config.data, unread(config.data)
    for name, check in {"interactions": _check_interactions, "ir": _check_ir, "synthetic": _check_synthetic}.items():
        if d.name == name:
            problems += check(d)
            field, size = ("synthetic.pool", d.synthetic.pool) if name == "synthetic" else ("pool_size", d.pool_size)
            if size < max(config.limits()):
                problems.append(
                    f"data.{field}={size} is smaller than the lists, of up to {max(config.limits())} items: "
                    "raise it, or shorten the lists"
                )
            continue
        default = getattr(DataConfig(), name)
        problems += [
            f"{line}: data.name={d.name!r} does not read it; leave it at its default, or set data.name={name!r}"
            for line in differences(default, getattr(d, name), f"data.{name}").values()
        ]
    return problems


def _check_interactions(d: DataConfig) -> list[str]:
    c, where, problems = d.interactions, "data.interactions", []
    for name in ("kcore", "targets", "windows", "min_history"):
        if getattr(c, name) < 1:
            problems.append(f"{where}.{name}={getattr(c, name)} must be at least 1")
    if c.history < d.history_max:
        problems.append(f"{where}.history={c.history} is below data.history_max={d.history_max}: raise it")
    columns = [c.user, c.item, c.time, *([c.rating] if c.rating else [])]
    if not all((*columns, c.item_id, *c.text)) or not c.text:
        problems.append(f"{where}: user, item, time, item_id and text must name columns")
    if len(set(columns)) < len(columns) or len(set(c.text)) < len(c.text):
        problems.append(f"{where}: user, item, time, rating are different columns, and text names none twice")
    if not c.rating and (c.min_rating or c.gain == "rating"):
        problems.append(f"{where}.min_rating and gain='rating' need {where}.rating, the column of ratings")
    if not math.isfinite(c.min_rating):
        problems.append(f"{where}.min_rating={c.min_rating} must be finite")
    if not (min(c.held_out) > 0 and sum(c.held_out) < 1):
        problems.append(f"{where}.held_out={c.held_out} must be shares above 0 that leave some for training")
    default = InteractionsConfig()
    if c.split != "time" and c.held_out != default.held_out:
        problems.append(f"{where}.held_out={c.held_out} is read with split='time' only: leave it at its default")
    if c.candidates != "file" and c.candidates_file:
        problems.append(f"{where}.candidates_file is read with candidates='file' only: set that, or leave it empty")
    if c.candidates in ("uniform", "popularity") and d.pool != "open":
        problems.append(f"data.pool={d.pool!r}: pools that are drawn ({where}.candidates) always hold their targets")
    if (c.candidates in ("uniform", "popularity") or d.pool == "closed") and c.targets >= d.pool_size:
        problems.append(f"{where}.targets={c.targets} leave no room for others in data.pool_size={d.pool_size}")
    return problems


def _check_ir(d: DataConfig) -> list[str]:
    c, problems = d.ir, []
    if c.first_stage != "run" and c.run_file != IrConfig().run_file:
        problems.append(f"data.ir.run_file={c.run_file!r} is read with first_stage='run' only: set that")
    if not c.run_file:
        problems.append("data.ir.run_file must name a file")
    return problems


def _check_synthetic(d: DataConfig) -> list[str]:
    c, where, problems = d.synthetic, "data.synthetic", []
    low, high = c.wanted
    if c.seed < 0:
        problems.append(f"{where}.seed={c.seed} must not be negative")
    if not 1 <= c.interests <= 8:
        problems.append(f"{where}.interests={c.interests} must be 1 to 8: there are 16 shelves")
    if not 1 <= low <= high <= 20:
        problems.append(f"{where}.wanted={c.wanted} must be two numbers from 1 to 20, ascending")
    if not c.interests * high + 2 <= c.pool <= 1000:
        problems.append(
            f"{where}.pool={c.pool} must be from {c.interests * high + 2}, room for the wanted ones of every interest "
            "and two others, to 1000"
        )
    if not 0 < c.concentration <= 1000:
        problems.append(f"{where}.concentration={c.concentration} must be above 0 and at most 1000")
    if not 0 <= c.misplaced < 1:
        problems.append(f"{where}.misplaced={c.misplaced} must be in [0, 1)")
    if c.misplaced and c.pool < 2 * high:
        problems.append(f"{where}.misplaced needs room for {high} gains on other candidates: raise {where}.pool")
    return problems
