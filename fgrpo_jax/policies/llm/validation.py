"""What makes a language model's configuration impossible."""

from __future__ import annotations

import math

from fgrpo_jax import config_files
from fgrpo_jax.algorithm.credit import SCHEMES
from fgrpo_jax.config import MADE_OF_DATA, Config, LoraConfig, ModelConfig
from fgrpo_jax.models.families import FAMILIES
from fgrpo_jax.policies.llm.grammar import OUTCOMES
from fgrpo_jax.stages import stages

_WIDEST = 512  # tokens that names may be padded to


def problems(config: Config) -> list[str]:
    return [*_rules(config), *_transcript(config), *_tokenizer(config), *_model(config.model), *_by_choice(config)]


def _by_choice(config: Config) -> list[str]:
    """The probability of every choice is that of the grammar's choices; imitation of labels knows candidates alone."""
    trained = {name: stage for name, stage in stages(config).items() if stage.steps and stage.source != "logged"}
    t = config.transcript
    imitating = [name for name, stage in trained.items() if SCHEMES[stage.credit.scheme].imitates]
    problems = []
    for name in imitating:
        where = f"{name}.credit.scheme={trained[name].credit.scheme!r} teaches"
        if t.slate_min < t.slate_max or t.rank_min < t.rank_max:
            problems.append(
                f"{where} no lengths: set transcript.slate_min to slate_max={t.slate_max} and rank_min to "
                f"rank_max={t.rank_max}, or another scheme"
            )
        if t.identifier == "text" and t.separator:
            problems.append(
                f"{where} not where a text ends that begins another one: set transcript.identifier to 'index' or "
                "'letter', transcript.separator to '', or another scheme"
            )
    return problems + [
        f"{name}.credit.scheme={stage.credit.scheme!r} needs the choices of the grammar: set "
        "transcript.constrained=True"
        for name, stage in trained.items()
        if SCHEMES[stage.credit.scheme].value_by and not config.transcript.constrained
    ]


def _rules(config: Config) -> list[str]:
    known = sorted(outcome.name for outcome in OUTCOMES if outcome.breaks)
    unknown = [name for name, _ in config.reward.rules if name not in known]
    return [f"reward.rules: {name!r} is not one of {', '.join(known)}" for name in unknown]


def _transcript(config: Config) -> list[str]:
    t, problems = config.transcript, []
    for phase, low, high in (("slate", t.slate_min, t.slate_max), ("rank", t.rank_min, t.rank_max)):
        if not 1 <= low <= high:
            problems.append(f"transcript.{phase}_min={low} and transcript.{phase}_max={high}: need 1 <= min <= max")
    if t.rank_max > t.slate_max:
        problems.append(
            f"transcript.rank_max={t.rank_max} exceeds transcript.slate_max={t.slate_max}: "
            "only items of the slate can be ranked"
        )
    if t.rank_min > t.slate_min:
        problems.append(
            f"transcript.rank_min={t.rank_min} exceeds transcript.slate_min={t.slate_min}: "
            "a slate of the least length could not be ranked; lower rank_min or raise slate_min"
        )
    for name in ("slate_open", "slate_close", "rank_close"):
        if not getattr(t, name):
            problems.append(f"transcript.{name} must not be empty")
    if not 1 <= t.identifier_width <= _WIDEST:
        problems.append(f"transcript.identifier_width={t.identifier_width} must be from 1 to {_WIDEST}")
    elif t.identifier == "letter" and t.identifier_width > 1:
        problems.append(
            f"transcript.identifier_width={t.identifier_width} only lengthens transcripts of letters, which are one "
            "token each (transcript.identifier='letter'): set it to 1"
        )
    if t.identifier != "text" and config.tokenizer in MADE_OF_DATA:
        problems.append(
            f"tokenizer={config.tokenizer!r} is made of the items' texts and has no numbers or letters: "
            "set transcript.identifier='text', or tokenizer to a Hugging Face directory"
        )
    if config.prompt.text_tokens < 0:
        problems.append(f"prompt.text_tokens={config.prompt.text_tokens} must not be negative; 0: whole texts")
    elif config.prompt.text_tokens and t.identifier == "text":
        problems.append(
            f"prompt.text_tokens={config.prompt.text_tokens} cuts the texts by which transcripts name candidates "
            "(transcript.identifier='text'): set that to 'index' or 'letter', or this to 0"
        )
    if config.prompt.chat and config.tokenizer in MADE_OF_DATA:
        problems.append(f"prompt.chat needs a tokenizer with a chat template; {config.tokenizer!r} has none")
    return problems


def _tokenizer(config: Config) -> list[str]:
    if config.model.checkpoint and config.tokenizer in MADE_OF_DATA:
        return [
            f"tokenizer={config.tokenizer!r} is made of the data, and its ids mean nothing to model.checkpoint="
            f"{config.model.checkpoint!r}: set `tokenizer` to the checkpoint, or model.checkpoint to ''"
        ]
    return []


def _model(m: ModelConfig) -> list[str]:
    problems = []
    if "://" in m.checkpoint:
        problems.append(f"model.checkpoint={m.checkpoint!r}: no address; copy the weights to all hosts")
    if not m.checkpoint:
        for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size", "window"):
            if getattr(m, name) < 1:
                problems.append(f"model.{name}={getattr(m, name)} must be at least 1")
        for name in ("rope_theta", "norm_eps", "init_std"):
            if not (math.isfinite(getattr(m, name)) and getattr(m, name) > 0):
                problems.append(f"model.{name}={getattr(m, name)} must be positive")
        if m.num_kv_heads >= 1 and m.num_heads % m.num_kv_heads:
            problems.append(f"model.num_heads={m.num_heads} must be a multiple of num_kv_heads={m.num_kv_heads}")
        rotated = FAMILIES[m.family].optional.get("partial_rotary_factor", 1.0)
        if m.head_dim * rotated % 2:
            of_it = f" of which {rotated} is rotated" if rotated != 1 else ""
            problems.append(f"model.head_dim={m.head_dim}{of_it} must be even (rotary embedding)")
        if min(m.delta) < 1 or m.delta[1] % m.delta[0]:
            problems.append(f"model.delta={m.delta}: at least 1 each, and heads of values a multiple of those of keys")
    problems += _lora(m)
    if m.logit_chunk < 1:
        problems.append("model.logit_chunk must be at least 1")
    return problems


def _lora(m: ModelConfig) -> list[str]:
    lora, problems = m.lora, []
    if lora.rank < 0:
        return [f"model.lora.rank={lora.rank}: choose at least 1, or 0 to train the whole model"]
    if lora.rank == 0:
        unread = config_files.differences(LoraConfig(), lora, "model.lora")
        return [f"{line}: only adapters read it; set model.lora.rank, or leave this out" for line in unread.values()]
    if not m.checkpoint:
        problems.append(f"model.lora.rank={lora.rank} needs model.checkpoint: adapters are of a model that was trained")
    if not (math.isfinite(lora.alpha) and lora.alpha > 0):
        problems.append(f"model.lora.alpha={lora.alpha} must be positive")
    if not lora.projections or len(set(lora.projections)) < len(lora.projections):
        problems.append(f"model.lora.projections={lora.projections} must name at least one weight, each once")
    return problems
