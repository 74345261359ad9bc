"""What a run directory says of its language model: tokenizer/, prompt_begins.json, model.json, hf_config.json.

With them the directory can be moved and used where the files that training began with are not.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from fgrpo_jax.config import Config, ConfigError, ModelConfig
from fgrpo_jax.data.datasets import Dataset
from fgrpo_jax.files import is_address, is_whole, read_json, send, storing, write_atomically
from fgrpo_jax.models import decoder, flash, gguf, hf, hf_config, peft
from fgrpo_jax.models.families import FAMILIES
from fgrpo_jax.models.lora import Lora, join, smallest_side
from fgrpo_jax.policies.llm import base, prompts, serving, tokenizers
from fgrpo_jax.types import PyTree
from fgrpo_jax.types_of_policies import PolicyFiles

_LAST = "tokenizer_config.json"  # of the files of tokenizer/, see `send`
_ORIGINAL = "hf_config.json"  # config.json of the checkpoint the run started from
_BEGINS = "prompt_begins.json"  # special tokens before the run's prompts (prompts.beginning), and a turn of its chat
_PROBE = "a"  # the text of that turn


def has_tokenizer(run_dir: Path) -> bool:
    """Whether a run was begun here."""
    return is_whole(run_dir / "tokenizer", _LAST)


def load_tokenizer(config: Config, dataset: Dataset | None, run_dir: Path) -> Any:
    """The run's own tokenizer once it has one, or the configured one, which may need the data set."""
    if has_tokenizer(run_dir):
        return tokenizers.from_directory(str(run_dir / "tokenizer"))
    return tokenizers.load(config.tokenizer, dataset, config.transcript, config.prompt)


def keeping_beginning(config: Config, tokenizer: Any, run_dir: Path) -> Config:
    """The configuration, by which the prompts of a run begin as they always did: of an earlier version with nothing.

    Raises ConfigError where the tokenizer puts something else before a text than when the run began, or around one.
    """
    began = _began(run_dir)
    if began is None:
        return config
    config = dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, bos=bool(began)))
    if (now := prompts.beginning(config.prompt, tokenizer)) != began:
        raise ConfigError(
            f"{run_dir}: its prompts began with the tokens {began}, and its tokenizer puts {now} before a text here: "
            "restore its tokenizer/, or take the version of transformers that it began with"
        )
    if config.prompt.chat and (turn := serving.chat(_PROBE, tokenizer)) != (before := _turn(run_dir, tokenizer)):
        raise ConfigError(
            f"{run_dir}: its prompts began as {before!r}, and its chat template makes {turn!r} here: restore its "
            "tokenizer/, or take the version of this package or of transformers that it began with"
        )
    return config


def _turn(run_dir: Path, tokenizer: Any) -> str:
    """The probe as the run's prompts have it; earlier versions let templates tell the date, and models think first."""
    path = run_dir / _BEGINS
    said = read_json(path) if path.is_file() else {}
    turns = [{"role": "user", "content": _PROBE}]
    return said.get("turn") or tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def _began(run_dir: Path) -> list[int] | None:
    """None: no run that has a tokenizer."""
    if not has_tokenizer(run_dir):
        return None
    path = run_dir / _BEGINS
    return read_json(path, ("begins",))["begins"] if path.is_file() else []


# --------------------------------------------------------------------- sizes


def attention_of(model: ModelConfig) -> str:
    """How the devices here attend: a run trained with flash may be evaluated where it does not run."""
    return model.attention if flash.runs_on(jax.devices()[0]) else "blocks"


def make_spec(model: ModelConfig, vocab_size: int, run_dir: Path) -> decoder.DecoderSpec:
    """The run's own sizes once it has them, or the configured ones; vocab_size: of random weights.

    Raises ConfigError for adapters of a higher rank than a weight has.
    """
    if saved := saved_spec(run_dir, model):
        return saved
    numerics = _numerics(model)
    if model.checkpoint:
        spec = hf.read_spec(model.checkpoint, lora=base.make_lora(model), **numerics)
        _check_adapters(spec)
        return spec
    family = FAMILIES[model.family]
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
        pattern=decoder.pattern_of([family.pattern[i % len(family.pattern)] for i in range(model.num_layers)]),
        window=model.window if decoder.LOCAL in family.pattern else 0,
        rotary_fraction=family.optional.get("partial_rotary_factor", 1.0),
        delta=(*model.delta, 4) if decoder.DELTA in family.pattern else (),
        **family.spec,
        **numerics,
    )


def _check_adapters(spec: decoder.DecoderSpec) -> None:
    if not spec.lora:
        return
    table = decoder.param_table(spec._replace(lora=None))
    if lacking := [name for name in spec.lora.projections if name not in table["layers"]]:
        raise ConfigError(
            f"model.lora.projections: this checkpoint has no {' and no '.join(lacking)} in any layer: leave that out"
        )
    name, side = smallest_side(table, spec.lora)
    if spec.lora.rank > side:
        raise ConfigError(
            f"model.lora.rank={spec.lora.rank}: projection {name!r} of this checkpoint has no rank above {side}: "
            f"set at most that, or leave {name!r} out of model.lora.projections"
        )


def saved_spec(run_dir: Path, model: ModelConfig) -> decoder.DecoderSpec | None:
    """The sizes in a run's model.json, to be computed as configured; None for a run that has none yet.

    Raises ConfigError for sizes unknown to this version, and for a file that is damaged.
    """
    sizes = _saved_sizes(run_dir)
    return decoder.DecoderSpec(**(sizes | _numerics(model))) if sizes else None


