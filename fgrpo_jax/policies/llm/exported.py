"""ranking.json: what else than weights and tokenizer an exported language model needs to rank, here or elsewhere.

serving.py says how to use it, and is copied beside it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fgrpo_jax.config import Config, ConfigError, DataConfig, EvalConfig, ModelConfig, PromptConfig, TranscriptConfig
from fgrpo_jax.files import read_json
from fgrpo_jax.policies.llm import prompts, serving
from fgrpo_jax.policies.llm.grammar import Grammar

FILE = "ranking.json"


def files(config: Config, grammar: Grammar, kind: str, instruction: str, begins: Sequence[int]) -> dict[str, str]:
    """Names and texts of the files. begins: see prompts.beginning. Raises ConfigError on another kind of prompts."""
    said = describe(config, grammar, kind, config.prompt.instruction or instruction, begins)
    return {FILE: json.dumps(said, indent=1, ensure_ascii=False) + "\n", "ranking.py": inspect.getsource(serving)}


def describe(
    config: Config, grammar: Grammar, kind: str, instruction: str, begins: Sequence[int] = ()
) -> dict[str, Any]:
    t = config.transcript
    literals = {
        name: {"text": getattr(t, name), "tokens": list(getattr(grammar, name))}
        for name in ("separator", "slate_close", "rank_close")
    }
    limits = {name: getattr(t, name) for name in ("slate_min", "slate_max", "rank_min", "rank_max")}
    written = {"identifier": t.identifier, "constrained": t.constrained, **literals, "eos": grammar.eos, **limits}
    return {
        "prompt": {
            "template": prompts.template(kind, t.identifier),
            "instruction": instruction,
            "opening": t.slate_open,
            "chat": config.prompt.chat,
            "begins": list(begins),
            "text_tokens": config.prompt.text_tokens,
            "history_max": config.data.history_max,
            "max_tokens": max(config.data.prompt_buckets),
        },
        "transcript": written,
        "regex": serving.regex_of(written, serving.ITEM, t.slate_max),
        "ebnf": serving.ebnf_of(written, serving.ITEM, t.slate_max),
        "about": (
            f"{serving.ITEM} stands for the alternatives of a pool's identifiers, escaped; for pools of at least "
            "slate_max candidates. Neither says that no item is repeated, nor that the ranking is of the slate: "
            "ranking.py makes grammars that do."
        ),
        "run": {
            "kind": kind,
            "seed": config.seed,
            "prompt_buckets": list(config.data.prompt_buckets),
            "identifier_width": t.identifier_width,
            "batch_queries": config.eval.batch_queries,
            "dtype": config.model.dtype,
            "param_dtype": config.model.param_dtype,
        },
    }


def read(folder: Path) -> tuple[Config, str]:
    """The configuration to rank with, and the kind of prompts. Raises ConfigError if damaged."""
    said = read_json(folder / FILE, ("prompt", "transcript", "run"))
    try:
        prompt, transcript, run = said["prompt"], said["transcript"], said["run"]
        names = [field.name for field in dataclasses.fields(TranscriptConfig)]
        of_shapes = {"identifier_width": run.get("identifier_width", 1)}  # older exports have none
        written = {"slate_open": prompt["opening"]} | transcript | of_shapes
        written |= {name: transcript[name]["text"] for name in ("separator", "slate_close", "rank_close")}
        config = Config(
            seed=run["seed"],
            run_dir=str(folder),
            tokenizer=str(folder),
            prompt=PromptConfig(
                instruction=prompt["instruction"],
                chat=prompt["chat"],
                bos=bool(prompt.get("begins")),  # older exports have none, and began their prompts with nothing
                text_tokens=prompt.get("text_tokens", 0),  # older exports have none
            ),
            transcript=TranscriptConfig(**{name: written[name] for name in names}),
            model=ModelConfig(checkpoint=str(folder), dtype=run["dtype"], param_dtype=run["param_dtype"]),
            data=DataConfig(history_max=prompt["history_max"], prompt_buckets=tuple(run["prompt_buckets"])),
            eval=EvalConfig(batch_queries=run["batch_queries"]),
        )
        return config, run["kind"]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder / FILE} is damaged ({error!r}): export the run again") from None
