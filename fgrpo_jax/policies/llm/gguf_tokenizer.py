"""The tokenizer in a GGUF file, which is a vocabulary, merges and names of rules, as a Hugging Face fast tokenizer.

`transformers` reads such files too, but only where torch is installed, and with GPT-2's rule for splitting words where
it does not know the name of a file's rule (SmolLM2's, which splits digits first).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fgrpo_jax.errors import ModelFilesError
from fgrpo_jax.models import gguf

_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type: special tokens, and others never cut into pieces
_WORDS = (  # of Llama 3 and Qwen2, which differ in how many digits may stand together
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = _WORDS % r"\p{N}{1,3}", _WORDS % r"\p{N}"
# tokenizer.ggml.pre -> the expression for words; "" is GPT-2's, "digits" the same once every digit was parted.
_SPLITS = {
    "gpt-2": "",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def read(path: Path) -> Any:
    """A PreTrainedTokenizerFast with the file's special tokens and chat template.

    Raises ModelFilesError for a file without a tokenizer, without an eos token, or with a tokenizer of another
    kind than byte-level BPE or with rules that are not known here.
    """
    file = gguf.open_file(path)
    otherwise = "set `tokenizer` to a Hugging Face directory"
    tokens = file.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ModelFilesError(f"{path} holds no tokenizer: {otherwise}")
    if (kind := file.get("tokenizer.ggml.model")) != "gpt2":
        raise ModelFilesError(
            f"{path} holds a tokenizer of kind {kind!r}; only 'gpt2' (byte-level BPE) is read: {otherwise}"
        )
    if (rule := file.get("tokenizer.ggml.pre")) not in _SPLITS:
        raise ModelFilesError(
            f"{path}: words are split by the rule {rule!r}, which is none of {', '.join(_SPLITS)}: {otherwise}"
        )
    special = {f"{name}_token": _special(file, key, tokens) for name, key in _IDS.items()}
    if special["eos_token"] is None:
        raise ModelFilesError(f"{path} names no eos token, and a transcript ends with one: {otherwise}")
    import transformers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=_backend(file, tokens, rule, special["bos_token"]),
        clean_up_tokenization_spaces=False,
        chat_template=file.get("tokenizer.chat_template"),
        **{name: token for name, token in special.items() if token is not None},
    )


_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _special(file: gguf.Gguf, key: str, tokens: list[str]) -> str | None:
    number = file.get(f"tokenizer.ggml.{key}_token_id")
    if number is not None and not 0 <= number < len(tokens):
        raise ModelFilesError(f"{file.path}: tokenizer.ggml.{key}_token_id={number} is none of {len(tokens)} tokens")
    return None if number is None else tokens[number]


def _backend(file: gguf.Gguf, tokens: list[str], rule: str, bos: str | None) -> Any:
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    merges = [tuple(pair.split(" ", 1)) for pair in file.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    split = _SPLITS[rule]
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=split == _LLAMA3)
    except Exception as error:  # a plain Exception: of a merge that is no pair, or of tokens that are none
        raise ModelFilesError(f"{file.path}: the merges do not fit the vocabulary ({error}): copy again") from None
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split == "digits":
        digits = pre_tokenizers.Digits(individual_digits=True)
        made.pre_tokenizer = pre_tokenizers.Sequence([digits, made.pre_tokenizer])
    elif split:
        words = pre_tokenizers.Split(tokenizers.Regex(split), "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    if split == _QWEN2:
        made.normalizer = normalizers.NFC()
    made.decoder = tokenizers.decoders.ByteLevel()
    if bos and file.get("tokenizer.ggml.add_bos_token", split == _LLAMA3):  # where it is left out, as llama.cpp
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    kinds = file.get("tokenizer.ggml.token_type", [])
    for kind in (_CONTROL, _USER_DEFINED):
        whole = [token for token, its in zip(tokens, kinds) if its == kind]
        made.add_tokens([tokenizers.AddedToken(token, normalized=False, special=kind == _CONTROL) for token in whole])
    return made
