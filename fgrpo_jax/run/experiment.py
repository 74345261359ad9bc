"""From a configuration to the things it names: data, tokenizer, model, policy, places.

train.py and eval.py build the same experiment here, so an evaluation can never use another
grammar, prompt or model than the training did.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import absl.logging
import jax
import numpy as np
from jax.sharding import Mesh

from fgrpo_jax import shards
from fgrpo_jax.algorithm.objectives import OBJECTIVES
from fgrpo_jax.algorithm.rewards import REWARDS
from fgrpo_jax.config import Config, ConfigError, ModelConfig, StageConfig
from fgrpo_jax.data import datasets
from fgrpo_jax.data.batches import seed_of
from fgrpo_jax.evaluation.baselines import BASELINES
from fgrpo_jax.evaluation.evaluate import AT_CUTOFF, WHOLE, Prediction
from fgrpo_jax.files import read_json, storing, write_atomically
from fgrpo_jax.models import decoder, flash, hf
from fgrpo_jax.policies.llm import policy as llm
from fgrpo_jax.policies.llm import tokenizers
from fgrpo_jax.policies.llm.targets import logged
from fgrpo_jax.policies.llm.transcript import OUTCOMES
from fgrpo_jax.run import processes, sharding
from fgrpo_jax.run.launch import keep_memory
from fgrpo_jax.run.validation import Registries
from fgrpo_jax.types import Lists, Policy, PyTree, Query, RankingExample

KNOWN = Registries(
    datasets=frozenset(datasets.DATASETS),
    rewards=frozenset(REWARDS),
    objectives=frozenset(OBJECTIVES),
    baselines=frozenset(BASELINES),
    outcomes=frozenset(outcome.name for outcome in OUTCOMES if outcome.breaks),
    cut_metrics=frozenset(AT_CUTOFF),
    whole_metrics=frozenset(WHOLE),
)


_ORIGINAL = "hf_config.json"  # in a run directory: config.json of the checkpoint it started from


class Experiment(NamedTuple):
    config: Config
    dataset: datasets.Dataset
    tokenizer: Any
    spec: decoder.DecoderSpec
    mesh: Mesh
    param_shardings: PyTree


def prepare_process(config: Config) -> None:
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
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def assemble(config: Config, dataset: datasets.Dataset | None, run_dir: Path) -> Experiment:
    """Tokenizer and model sizes (the run's own, once it has them), mesh.

    dataset: may be None for a run that has its tokenizer, where no query is to be encoded.

    Raises ConfigError when the parts do not fit each other.
    """
    saved = run_dir / "tokenizer"
    if saved.is_dir():
        tokenizer = tokenizers.from_directory(str(saved))
    else:
        tokenizer = tokenizers.load(config.tokenizer, dataset, config.transcript, config.prompt)
    spec = saved_spec(run_dir, config.model) or _spec(config.model, len(tokenizer))
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    places = sharding.param_shardings(mesh, decoder.param_table(spec))
    return Experiment(config, dataset, tokenizer, spec, mesh, places)


def attention_of(model: ModelConfig) -> str:
    """How the devices here attend: a run trained with flash may be evaluated where it does not run."""
    return model.attention if flash.runs_on(jax.devices()[0]) else "blocks"


def _numerics(model: ModelConfig) -> dict[str, Any]:
    """How the model is computed, here."""
    return {
        "dtype": model.dtype,
        "param_dtype": model.param_dtype,
        "remat": model.remat,
        "attention": attention_of(model),
        "logit_chunk": model.logit_chunk,
        "rows_first": jax.default_backend() == "cpu",
    }


def _spec(model: ModelConfig, vocab_size: int) -> decoder.DecoderSpec:
    numerics = _numerics(model)
    if model.checkpoint:
        spec = hf.read_spec(model.checkpoint, **numerics)
        if vocab_size > spec.vocab_size:
            raise ConfigError(
                f"the tokenizer has {vocab_size} tokens, model.checkpoint {model.checkpoint} only "
                f"{spec.vocab_size}: they do not belong together; set `tokenizer` to the checkpoint's directory"
            )
        return spec
    return decoder.DecoderSpec(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        mlp_size=model.mlp_size,
        rope_theta=model.rope_theta,
        norm_eps=model.norm_eps,
        tie_embeddings=model.tie_embeddings,
        init_std=model.init_std,
        **numerics,
    )


def saved_spec(run_dir: Path, model: ModelConfig) -> decoder.DecoderSpec | None:
    """The sizes in a run's model.json; None for a run that has none yet.

    A size that the file does not name, because it is of an earlier version, has its default.
    Raises ConfigError for sizes unknown to this version, and for a file that is damaged.
    """
    path = run_dir / "model.json"
    if not path.is_file():
        return None
    fields, defaults = decoder.DecoderSpec._fields, decoder.DecoderSpec._field_defaults
    sizes = read_json(path, [name for name in fields if name not in defaults])
    if unknown := sorted(set(sizes) - set(fields)):
        raise ConfigError(f"{path} describes a model of another version of fgrpo_jax, with {', '.join(unknown)}")
    return decoder.DecoderSpec(**(sizes | _numerics(model)))


def make_policy(experiment: Experiment, stage: StageConfig | None) -> Policy:
    """The policy of a stage; None: for greedy evaluation only."""
    config, dataset = experiment.config, experiment.dataset
    policy = llm.make(
        config,
        experiment.spec,
        experiment.tokenizer,
        dataset.kind,
        dataset.instruction,
        stage.group_size if stage else 1,
    )
    if stage and stage.source == "logged":
        grammar = llm.make_grammar(config, experiment.tokenizer)
        return logged(policy, grammar, config.transcript.constrained, stage.target.fill, stage.target.train_fill)
    return policy


def initial_params(experiment: Experiment) -> PyTree:
    """The configured checkpoint's weights, or random ones, in their places."""
    if experiment.config.model.checkpoint:
        return hf.load(experiment.config.model.checkpoint, experiment.spec, experiment.param_shardings)
    init = jax.jit(lambda key: decoder.init(experiment.spec, key), out_shardings=experiment.param_shardings)
    return init(random_key(experiment.config.seed, "model", "init", 0))


def random_key(seed: int, stage: str, stream: str, step: int) -> jax.Array:
    """A key for everything random at a step: a function of (seed, stage, stream, step)."""
    return jax.random.fold_in(jax.random.key(seed_of(seed, stage, stream) % 2**32), step)


def encode(experiment: Experiment, policy: Policy, examples: Sequence[RankingExample]) -> Query:
    """A global batch on the devices: each process encodes its own rows, and all agree on the shapes.

    Raises DataError, in every process, for a query that the policy cannot encode.
    """
    rows = sharding.local_rows(experiment.mesh, len(examples))
    mine = processes.alike(lambda: policy.encode([examples[i] for i in rows]), policy.blank)
    return sharding.shard_batch(experiment.mesh, mine, len(examples))


def save_description(experiment: Experiment, run_dir: Path) -> None:
    """The tokenizer and the model's sizes: what whoever opens the run later, or elsewhere, needs."""
    if not (run_dir / "tokenizer").is_dir():
        partial = run_dir / ".tokenizer.partial"
        with storing(run_dir / "tokenizer", Exception):  # the library raises plain Exceptions
            experiment.tokenizer.save_pretrained(str(partial))
            partial.rename(run_dir / "tokenizer")
    source = experiment.config.model.checkpoint
    if source and not (run_dir / _ORIGINAL).is_file() and Path(source).expanduser().is_dir():
        write_atomically(run_dir / _ORIGINAL, json.dumps(hf.read_config(source), indent=1) + "\n")
    if not (run_dir / "model.json").is_file():
        write_atomically(run_dir / "model.json", json.dumps(experiment.spec._asdict(), indent=1) + "\n")


def original_config(config: Config, run_dir: Path) -> dict[str, Any] | None:
    """config.json of the Hugging Face checkpoint the model started from; None for random weights."""
    if not config.model.checkpoint:
        return None
    if (run_dir / _ORIGINAL).is_file():
        return read_json(run_dir / _ORIGINAL)
    return hf.read_config(config.model.checkpoint)  # a run of an earlier version


class Predictor:
    """Greedy predictions of parameters, compiled once per shape."""

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        self._policy = make_policy(experiment, None)
        replicated = sharding.replicated(experiment.mesh)
        table = decoder.param_table(experiment.spec)
        of_shard = shards.by_query(experiment.mesh, table, self._policy.greedy)

        @functools.partial(jax.jit, out_shardings=replicated)
        def greedy(params: PyTree, query: Query) -> Lists:
            return of_shard(params, {}, query)[1]

        self._greedy = greedy
        parts = sharding.query_shards(experiment.mesh)
        self._size = -(-experiment.config.eval.batch_queries // parts) * parts

    def __call__(self, params: PyTree, examples: Sequence[RankingExample]) -> list[Prediction]:
        """One Prediction per example; padding rows repeat the last example and are dropped."""
        found: list[Prediction] = []
        for start in range(0, len(examples), self._size):
            part = list(examples[start : start + self._size])
            padded = part + [part[-1]] * (self._size - len(part))
            query = encode(self._experiment, self._policy, padded)
            lists = jax.tree.map(np.asarray, self._greedy(params, query))
            for i in range(len(part)):
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
    c, spec = experiment.config, experiment.spec
    devices = experiment.mesh.devices
    mesh = " x ".join(f"{name} {size}" for name, size in experiment.mesh.shape.items())
    lines = [
        f"devices   {devices.size} x {devices.flat[0].device_kind} ({jax.process_count()} process(es)), mesh {mesh}",
        f"model     {decoder.num_params(spec):,} parameters: {spec.num_layers} layers x {spec.hidden_size}, "
        f"vocabulary {spec.vocab_size:,}, {spec.dtype} compute, {spec.param_dtype} weights",
        f"data      {experiment.dataset.name}: "
        + ", ".join(f"{name} {len(split):,}" for name, split in experiment.dataset.splits.items())
        + " queries",
    ]
    policy = make_policy(experiment, None)
    for name in ("sft", "rl"):
        stage = getattr(c, name)
        if not stage.steps:
            lines.append(f"{name:9} skipped (steps = 0)")
            continue
        lines.append(f"{name:9} {_shapes(experiment, policy, stage)}")
    return "\n".join([*lines, f"output    {c.run_dir}"])


def _shapes(experiment: Experiment, policy: Policy, stage: StageConfig) -> str:
    from fgrpo_jax.data.batches import make_batches

    batches = make_batches(experiment.dataset, experiment.config, "plan", stage)
    query = policy.encode(batches.batch_at(0))
    grammar = llm.make_grammar(experiment.config, experiment.tokenizer)
    length = grammar.length(query.identifiers.shape[1], query.identifiers.shape[2])
    b, g, s = stage.batch_queries, stage.group_size, query.prompt.shape[1]
    tokens = b * (s + g * length)
    return (
        f"{stage.steps} steps of [B {b}, G {g}, S {s}, T {length}], {tokens:,} tokens a step "
        f"({stage.source}, {stage.objective.name}), {len(batches.rows):,} queries"
        + (f", {batches.skipped:,} skipped: nothing relevant" if batches.skipped else "")
    )
