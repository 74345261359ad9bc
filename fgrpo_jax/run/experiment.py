"""From a configuration to the things it names: data, policies, mesh; and what surrounds programs.

train.py and eval.py build the same experiment here, so an evaluation can never use another
grammar, prompt or model than the training did.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import absl.logging
import jax
import numpy as np
from jax.sharding import Mesh

from fgrpo_jax import policies, shards
from fgrpo_jax.algorithm import objectives
from fgrpo_jax.algorithm.credit import SCHEMES
from fgrpo_jax.algorithm.rewards import REWARDS, SUMS
from fgrpo_jax.config import ConfigError, RunConfig, StageConfig
from fgrpo_jax.data import datasets
from fgrpo_jax.data.batches import Batches, make_batches, seed_of
from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.evaluation.baselines import BASELINES
from fgrpo_jax.evaluation.evaluate import AT_CUTOFF, MORE_AT_CUTOFF, MORE_WHOLE, WHOLE, Prediction
from fgrpo_jax.files import path_of
from fgrpo_jax.run import memory, processes, sharding
from fgrpo_jax.run.ahead import one_ahead
from fgrpo_jax.run.compute import products
from fgrpo_jax.run.launch import keep_memory
from fgrpo_jax.run.validation import Registries
from fgrpo_jax.stages import reference_of, stages
from fgrpo_jax.types import Lists, PyTree, RankingExample
from fgrpo_jax.types_of_policies import Policy

KNOWN = Registries(
    datasets=frozenset(datasets.DATASETS),
    raw_files=lambda name: datasets.builder_class(name).MANUAL_DOWNLOAD_INSTRUCTIONS,
    rewards=frozenset(REWARDS),
    objectives={name: objectives.options(name) for name in objectives.OBJECTIVES},
    schemes={name: scheme.options for name, scheme in SCHEMES.items()},
    by_item=frozenset(name for name, scheme in SCHEMES.items() if scheme.by_item),
    by_choice=frozenset(name for name, scheme in SCHEMES.items() if scheme.value_by),
    imitating=frozenset(name for name, scheme in SCHEMES.items() if scheme.imitates),
    sums={name: reward.phase for name, reward in SUMS.items()},
    baselines=frozenset(BASELINES),
    cut_metrics=frozenset(AT_CUTOFF + MORE_AT_CUTOFF),
    whole_metrics=frozenset(WHOLE),
    more_whole_metrics=frozenset(MORE_WHOLE),
)


Row = TypeVar("Row")


class Experiment(NamedTuple):
    config: RunConfig
    dataset: datasets.Dataset | None
    policies: dict[str, Policy]  # by the name that stages have for them
    mesh: Mesh
    bases: dict[Callable, PyTree]  # what `base` has read, by Base.load

    def policy(self, name: str) -> Policy:
        """The policy that a stage trains."""
        return self.policies[stages(self.config)[name].policy]

    def shardings(self, policy: Policy) -> PyTree:
        """Where its parameters lie."""
        return sharding.param_shardings(self.mesh, policy.table)

    def base(self, policy: Policy) -> dict[str, PyTree]:
        """The part of `frozen` that is the policy's own; read when it is first asked for."""
        if policy.base is None:
            return {}
        load = policy.base.load
        if load not in self.bases:
            self.bases[load] = load(sharding.param_shardings(self.mesh, policy.base.table))
        return {"base": self.bases[load]}

    def beside(self, policy: Policy, others: Sequence[str] = ()) -> dict[str, PyTree]:
        """The Params of `frozen`, by name: those of other stages, and the policy's base."""
        tables = {name: self.policy(name).table for name in others}
        return tables | ({"base": policy.base.table} if policy.base else {})


def prepare_process(config: RunConfig) -> None:
    """Once, at the start of a program: keep memory and, on disk, compiled programs; silence what Orbax only notes."""
    # It warns of every directory that it only reads; and what it raises it logs too, once from every task.
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    enable_compilation_cache(config.compilation_cache)
    if config.keep_memory:
        keep_memory()


