"""The command lines of train.py, eval.py and fgrpo_jax.rank. Nothing here imports JAX, so that `--help` is quick."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from fgrpo_jax.config import Config, ConfigError, EvalConfig, MeshConfig, RunConfig
from fgrpo_jax.config_files import load_file
from fgrpo_jax.errors import UserError
from fgrpo_jax.files import path_of
from fgrpo_jax.run.validation import check_types

MAX_CANDIDATES = 256  # of a query that is ranked: attention over a pool grows with its square
DEFAULT = Path(__file__).parents[2] / "configs" / "synthetic.py"


def parse_training(argv: list[str], description: str, prog: str = "train.py") -> RunConfig:
    """The configuration: a file's `get_config()` (first argument; else DEFAULT), overridden by flags.

    Raises ConfigError for a file that cannot be read; exits as tyro does for flags.
    """
    rest, path = list(argv), DEFAULT
    if rest and not rest[0].startswith("-"):
        path = Path(rest.pop(0))
    default = load_file(path)
    check_types(default)
    return tyro.cli(type(default), default=default, args=rest, prog=prog, description=description)


def parse_run(argv: list[str], description: str) -> tuple[RunConfig, bool]:
    """The configuration of a training, and whether `--dry-run` is among the arguments."""
    rest = [argument for argument in argv if argument != "--dry-run"]
    return parse_training(rest, description), len(rest) < len(argv)


@dataclasses.dataclass(frozen=True)
class Judged:
    """Where the queries and candidates come from."""

    name: str
    """Data set, as the configuration's data.name."""
    manual_dir: str
    """Folder with the raw files of the data set; one that is made (as synthetic, next_item) reads none."""
    prepared_dir: str
    """Where prepared data sets are kept."""
    pool: Literal["open", "closed"]
    """Targets that the first stage missed, as the configuration's data.pool: lost, or put into the pool."""
    prompt_buckets: tuple[int, ...] = ()
    """Padded prompt lengths, ascending; empty: those each policy was trained with."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    split: str
    """Split to evaluate on, as test; empty: eval.split."""
    compare: tuple[str, ...]
    """Other run directories, evaluated on the same candidates as NAME.STAGE."""
    data: Judged
    eval: EvalConfig
    mesh: MeshConfig


def parse_evaluation(argv: list[str], description: str) -> tuple[Path, Arguments]:
    """The run directory, and the arguments over the run's own configuration."""
    run_dir, config = Path("RUN_DIR"), Config()
    if argv and not argv[0].startswith("-"):
        from fgrpo_jax.run.directory import read_config  # slow to import, and help needs none of it

        run_dir = path_of(argv[0])
        config = read_config(run_dir)
        argv = argv[1:]
    elif not {"-h", "--help"} & set(argv):
        raise ConfigError("give the run directory first: python eval.py RUN_DIR [--split test]")
    default = Arguments(split="", compare=(), data=source_of_data(config), eval=config.eval, mesh=config.mesh)
    prog = "eval.py RUN_DIR"
    return run_dir, tyro.cli(Arguments, default=default, args=argv, prog=prog, description=description)


@dataclasses.dataclass(frozen=True)
class RankArguments:
    stage: str
    """A finished stage, or a selection that the evaluation has a row of; empty: the last finished stage."""
    samples: int
    """Lists that are drawn for every query, beside the greedy one."""
    seed: int
    """Of what is drawn, with the place of a line and batch_queries."""
    batch_queries: int
    """Lines computed at once: output comes when so many were read, or the input ended."""
    max_candidates: int
    """A line with more is in error."""
    mesh: MeshConfig


def parse_ranking(argv: list[str], description: str) -> tuple[str, str, RankArguments]:
    """The run directory, the file of queries, and the arguments over the run's own configuration."""
    paths, config = ("RUN_DIR", "QUERIES"), Config()
    if len(argv) > 1 and not any(text.startswith("-") and text != "-" for text in argv[:2]):
        from fgrpo_jax.run.methods import read_config  # slow to import, and help needs none of it

        paths, argv = (argv[0], argv[1]), argv[2:]
        config = read_config(path_of(paths[0]))
    elif not {"-h", "--help"} & set(argv):
        raise ConfigError(
            "give the run directory and the queries first: python -m fgrpo_jax.rank RUN_DIR queries.jsonl"
        )
    default = RankArguments("", 0, 0, config.eval.batch_queries, MAX_CANDIDATES, config.mesh)
    prog = "python -m fgrpo_jax.rank RUN_DIR QUERIES"
    return *paths, tyro.cli(RankArguments, default=default, args=argv, prog=prog, description=description)


def source_of_data(config: RunConfig) -> Judged:
    return Judged(config.data.name, config.data.manual_dir, config.data.prepared_dir, config.data.pool)


def parse_or_exit(parse: Callable, argv: list[str], description: str) -> Any:
    """What `parse` returns; where it refuses, the program ends with its line and code 2."""
    try:
        return parse(argv, description)
    except UserError as error:
        sys.exit(refuse(error))


def refuse(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2
