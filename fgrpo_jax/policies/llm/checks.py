"""What a language model cannot be trained on: this machine, these queries; asked before anything compiles."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import warnings
from collections import Counter
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from fgrpo_jax.config import MADE_OF_DATA, Config, ConfigError, ModelConfig
from fgrpo_jax.data.datasets import DataError, Dataset
from fgrpo_jax.policies.llm import prompts, serving
from fgrpo_jax.policies.llm.encode import LONGEST_NAME, check_width
from fgrpo_jax.policies.llm.files import attention_of
from fgrpo_jax.policies.llm.serving import LETTERS
from fgrpo_jax.stages import stages
from fgrpo_jax.types import RankingExample


def check_training(config: Config, tokenizer, encode: Callable, mesh: Mesh, dataset: Dataset, split: str) -> None:
    """See Policy.check; `encode` is the policy's.

    Raises ConfigError for attention or weights that this machine cannot compute, for a chat template that cannot be
    answered at once, and for pools with more candidates than letters, where these name them; DataError for pools in
    which two candidates are named by the same text, and for the longest queries of every split where they fit no
    bucket. Warns of a tokenizer that merges pieces of transcripts, as a query of `split` shows them, and of one whose
    tokens for the candidates of `split` are not trained.
    """
    check_attention(config.model)
    _check_bfloat16(config.model, mesh)
    _note_rates(config)
    if config.eval.prompted and tokenizer.chat_template:
        prompts.asked(tokenizer, "a", "eval.prompted")
    if config.transcript.identifier == "letter":
        _check_letters(dataset, config.data.pool_size)
    if config.transcript.identifier == "text":
        check_names(dataset, tokenizer)
    _check_longest(encode, dataset, config)
    warn_of_merges(config, tokenizer, dataset.splits[split][0])
    warn_of_untrained(config, dataset, split)


def check_attention(model: ModelConfig) -> None:
    """Raises ConfigError where the kernels are asked for and do not run."""
    if model.attention == "flash" and attention_of(model) != "flash":
        raise ConfigError(
            "model.attention='flash' needs an NVIDIA GPU of compute capability 8.0 or a TPU v5, or later ones, "
            f"and this is a {jax.devices()[0].device_kind}: set 'auto' or 'blocks'"
        )


_ALL_TRAINED = 1e-4  # learning rates above it are for adapters and for random weights
_ADAPTERS = 1e-5  # below it, for whole checkpoints: adapters begin at zero, and would stay there


def _note_rates(config: Config) -> None:
    """Say where a whole checkpoint is trained as adapters would be, as by configs/smollm2.py with lora.rank=0, or
    adapters as a whole checkpoint; and where the base of adapters takes twice the room that its numbers need."""
    model, rank = config.model, config.model.lora.rank
    if not model.checkpoint or jax.process_index():
        return
    rates = {name: stage.optim.learning_rate for name, stage in stages(config).items() if stage.steps}
    strange = [
        f"{name}.optim.learning_rate={rate:g}"
        for name, rate in rates.items()
        if (rate < _ADAPTERS if rank else rate > _ALL_TRAINED)
    ]
    if strange:
        of, usual = ("whole checkpoints", "1e-4") if rank else ("adapters or random weights", "1e-5")
        print(
            f"note: model.lora.rank={rank} trains {'adapters of' if rank else 'all parameters of'} {model.checkpoint}: "
            f"rates such as {' and '.join(strange)} are meant for {of}, {usual} is more usual"
        )
    if rank and model.dtype == "bfloat16" and model.lora.base_dtype == "float32":
        print(
            "note: model.lora.base_dtype='float32' keeps weights that are not trained at twice the size that "
            "model.dtype='bfloat16' computes with: set it to 'bfloat16', unless the checkpoint has more"
        )


def _check_bfloat16(model: ModelConfig, mesh: Mesh) -> None:
    """XLA's CPU compiler aborts on sums of bfloat16 over some axes of a mesh, where others are its own to split."""
    if model.param_dtype != "bfloat16" or jax.default_backend() != "cpu":
        return
    if mesh.shape["tensor"] > 1 and mesh.shape["data"] * mesh.shape["fsdp"] > 1:
        raise ConfigError(
            "model.param_dtype='bfloat16' on CPUs cannot be compiled with mesh.tensor above 1 and queries split too "
            "(mesh.data, mesh.fsdp): set mesh.tensor=1, or model.param_dtype='float32'"
        )