def enable_compilation_cache(folder: str) -> None:
    """Keep compiled programs on disk between runs."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(path_of(folder)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def assemble(config: RunConfig, dataset: datasets.Dataset | None, run_dir: Path) -> Experiment:
    """The run's own policies, once it describes them, and the mesh.

    dataset: may be None for a run that describes its policies, where no query is to be encoded.

    Raises ConfigError when the parts do not fit each other, or a stage names what its policy has not.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    made = policies.make(config, dataset, run_dir)
    for name, stage in stages(config).items():
        if stage.policy not in made:
            raise ConfigError(f"{name}.policy={stage.policy!r} is not one of {', '.join(made)}")
        if stage.source not in (sources := made[stage.policy].sources):
            raise ConfigError(f"{name}.source={stage.source!r}: {stage.policy} has only {', '.join(sources)}")
        if reference_of(stage) == "base" and made[stage.policy].base is None:
            raise ConfigError(
                f"{name}.objective.kl_reference='base' is of adapters, and {stage.policy} trains all parameters: "
                "choose 'start', or set model.lora.rank"
            )
        if SCHEMES[stage.credit.scheme].by_item and made[stage.policy].turns is None:
            raise ConfigError(f"{name}.credit.scheme={stage.credit.scheme!r}: {stage.policy} writes no lists")
    return Experiment(config, dataset, made, mesh, {})


def initial_params(experiment: Experiment, policy: Policy) -> PyTree:
    """What a policy starts from when no stage came before, in its places."""
    return policy.init(random_key(experiment.config.seed, "model", "init", 0), experiment.shardings(policy))


def random_key(seed: int, stage: str, stream: str, step: int) -> jax.Array:
    """A key for everything random at a step: a function of (seed, stage, stream, step)."""
    return jax.random.fold_in(jax.random.key(seed_of(seed, stage, stream) % 2**32), step)


def encode(experiment: Experiment, policy: Policy, examples: Sequence[RankingExample]) -> PyTree:
    """A global batch on the devices: each process encodes its own rows, and all agree on the shapes.

    Raises DataError, in every process, for a query that the policy cannot encode.
    """
    return _placed(experiment, policy, _rows(experiment, policy, examples), len(examples))


def encoded_ahead(
    experiment: Experiment, policy: Policy, batches: Iterable[Sequence[RankingExample]]
) -> Iterator[tuple[Sequence[RankingExample], PyTree]]:
    """Every batch and what `encode` makes of it. The next one is read and encoded while one is computed with."""
    prepared = ((examples, _rows(experiment, policy, examples)) for examples in batches)
    for examples, rows in one_ahead(prepared):
        yield examples, _placed(experiment, policy, rows, len(examples))


def _rows(experiment: Experiment, policy: Policy, examples: Sequence[RankingExample]) -> PyTree | DataError:
    """This process's rows, encoded; or why they cannot be, which it is to say when all of them ask."""
    mine = sharding.local_rows(experiment.mesh, len(examples))
    return processes.attempted(lambda: policy.encode([examples[i] for i in mine]))


def _placed(experiment: Experiment, policy: Policy, rows: PyTree | DataError, size: int) -> PyTree:
    return sharding.shard_batch(experiment.mesh, processes.alike(rows, policy.blank), size)


