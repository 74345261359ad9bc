"""The language model as a policy: an action is a token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fgrpo_jax.config import Config, ConfigError, StageConfig
from fgrpo_jax.models import decoder, hf, lora, memory
from fgrpo_jax.policies.llm import (
    base,
    checks,
    exported,
    fitting,
    masks,
    prompted,
    prompts,
    sampling,
    serving,
    targets,
    transcript,
)
from fgrpo_jax.policies.llm.encode import blank, encode
from fgrpo_jax.policies.llm.files import ends_of_answers, policy_files
from fgrpo_jax.policies.llm.query import Query
from fgrpo_jax.types import PyTree, num_params
from fgrpo_jax.types_of_policies import Base, Footprint, Policy


def make(
    config: Config, spec: decoder.DecoderSpec, tokenizer: Any, kind: str, instruction: str, run_dir: Path = Path()
) -> Policy:
    """kind, instruction: of the data set's prompts. run_dir: what an export finds there, see files.py."""
    grammar = make_grammar(config, tokenizer)
    constrained = config.transcript.constrained
    sampler = sampling.Sampler(spec, grammar, constrained)
    weights = _weights(config, spec, run_dir)
    model = weights.model

    def logprobs(params, frozen, query, rollout):
        alone = weights.base and not jax.tree.leaves(params)  # Base.bare: a tree that its spec is to agree with
        used = sampler._replace(spec=spec._replace(lora=None)) if alone else sampler
        return sampling.logprobs(used, model(params, frozen), query, rollout)

    def choices(params, frozen, query, rollout):
        return sampling.choices(sampler, model(params, frozen), query, rollout)

    def greedy(params, frozen, query):
        return sampling.sample(sampler, model(params, frozen), query, None, 1)

    def write(params, frozen, prompt, prompt_len, most):
        ends = ends_of_answers(config, tokenizer, run_dir)
        return prompted.write(spec, ends, model(params, frozen), prompt, prompt_len, most)

    def sizes(query: Query) -> dict[str, int]:
        return {"S": query.prompt.shape[1], "T": grammar.length(*query.identifiers.shape[1:])}

    asking = prompted.Asking(config, tokenizer, kind, config.prompt.instruction or instruction, spec.vocab_size)
    begins = prompts.beginning(config.prompt, tokenizer)
    ranking = functools.partial(exported.files, config, grammar, kind, instruction, begins)
    encoded = functools.partial(encode, config, grammar, tokenizer, kind, asking.instruction, {})
    encoded = fitting.checked(encoded, tokenizer, spec.vocab_size)
    return Policy(
        table=weights.table,
        dtype=spec.param_dtype,
        init=weights.init,
        outcomes=transcript.OUTCOMES,
        encode=encoded,
        blank=blank(grammar),
        sources=_sources(sampler, model),
        logprobs=logprobs,
        greedy=greedy,
        turns=functools.partial(masks.turns, grammar),
        choices=choices if constrained else None,
        rewards={},
        summary=_summary(config, spec, weights),
        sizes=sizes,
        check=functools.partial(checks.check_training, config, tokenizer, encoded),
        files=policy_files(config, spec, tokenizer, run_dir, ranking),
        base=weights.base,
        write=write,
        footprint=Footprint(
            functools.partial(_beside, spec, sizes), "model.param_dtype='bfloat16'", "model.remat=True"
        ),
        prompted={name: functools.partial(method, asking) for name, method in prompted.METHODS.items()},
    )


def _sources(sampler: sampling.Sampler, model: Callable) -> dict[str, Callable]:
    """Where rollouts come from: Policy.sources. model: as _Weights'."""

    def sampled(stage: StageConfig):
        def rollout(params, frozen, query, key):
            return sampling.sample(sampler, model(params, frozen), query, key, stage.group_size)

        return rollout

    def logged(stage: StageConfig):
        return targets.rollout(sampler.grammar, sampler.constrained, stage.target.fill, stage.target.train_fill)

    return {"sampled": sampled, "logged": logged}


class _Weights(NamedTuple):
    """What is trained, and what is not.

    table, init: as Policy's. model: (params, frozen) -> what the decoder computes with.
    """

    table: PyTree
    init: Callable
    base: Base | None
    model: Callable