def _check_letters(dataset: Dataset, pool_size: int) -> None:
    """The largest pool of every split; pool_size: of those that are drawn."""
    for name, split in dataset.splits.items():
        drawn = dataset.sampled_negatives and name == "train"
        most = pool_size if drawn else max(len(example.candidates) for example in split)
        if most > len(LETTERS):
            raise ConfigError(
                f"transcript.identifier='letter' has {len(LETTERS)} letters, and split {name!r} has pools of {most} "
                "candidates: set it to 'index'"
            )


def check_names(dataset: Dataset, tokenizer) -> None:
    """Of given pools whose candidates are named by their texts: raises DataError where two have the same one, or where
    one is too long for a name."""
    for split, rows in dataset.splits.items():
        for example in rows:
            known: dict[str, str] = {}
            for item, text in example.candidates:
                if known.setdefault(text, item) != item:
                    raise DataError(
                        f"split {split!r}, query {example.query_id!r}: candidates {known[text]!r} and {item!r} have "
                        "the same text, by which transcripts name them: leave one out, or set "
                        "transcript.identifier='index'"
                    )
                if len(text.encode()) > LONGEST_NAME:  # no token is shorter than a byte
                    check_width(example.query_id, item, serving.encoded([text], tokenizer)[0])


def _check_longest(encode: Callable, dataset: Dataset, config: Config, how_many: int = 16) -> None:
    """Encode the longest given pools of every split: one that fits no bucket is refused now.

    The longest by characters, with the history that is shown; sampled pools are drawn anew every epoch and cannot be
    listed.
    """
    for name, split in dataset.splits.items():
        if dataset.sampled_negatives and name == "train":
            continue
        shown = (dataclasses.replace(e, history=e.history[-config.data.history_max :]) for e in split)
        length = functools.partial(prompts.characters, text_tokens=config.prompt.text_tokens)
        encode(heapq.nlargest(how_many, shown, key=length))


def warn_of_merges(config: Config, tokenizer, example: RankingExample) -> None:
    """Warn where the tokenizer, given a whole transcript, merges across a piece boundary.

    Transcripts are built piece by piece; a model that was never fine-tuned on them prefers
    the merged form, so its unconstrained zero-shot output will break the grammar there. Tokenizers made of
    the data, in which every piece is a word or several, only ever read pieces.
    """
    t = config.transcript
    if config.tokenizer in MADE_OF_DATA:
        return
    names = prompts.identifier_texts(example, t.identifier)[: t.slate_min]
    ranked = names[: t.rank_min]
    pieces = [t.slate_open]
    for items, close in ((names, t.slate_close), (ranked, t.rank_close)):
        for i, name in enumerate(items):
            pieces += [t.separator] * bool(i and t.separator) + [name]
        pieces.append(close)
    for left, right in zip(pieces, pieces[1:]):
        apart = [*tokenizer.encode(left, add_special_tokens=False), *tokenizer.encode(right, add_special_tokens=False)]
        if tokenizer.encode(left + right, add_special_tokens=False) != apart:
            warnings.warn(
                f"the tokenizer merges {left!r} and {right!r} when they meet; transcripts keep them apart, "
                "which a model not yet fine-tuned does not expect (see transcript.separator and the tags)",
                stacklevel=2,
            )
            return


UNTRAINED_SHARE = 0.05  # of the candidates


def warn_of_untrained(config: Config, dataset: Dataset, split: str) -> None:
    """Warn where an item is a token of its own, and many candidates of `split` are in no training query."""
    if config.tokenizer != "catalogue" or dataset.sampled_negatives or "train" not in dataset.splits:
        return
    left = Counter(text for example in dataset.splits[split] for _, text in example.candidates)
    total = untrained = max(1, left.total())
    for example in dataset.splits["train"]:  # of which the first few name most
        untrained -= sum(left.pop(text, 0) for _, text in (*example.candidates, *example.history))
        if untrained <= UNTRAINED_SHARE * total:
            return
    warnings.warn(
        f"tokenizer='catalogue' makes every item a token, and {untrained / total:.1%} of the candidates of {split} are "
        "in no training query: nothing is learnt of them; 'words' or a tokenizer of your own reads their texts",
        stacklevel=2,
    )