def batches_of(experiment: Experiment, examples: Sequence[Row]) -> Iterator[tuple[int, list[Row]]]:
    """The examples to evaluate, or what was made of them, in batches of one size, each after its place; the last
    example fills the last one."""
    parts = sharding.query_shards(experiment.mesh)
    size = -(-experiment.config.eval.batch_queries // parts) * parts
    for start in range(0, len(examples), size):
        part = list(examples[start : start + size])
        yield start, part + [part[-1]] * (size - len(part))


def encoded_parts(
    experiment: Experiment, policy: Policy, examples: Sequence[RankingExample]
) -> Iterator[tuple[int, Sequence[RankingExample], PyTree]]:
    """`batches_of` and their queries, encoded ahead."""
    batches = list(batches_of(experiment, examples))
    encoded = encoded_ahead(experiment, policy, (part for _, part in batches))
    for (start, _), (part, query) in zip(batches, encoded, strict=True):
        yield start, part, query


class Predictor:
    """Predictions of a policy's parameters, compiled once per shape.

    policy: that encodes the queries. greedy, table: as the policy's where they are not given.
    flops: behind a prediction of the first batch, its padding included; None before, and where decoding ends early.
    """

    def __init__(
        self,
        experiment: Experiment,
        policy: Policy,
        greedy: Callable | None = None,
        table: PyTree | None = None,
    ):
        self._experiment, self._policy = experiment, policy
        decode_shard, beside = greedy or policy.greedy, experiment.beside(policy)
        of_shard = shards.by_query(experiment.mesh, table or policy.table, decode_shard, beside)

        @functools.partial(jax.jit, out_shardings=sharding.replicated(experiment.mesh))
        def decode(params: PyTree, frozen: PyTree, query: PyTree) -> Lists:
            return of_shard(params, frozen, query)[1]

        self.program = self._decode = decode
        self.flops: int | None = None

    def __call__(self, params: PyTree, examples: Sequence[RankingExample]) -> list[Prediction]:
        """One Prediction per example."""
        found: list[Prediction] = []
        frozen = self._experiment.base(self._policy)
        for start, part, query in encoded_parts(self._experiment, self._policy, examples):
            lists = jax.tree.map(np.asarray, self.program(params, frozen, query))
            if self.flops is None and not start:
                of_batch = products(jax.make_jaxpr(self._decode)(params, frozen, query).jaxpr)  # not traced again
                self.flops = of_batch and round(of_batch / len(part))
            for i in range(min(len(part), len(examples) - start)):
                found.append(
                    Prediction(
                        slate=tuple(int(c) for c in lists.slate[i, 0] if c >= 0),
                        ranking=tuple(int(c) for c in lists.ranking[i, 0] if c >= 0),
                        outcome=self._policy.outcomes[int(lists.outcome[i, 0])],
                    )
                )
        return found


def plan(experiment: Experiment) -> str:
    """What will run, in the units users count in: printed before anything compiles."""
    c, devices = experiment.config, experiment.mesh.devices
    mesh = " x ".join(f"{name} {size}" for name, size in experiment.mesh.shape.items())
    one = len(experiment.policies) == 1
    lines = [
        f"devices   {devices.size} x {devices.flat[0].device_kind} ({jax.process_count()} process(es)), mesh {mesh}",
        *(f"{'model' if one else name:9} {policy.summary}" for name, policy in experiment.policies.items()),
        f"data      {experiment.dataset.name}: "
        + ", ".join(f"{name} {len(split):,}" for name, split in experiment.dataset.splits.items())
        + " queries",
    ]
    lines += [f"note      {note.text}" for note in experiment.dataset.notes]
    for name, stage in stages(c).items():
        if not stage.steps:
            lines.append(f"{name:9} skipped (steps = 0)")
            continue
        batches, policy = make_batches(experiment.dataset, c, "plan", stage), experiment.policy(name)
        query = policy.encode(batches.batch_at(0))
        lines.append(f"{name:9} {_shapes(batches, stage, policy.sizes(query))}")
        lines.append(f"{'':9} {memory.of_stage(experiment, name, query)}")
    return "\n".join([*lines, f"output    {c.run_dir}"])


def _shapes(batches: Batches, stage: StageConfig, sizes: dict[str, int]) -> str:
    b, g = stage.batch_queries, stage.group_size
    tokens = b * (sizes["S"] + g * sizes["T"])
    return (
        f"{stage.steps} steps of [B {b}, G {g}, S {sizes['S']}, T {sizes['T']}], {tokens:,} tokens a step "
        f"({stage.source}, {stage.objective.name}), {len(batches.rows):,} queries"
        + (f", {batches.skipped:,} skipped: nothing relevant" if batches.skipped else "")
    )