def _weights(config: Config, spec: decoder.DecoderSpec, run_dir: Path) -> _Weights:
    """All of a model, from a checkpoint or random; or adapters of a checkpoint, random too."""

    def started(make: Callable, shardings: PyTree, key: jax.Array) -> PyTree:
        return jax.jit(make, out_shardings=shardings)(key)

    if not spec.lora:

        def init(key: jax.Array, shardings: PyTree) -> PyTree:
            if config.model.checkpoint:
                return hf.load(config.model.checkpoint, spec, shardings)
            return started(functools.partial(decoder.init, spec), shardings, key)

        return _Weights(decoder.param_table(spec), init, None, lambda params, frozen: params)

    base_table, table = lora.split(decoder.param_table(spec))
    base_dtype = config.model.lora.base_dtype

    def init_adapters(key: jax.Array, shardings: PyTree) -> PyTree:
        return started(functools.partial(lora.init, table, dtype=spec.param_dtype), shardings, key)

    def load_base(shardings: PyTree) -> PyTree:
        stored = spec._replace(lora=None, param_dtype=base_dtype)
        return hf.load(base.weights_of(config, run_dir), stored, shardings)

    def joined(params: PyTree, frozen: PyTree) -> PyTree:
        return lora.join(frozen["base"], params, spec.lora)

    bare = {"layers": {}}  # no adapters
    return _Weights(table, init_adapters, Base(base_table, base_dtype, load_base, bare), joined)


def _summary(config: Config, spec: decoder.DecoderSpec, weights: _Weights) -> str:
    adapters = ""
    if spec.lora:
        trained = num_params(weights.table)
        adapters = f"adapters of rank {spec.lora.rank}: {trained:,} trained, {config.model.lora.base_dtype} base, "
    cut = f", texts cut to {config.prompt.text_tokens} tokens" if config.prompt.text_tokens else ""
    return (
        f"{decoder.num_params(spec):,} parameters: {spec.num_layers} layers x {spec.hidden_size}, "
        f"vocabulary {spec.vocab_size:,}, {spec.dtype} compute, {adapters}{spec.param_dtype} weights{cut}"
    )


def _beside(
    spec: decoder.DecoderSpec, sizes: Callable, query: Query, queries: int, group: int, microbatches: int, tensor: int
) -> dict[str, float]:
    """See Footprint."""
    prompt, length = sizes(query).values()
    rest = prompt, group, length, tensor
    return {
        "activations": memory.activations(spec, queries // microbatches, *rest),
        "caches": memory.caches(spec, queries, *rest),
        "copies": decoder.num_params(spec) * memory.width(spec.dtype) / tensor,
    }


def make_grammar(config: Config, tokenizer) -> transcript.Grammar:
    """The transcript's literals as token ids. Raises ConfigError when they are ambiguous."""
    t = config.transcript

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()

    if tokenizer.eos_token_id is None:
        raise ConfigError(f"tokenizer {config.tokenizer!r} has no eos token; transcripts end with it")
    grammar = transcript.Grammar(
        separator=ids(t.separator),
        slate_close=ids(t.slate_close),
        rank_close=ids(t.rank_close),
        eos=tokenizer.eos_token_id,
        slate_min=t.slate_min,
        slate_max=t.slate_max,
        rank_min=t.rank_min,
        rank_max=t.rank_max,
    )
    if t.separator and not grammar.separator:
        raise ConfigError("transcript.separator is encoded to no token by this tokenizer: choose another")
    if t.identifier == "letter":
        _check_letters(config.tokenizer, tokenizer)
    try:
        transcript.check_grammar(grammar)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return grammar


def _check_letters(name: str, tokenizer) -> None:
    found = serving.encoded([f" {letter}" for letter in serving.LETTERS], tokenizer)
    if several := [letter for letter, ids in zip(serving.LETTERS, found, strict=True) if len(ids) != 1]:
        raise ConfigError(
            f"transcript.identifier='letter': tokenizer {name!r} has no token of its own for {', '.join(several[:5])} "
            f"after a blank ({len(several)} of {len(serving.LETTERS)} letters): set it to 'index'"
        )
