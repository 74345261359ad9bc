"""Rank new queries with a finished run: what its evaluation would write of them, and how sure the policy is.

    ranker = Ranker.open("runs/synthetic")
    ranked = ranker.rank("who wrote the song?", candidates=[("p1", "First passage."), ("p2", "Second.")])
    ranked.ranking, ranked.logp["rank"]

Queries are shown as an evaluation shows them: the candidates in an order drawn from (the run's seed, query id),
the newest items of the history. So a query with its id of the evaluation gets the lists that eval.py wrote.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fgrpo_jax import shards
from fgrpo_jax.config import ConfigError, MeshConfig
from fgrpo_jax.data import jsonl
from fgrpo_jax.data.batches import shown
from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.evaluation.evaluate import DIGITS
from fgrpo_jax.files import path_of
from fgrpo_jax.run import experiment as experiments
from fgrpo_jax.run import sharding
from fgrpo_jax.run.command import MAX_CANDIDATES
from fgrpo_jax.run.experiment import Experiment, random_key
from fgrpo_jax.run.methods import Method, open_method, read_config
from fgrpo_jax.types import PHASES, TRAINED, Lists, PyTree, RankingExample, Rollout

Written = list[list[tuple[list[int], list[int], int, list[float]]]]  # see _on_host
Item = tuple[str, str] | Mapping[str, str] | str  # (id, text), {"id": ..., "text": ...}, or what is both


class Ranked(NamedTuple):
    """What a policy wrote for a query. A phase that broke a rule (`outcome`) does not count.

    slate, ranking: ids of candidates; slate_index, ranking_index: their places in the query's own order.
    logp: natural log-probabilities of the choices in "slate" and "rank", and their "total"; None of a method
        that is no distribution over lists. Where there was one choice only nothing is added.
    samples: further lists, drawn from the policy.
    """

    query_id: str
    slate: tuple[str, ...]
    ranking: tuple[str, ...]
    slate_index: tuple[int, ...]
    ranking_index: tuple[int, ...]
    outcome: str
    logp: dict[str, float] | None
    samples: tuple[Ranked, ...] = ()


class Prepared(NamedTuple):
    """Rows of a batch, as they are shown and in which order, and the batch on the devices; None: nothing is left."""

    rows: list[tuple[RankingExample, np.ndarray] | DataError]
    query: PyTree | None


class Ranker:
    """A finished stage that ranks queries; compiled once for each shape of a batch.

    batch_queries: queries that are computed at once; fewer are filled up with one of them.
    max_candidates: of a query; more are refused.
    """

    def __init__(self, experiment: Experiment, method: Method, batch_queries: int, max_candidates: int):
        parts = sharding.query_shards(experiment.mesh)
        self.batch_queries = -(-batch_queries // parts) * parts
        self.name, self.summary = method.name, method.policy.summary
        self._single = parts  # the least that the mesh computes
        self._experiment, self._method, self._max_candidates = experiment, method, max_candidates
        self._greedy = _program(experiment, method, method.greedy)
        self._sampled = functools.cache(lambda count: _program(experiment, method, method.sampled(count)))

    @classmethod
    def open(
        cls,
        run_dir: str | Path,
        stage: str = "",
        batch_queries: int = 0,
        max_candidates: int = MAX_CANDIDATES,
        mesh: MeshConfig | None = None,
    ) -> Ranker:
        """The ranker of a run directory, or of a directory that `fgrpo_jax.export` wrote.

        stage: a finished stage, or a selection of the evaluation (`mg_e_3`); "": the last finished one of the run,
            or what was exported. batch_queries: 0: the run's eval.batch_queries. mesh: None: the run's own.
        Raises ConfigError for what is neither, or has no such stage that is finished.
        """
        run_dir = path_of(run_dir)
        config = read_config(run_dir)
        config = dataclasses.replace(config, mesh=mesh or config.mesh)
        if batch_queries < 0 or max_candidates < 1:
            raise ConfigError(
                f"batch_queries={batch_queries} must not be negative, nor max_candidates={max_candidates} below 1"
            )
        experiment, method = open_method(config, run_dir, stage)
        return cls(experiment, method, batch_queries or config.eval.batch_queries, max_candidates)

    def rank(
        self,
        query: str = "",
        candidates: Iterable[Item] = (),
        history: Iterable[Item] = (),
        query_id: str = "query",
        samples: int = 0,
        seed: int = 0,
    ) -> Ranked:
        """One query, in a program for one query (for one on every shard of the mesh).

        candidates, history: (id, text) pairs, {"id": ..., "text": ...}, or strings that are both; the history oldest
            first.
        Raises DataError for a query that is malformed, or that the run cannot read.
        """
        said = {"query_id": query_id, "query": query, "candidates": _items(candidates), "history": _items(history)}
        (found,) = self.rank_prepared(self._prepared([jsonl.example_of(said)], self._single), samples, seed)
        if isinstance(found, DataError):
            raise found
        return found

    def rank_batch(
        self, queries: Sequence[Mapping[str, Any]], samples: int = 0, seed: int = 0
    ) -> list[Ranked | DataError]:
        """Queries as in the lines of a JSONL, without relevance; a DataError in the place of each that is unusable."""
        rows: list[RankingExample | DataError] = []
        for query in queries:
            try:
                rows.append(jsonl.example_of(query))
            except DataError as error:
                rows.append(error)
        size = self.batch_queries
        parts = (self.prepare(rows[at : at + size]) for at in range(0, len(rows), size))
        return [one for number, part in enumerate(parts) for one in self.rank_prepared(part, samples, seed, number)]

    def prepare(self, rows: Sequence[RankingExample | DataError]) -> Prepared:
        """The host's part of at most batch_queries rows, for `rank_prepared`; errors stay where they are."""
        if len(rows) > self.batch_queries:
            raise ValueError(f"{len(rows)} rows; a batch has {self.batch_queries}")
        return self._prepared(rows, self.batch_queries)

    def rank_prepared(
        self, prepared: Prepared, samples: int = 0, seed: int = 0, number: int = 0
    ) -> list[Ranked | DataError]:
        """What `rank_batch` gives for rows that were prepared, the `number`th batch of a stream.

        What is drawn is a function of (seed, number, place in the batch, batch_queries).
        """
        if samples < 0 or (samples and not self._method.sampled):
            raise ConfigError(f"samples={samples}: {self.name} makes one list of a query; only generators draw several")
        rows, query = prepared
        if query is None:
            return rows
        params, frozen = self._method.params, self._experiment.base(self._method.policy)
        made = [self._greedy(params, frozen, query)]
        if samples:
            key = random_key(seed, self.name, "rank", number)
            made.append(self._sampled(samples)(params, frozen, query, key))
        lists = list(map(_on_host, made))
        return [one if isinstance(one, DataError) else self._read(one, lists, i) for i, one in enumerate(rows)]

    # ----------------------------------------------------------------- a batch

    def _prepared(self, rows: Sequence[RankingExample | DataError], size: int) -> Prepared:
        found = [row if isinstance(row, DataError) else self._shown(row) for row in rows]
        query = self._encoded(found, size)
        return Prepared(found, query)

    def _shown(self, row: RankingExample) -> tuple[RankingExample, np.ndarray] | DataError:
        if len(row.candidates) > self._max_candidates:
            return DataError(
                f"query {row.query_id!r} has {len(row.candidates)} candidates, more than max_candidates="
                f"{self._max_candidates}: raise it, or give fewer"
            )
        row = dataclasses.replace(row, logged=()) if row.logged else row  # not read, and would be shapes of their own
        return shown(row, self._experiment.config)

    def _encoded(self, found: list, size: int) -> PyTree | None:
        """The batch on the devices; what cannot be encoded becomes its error in `found`. None: nothing is left."""
        for _ in range(2):
            sound = [one[0] for one in found if not isinstance(one, DataError)]
            if not sound:
                return None
            rows = [sound[0] if isinstance(one, DataError) else one[0] for one in found]
            try:
                return experiments.encode(self._experiment, self._method.policy, rows + [rows[-1]] * (size - len(rows)))
            except DataError:
                found[:] = [one if isinstance(one, DataError) else self._tried(one) for one in found]
        raise AssertionError("queries that can be encoded one by one cannot be encoded together")

    def _tried(self, one: tuple[RankingExample, np.ndarray]) -> tuple[RankingExample, np.ndarray] | DataError:
        try:
            self._method.policy.encode([one[0]])
        except DataError as error:
            return error
        return one

    def _read(self, one: tuple[RankingExample, np.ndarray], made: list[Written], i: int) -> Ranked | DataError:
        """Row i of the batch: the greedy list and the drawn ones."""
        example, order = one
        ids, places = [item for item, _ in example.candidates], order.tolist()
        listed = [self._listed(example.query_id, ids, places, *row) for rows in made for row in rows[i]]
        if not all(math.isfinite(x) for ranked in listed if ranked.logp for x in ranked.logp.values()):
            return DataError(f"query {example.query_id!r}: a log-probability is not finite; its lists mean nothing")
        return listed[0]._replace(samples=tuple(listed[1:]))

    def _listed(
        self, query_id: str, ids: list[str], places: list[int], slate: list[int], ranking: list[int], outcome: int,
        logp_P: list[float],
    ) -> Ranked:  # fmt: skip
        """One list: places of candidates as shown, -1 padded, by their ids and their places in the query's order."""
        slate, ranking = ([c for c in items if c >= 0] for items in (slate, ranking))
        logp = None
        if self._method.sampled:
            logp = dict(zip((*PHASES, "total"), (*logp_P, sum(logp_P))))
            logp = {name: round(value, DIGITS) + 0.0 for name, value in logp.items()}
        return Ranked(
            query_id,
            tuple([ids[c] for c in slate]),
            tuple([ids[c] for c in ranking]),
            tuple([places[c] for c in slate]),
            tuple([places[c] for c in ranking]),
            self._method.policy.outcomes[outcome].name,
            logp,
        )


