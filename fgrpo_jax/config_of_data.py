"""The part of a configuration that is about `data`: see config.py, from which it is imported."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class InteractionsConfig:
    """Of the data set `interactions`: what users took and when, and a table of the items (data/interactions.py)."""

    interactions_file: str = ""
    """In data.manual_dir: .csv, .tsv, .jsonl or .parquet; empty: the one called `interactions`."""
    items_file: str = ""
    """The same of the items; empty: the one called `items`."""
    user: str = "user"
    """Column of the interactions, as are the next three."""
    item: str = "item"
    time: str = "time"
    """Numbers of any unit, or ISO 8601 dates."""
    rating: str = ""
    """Empty: there are no ratings."""
    item_id: str = "id"
    """Column of the items."""
    text: tuple[str, ...] = ("text",)
    """Columns of the items that make a candidate's text, in this order: as title genres."""
    min_rating: float = 0.0
    """Interactions that are rated lower are left out, of histories too."""
    gain: Literal["one", "rating"] = "one"
    """What a future item is worth."""
    kcore: int = 1
    """Interactions that every user and every item must have."""
    split: Literal["leave_one_out", "time"] = "leave_one_out"
    """Held out: the last items of every user, or what happened last over all users."""
    held_out: tuple[float, float] = (0.1, 0.1)
    """Shares of the interactions, the latest ones, for validation and for test (split time)."""
    targets: int = 1
    """Future items of a query, all of them relevant."""
    windows: int = 10
    """Training queries of a user at most, the newest ones."""
    min_history: int = 1
    """Items that a query's history must have."""
    history: int = 50
    """Items of a history that are kept, the newest ones; at least data.history_max."""
    candidates: Literal["uniform", "popularity", "als", "file"] = "uniform"
    """Pools of data.pool_size: the targets among items drawn uniformly or by popularity, or what a first stage
    retrieved (data.pool): matrix factorisation by the library implicit, or the lists of candidates_file."""
    candidates_file: str = ""
    """A retriever's lists, with columns `split`, `user`, `item` and `score`; empty: the one called `candidates`."""


@dataclasses.dataclass(frozen=True)
class IrConfig:
    """Of the data set `ir`: a retrieval test collection in the files of BEIR or TREC (data/ir.py)."""

    first_stage: Literal["bm25", "run"] = "bm25"
    """What retrieves the pools of data.pool_size documents: BM25, made here, or a TREC run."""
    run_file: str = "run.trec"
    """In data.manual_dir, of the queries of all splits."""


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Of the data set `synthetic`: a world that is made (data/synthetic.py)."""

    seed: int = 20263
    """Of the world; that of a run is another."""
    interests: int = 3
    """Shelves that a reader has read of; a visit is about one. With 1 nothing is left open."""
    concentration: float = 6.0
    """Of their shares: the higher, the more equal."""
    pool: int = 80
    """Candidates of a query."""
    wanted: tuple[int, int] = (3, 6)
    """How many of them are of each of the reader's shelves, from and to; those of one are relevant."""
    misplaced: float = 0.0
    """Share of the gains of training queries that are put on other candidates of the pool."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    name: str = "synthetic"
    """Data set: interactions, ir and jsonl (your own), synthetic, next_item, categories, lastfm, musique,
    hotpotqa, goalrank_world, goalrank_ml1m or goalrank_book."""
    manual_dir: str = ""
    """Folder with the raw files of the data set; one that is made (as synthetic, next_item) reads none."""
    prepared_dir: str = "~/.cache/fgrpo_jax"
    """Where prepared data sets are kept, one folder per data set and content fingerprint."""
    pool_size: int = 20
    """Candidates per training query where negatives are sampled (next_item, lastfm), and of every query
    (interactions, ir). Others have pools of their own (synthetic.pool, retrieved, their files)."""
    kcore: int = 20
    """Interactions that every user and every item must have (goalrank_ml1m, goalrank_book)."""
    retrieved: int = 50
    """Candidates that the first stage proposes (goalrank_ml1m, goalrank_book)."""
    pool: Literal["open", "closed"] = "open"
    """Targets that the first stage missed: lost, or put into the pool, where it shows that they were
    (goalrank_ml1m, goalrank_book, interactions, ir)."""
    history_max: int = 10
    """History items shown in the prompt: the most recent ones."""
    history_dropout: float = 0.0
    """Chance that a history item is left out of a training prompt (never the newest one)."""
    prompt_buckets: tuple[int, ...] | Literal["auto"] = (40, 256, 1024, 2048, 4096, 8192)
    """Padded prompt lengths, ascending, or auto: chosen from the data at the start and kept with the run. One program
    is compiled per bucket that occurs."""
    synthetic: SyntheticConfig = SyntheticConfig()
    interactions: InteractionsConfig = InteractionsConfig()
    ir: IrConfig = IrConfig()