def _saved_sizes(run_dir: Path) -> dict[str, Any] | None:
    """What the file does not name, because it is of an earlier version, has its default."""
    path = run_dir / "model.json"
    if not path.is_file():
        return None
    fields, defaults = decoder.DecoderSpec._fields, decoder.DecoderSpec._field_defaults
    sizes = read_json(path, [name for name in fields if name not in defaults])
    if unknown := sorted(set(sizes) - set(fields)):
        raise ConfigError(f"{path} describes a model of another version of fgrpo_jax, with {', '.join(unknown)}")
    sizes = defaults | {name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()}
    if sizes["lora"]:
        rank, alpha, projections = sizes["lora"]
        sizes["lora"] = Lora(rank, alpha, tuple(projections))
    return sizes


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


# --------------------------------------------------------------------- out and in


def _check_for_peft(config: Config, weights: Path) -> None:
    if gguf.is_meant(weights) or hf_config.is_whole_for_transformers(weights):
        kind = "a GGUF file" if gguf.is_meant(weights) else "a model of images and text"
        raise ConfigError(
            f"form='adapter': these are adapters of {config.model.checkpoint}, {kind}, onto which peft loads none: "
            "export with --form model, which merges them in"
        )


def policy_files(
    config: Config, spec: decoder.DecoderSpec, tokenizer: Any, run_dir: Path, ranking: Callable[[], dict[str, str]]
) -> PolicyFiles:
    """run_dir: of the policy itself; an export finds there what else the checkpoint said. ranking: what it adds."""
    begins = prompts.beginning(config.prompt, tokenizer)

    def save(run_dir: Path) -> None:
        if not has_tokenizer(run_dir):  # without it the other file counts for nothing
            turn = {"turn": serving.chat(_PROBE, tokenizer)} if config.prompt.chat else {}
            write_atomically(run_dir / _BEGINS, json.dumps({"begins": begins} | turn) + "\n")
            _save_tokenizer(tokenizer, run_dir)
        source = config.model.checkpoint
        if source and not (run_dir / _ORIGINAL).is_file() and gguf.locate(source).exists():
            write_atomically(run_dir / _ORIGINAL, json.dumps(hf.read_config(source), indent=1) + "\n")
        if not (run_dir / "model.json").is_file():
            write_atomically(run_dir / "model.json", json.dumps(spec._asdict(), indent=1) + "\n")
        if spec.lora:
            base.save(config, run_dir)

    def check(theirs_dir: Path) -> None:
        sizes, ours = _saved_sizes(theirs_dir), spec._asdict()
        if sizes is None:
            raise ConfigError(f"{theirs_dir} holds no model.json: give its training command again, which writes it")
        if differing := [
            f"{name}: {sizes[name]} -> {ours[name]}" for name in decoder.SHAPING if sizes[name] != ours[name]
        ]:
            raise ConfigError(f"{theirs_dir} holds another model: {'; '.join(differing)}")
        theirs = tokenizers.from_directory(str(theirs_dir / "tokenizer"))
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise ConfigError(f"{theirs_dir} has another tokenizer, so its model cannot read these data")
        if (began := _began(theirs_dir)) != begins:
            raise ConfigError(
                f"{theirs_dir}: prompts begin with the tokens {began} there and with {begins} here: "
                + ("their tokenizers differ in that" if began and begins else f"set prompt.bos={bool(began)}")
            )
        if spec.lora:
            base.check(config, run_dir, theirs_dir)

    def export_model(out_dir: Path, params: PyTree, frozen: PyTree) -> None:
        if spec.lora:
            params = join(frozen["base"], params, spec.lora)
        whole, original = spec._replace(lora=None), original_config(config, run_dir)
        # In the adapters' type: in one of few bits, as the base may be, they would be rounded away.
        hf.save(out_dir, whole, params, original, tokenizer, also=ranking(), dtype=spec.param_dtype)

    def export_adapter(out_dir: Path, params: PyTree, frozen: PyTree) -> None:
        _check_for_peft(config, Path(base.weights_of(config, run_dir)))
        peft.save(out_dir, spec, params, config.model.checkpoint)

    exports = {"model": export_model} | ({"adapter": export_adapter} if spec.lora else {})
    return PolicyFiles(save, check, exports)


def _save_tokenizer(tokenizer: Any, run_dir: Path) -> None:
    target, partial = run_dir / "tokenizer", run_dir / ".tokenizer.partial"
    with storing(target, Exception):  # the library raises plain Exceptions
        if is_address(run_dir):
            with tempfile.TemporaryDirectory() as scratch:
                tokenizer.save_pretrained(scratch)
                send(Path(scratch), target, _LAST)
            return
        tokenizer.save_pretrained(str(partial))
        partial.rename(target)


def original_config(config: Config, run_dir: Path) -> dict[str, Any] | None:
    """config.json of the Hugging Face checkpoint the model started from; None for random weights."""
    if not config.model.checkpoint:
        return None
    if (run_dir / _ORIGINAL).is_file():
        return read_json(run_dir / _ORIGINAL)
    return hf.read_config(config.model.checkpoint)  # a run of an earlier version


def ends_of_answers(config: Config, tokenizer: Any, run_dir: Path) -> tuple[int, ...]:
    """The tokens that end what a checkpoint writes: a transcript's, and what else it says ends a text or a turn."""
    said = hf_config.ends_of(original_config(config, run_dir) or {}, config.model.checkpoint)
    return (*dict.fromkeys((tokenizer.eos_token_id, *said)),)