# --------------------------------------------------------------------- programs


def _program(experiment: Experiment, method: Method, decode: Callable) -> Callable:
    """(params, frozen, query, key if it draws) -> (Lists, log-probabilities of both phases [B,G,P])."""
    of_shard = shards.by_query(experiment.mesh, method.table, decode, experiment.beside(method.policy))

    @functools.partial(jax.jit, out_shardings=sharding.replicated(experiment.mesh))
    def program(params: PyTree, frozen: PyTree, query: PyTree, *key: jax.Array) -> tuple[Lists, jax.Array]:
        rollout, lists = of_shard(params, frozen, query, *key)
        return lists, jnp.zeros((*lists.outcome.shape, len(PHASES))) if rollout is None else _by_phase(rollout)

    return program


def _on_host(made: tuple[Lists, jax.Array]) -> Written:
    """Of every query, of each of its lists: slate, ranking, outcome and log-probabilities, as Python's own numbers."""
    lists, logp_BGP = jax.device_get(made)
    arrays = lists.slate, lists.ranking, lists.outcome, logp_BGP.astype(np.float64)
    return [list(zip(*of_query)) for of_query in zip(*(x.tolist() for x in arrays))]


def _by_phase(rollout: Rollout) -> jax.Array:
    of_phases = [jnp.where(rollout.phase == label, rollout.logp, 0.0).sum(-1) for label in TRAINED]
    return jnp.stack(of_phases, -1)


def _items(items: Iterable[Item]) -> list[Any]:
    """As in a line of a JSONL, which says what is wrong with the texts. Raises DataError."""
    if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Iterable):
        raise DataError(f"candidates and history are lists of items, not {type(items).__name__}")
    return [_item(item) for item in items]


def _item(item: Item) -> Any:
    if isinstance(item, Mapping):
        return dict(item)
    if isinstance(item, str):
        return {"id": item, "text": item}
    pair = tuple(item) if isinstance(item, Iterable) else ()
    if len(pair) != 2:
        raise DataError(f"an item is a pair of id and text, an object of both, or a text that is both, not {item!r}")
    return {"id": pair[0], "text": pair[1]}
