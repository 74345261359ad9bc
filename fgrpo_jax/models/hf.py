"""Checkpoints in the Hugging Face form, in and out: config.json and safetensors; in from GGUF files too.

    spec = hf.read_spec(
        directory, dtype="bfloat16", param_dtype="float32", remat=True, attention="auto", logit_chunk=4096
    )
    params = hf.load(directory, spec, shardings)
    hf.save(out, spec, params, hf.read_config(directory), tokenizer)

hf_layout.py says how parameters are called and laid out there.
A checkpoint that loads gives the logits of `transformers`; everything else is refused.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from fgrpo_jax.errors import ModelFilesError
from fgrpo_jax.files import is_address, path_of, send, storing
from fgrpo_jax.models import gguf
from fgrpo_jax.models.decoder import DecoderSpec
from fgrpo_jax.models.hf_config import (
    GENERATION,
    SAID_OF_TOKENS,
    check_there,
    make_config,
    read_config,
    read_json,
    read_spec,
)
from fgrpo_jax.models.hf_layout import TENSORS, Tensor, flat_table, tensors_of, to_ours, to_stored
from fgrpo_jax.models.layers import Adapted
from fgrpo_jax.models.lora import merged
from fgrpo_jax.types import Array, PyTree

__all__ = ["ModelFilesError", "load", "read_config", "read_spec", "save"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_READABLE = ("F32", "F16", "BF16")
# Prefixes of a text model's tensors in a model of images and text, and what they are alone; and of what is not read.
_TEXT = {"model.language_model.": "model.", "language_model.model.": "model.", "language_model.lm_head.": "lm_head."}
_IMAGES = ("visual.", "vision_tower.", "multi_modal_projector.")
_BESIDE_TEXT = ("mtp.", *_IMAGES, *(f"model.{name}" for name in _IMAGES))
_ROWS = 4096  # compared at a time


# --------------------------------------------------------------------- reading weights


def load(checkpoint: str | Path, spec: DecoderSpec, shardings: PyTree | None = None) -> PyTree:
    """The weights in `spec.param_dtype`, laid out as `decoder.param_table` says.

    shardings: a pytree as the parameters', or None for the default device. Tensors are read
    one by one; the host never holds more than one parameter besides what devices hold.
    Names, shapes and types are all checked before the first weight is read. Raises
    ModelFilesError: a file that is missing or truncated, a tensor that is missing, unknown,
    quantized, or of another shape than config.json gives.
    """
    folder = gguf.locate(checkpoint)
    flat_shardings = None if shardings is None else flatten_dict(shardings, sep="/")
    with contextlib.ExitStack() as stack:
        files = _open_all(folder, stack)
        _check(folder, spec, files)
        params: dict[str, Array] = {}
        for path, param in flat_table(spec).items():
            host = np.empty(param.shape, jnp.dtype(spec.param_dtype))
            for tensor in (t for t in tensors_of(spec) if t.path == path):
                where = ... if tensor.layer is None else tensor.layer
                host[where] = to_ours(tensor, files[tensor.name].get_tensor(tensor.name))
            if flat_shardings is None:
                params[path] = jax.device_put(host)
                continue
            params[path] = jax.make_array_from_callback(host.shape, flat_shardings[path], host.__getitem__)
    return unflatten_dict(params, sep="/")


def _open_all(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Every tensor's name and the open file that holds it; only headers are read."""
    if gguf.is_meant(folder):
        tensors = gguf.open_tensors(folder)
        return dict.fromkeys(tensors.keys(), tensors)
    check_there(folder)
    if (folder / SINGLE).is_file():
        names = [SINGLE]
    elif (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise ModelFilesError(f"{folder / INDEX} has no weight_map")
        names = sorted(set(weight_map.values()))
    else:
        raise ModelFilesError(f"{folder} holds neither {SINGLE} nor {INDEX}; other formats are not read")
    files = {}
    for name in names:
        if not (folder / name).is_file():
            raise ModelFilesError(f"{folder / name} is missing, but {INDEX} names it: copy it too")
        try:
            file = stack.enter_context(safetensors.safe_open(folder / name, framework="numpy"))
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelFilesError(f"{folder / name} is truncated or damaged: copy again ({error})") from None
        files.update(dict.fromkeys(file.keys(), file))
    return _of_text(files)


class _Renamed(NamedTuple):
    """A tensor of an open file, whatever name it is asked for by."""

    file: Any
    name: str

    def get_tensor(self, _: str) -> np.ndarray:
        return self.file.get_tensor(self.name)

    def get_slice(self, _: str) -> Any:
        return self.file.get_slice(self.name)


def _of_text(files: dict[str, Any]) -> dict[str, Any]:
    """Where a model of images and text lies, its text model, by the names that one alone has."""
    if not any(name.startswith(tuple(_TEXT)) for name in files):
        return files

    def alone(name: str) -> str:
        start = next((start for start in _TEXT if name.startswith(start)), "")
        return _TEXT.get(start, "") + name.removeprefix(start)

    return {alone(name): _Renamed(files[name], name) for name in files if not name.startswith(_BESIDE_TEXT)}


def _check(folder: Path, spec: DecoderSpec, files: dict[str, Any]) -> None:
    expected = {tensor.name: tensor for tensor in tensors_of(spec)}
    says = "config.json gives" if folder.is_dir() else "its metadata give"
    head = TENSORS["head"].name
    if missing := sorted(set(expected) - set(files)):
        hint = " (config.json says the embeddings are not tied)" if head in missing else ""
        raise ModelFilesError(f"{folder} has no tensor {_some(missing)}{hint}")
    tied_copy = {head} if spec.tie_embeddings else set()
    if unknown := sorted(set(files) - set(expected) - tied_copy):
        raise ModelFilesError(f"{folder} has tensors that {says} no place: {_some(unknown)}")
    for name, tensor in expected.items():
        stored = files[name].get_slice(name)
        if tuple(stored.get_shape()) != tensor.stored_shape:
            raise ModelFilesError(
                f"{folder}: tensor {name} has shape {tuple(stored.get_shape())}, but {says} {tensor.stored_shape}"
            )
        if stored.get_dtype() not in _READABLE:
            raise ModelFilesError(
                f"{folder}: tensor {name} has type {stored.get_dtype()}; supported are {', '.join(_READABLE)}"
            )
    if spec.tie_embeddings and head in files:
        embed = TENSORS["embed"].name
        _check_tied(folder, files[embed].get_slice(embed), files[head].get_slice(head))


def _check_tied(folder: Path, embed: Any, head: Any) -> None:
    """Some writers store the tied head too: it must be the embedding, or something was lost."""
    same = embed.get_shape() == head.get_shape() and embed.get_dtype() == head.get_dtype()
    size = embed.get_shape()[0]
    parts = [slice(i, min(i + _ROWS, size)) for i in range(0, size, _ROWS)]
    if not same or not all(np.array_equal(embed[rows], head[rows]) for rows in parts):
        raise ModelFilesError(
            f"{folder}: tie_word_embeddings is true in config.json, but {TENSORS['head'].name} "
            f"differs from {TENSORS['embed'].name}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --------------------------------------------------------------------- writing


def save(
    directory: str | Path,
    spec: DecoderSpec,
    params: PyTree,
    hf_config: dict[str, Any] | None,
    tokenizer: Any,
    max_file_bytes: int = 4 * 1024**3,
    also: Mapping[str, str] | None = None,
    dtype: str = "",
) -> None:
    """Write a directory that `transformers.AutoModelForCausalLM.from_pretrained` loads.

    hf_config: config.json of the checkpoint training started from: its other fields (context
        length, token ids) are kept. None: those come from the tokenizer and the defaults of
        `transformers`.
    params: adapters of its weights are merged in, a layer at a time.
    also: texts of further files, by name. dtype: of the stored weights; empty: that of `params`.
    The directory appears whole or not at all; at an address
    config.json comes last. Raises ModelFilesError when it exists and is not empty, or when
    parameters lie on other hosts, StorageError when it cannot be written.
    """
    target, flat = check_free(directory), addressable(params)
    dtype = dtype or str(flat["embed"].dtype)
    config = make_config(spec, dtype, hf_config, tokenizer.eos_token_id, tokenizer.pad_token_id)

    def write(folder: Path) -> None:
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        said = {name: config[name] for name in SAID_OF_TOKENS if config.get(name) is not None}
        (folder / GENERATION).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(folder)
        for name, content in (also or {}).items():
            (folder / name).write_text(content, encoding="utf-8")
        _save_weights(folder, spec, flat, dtype, max_file_bytes)

    write_whole(target, write, "config.json")


def check_free(directory: str | Path) -> Path:
    """Where to write. Raises ModelFilesError when something is there."""
    target = path_of(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelFilesError(f"{target} exists and is not empty: remove it, or export somewhere else")
    return target


def _on_host(weight: Array | Adapted, layer: int | None) -> np.ndarray:
    of_layer = weight if layer is None else jax.tree.map(lambda x: x[layer], weight)
    return merged(of_layer) if isinstance(of_layer, Adapted) else np.asarray(of_layer)


def addressable(params: PyTree) -> dict[str, Array | Adapted]:
    """Parameters by their paths. Raises ModelFilesError when some lie on other hosts."""
    flat = flatten_dict(params, sep="/")
    if not all(x.is_fully_addressable for x in jax.tree.leaves(flat) if isinstance(x, jax.Array)):
        raise ModelFilesError("parameters lie on several hosts: export from a single-host run of eval.py")
    return flat


def write_whole(target: Path, write: Callable[[Path], None], last: str) -> None:
    """What `write` puts into a folder, at `target`: at once, or at an address with `last` as the last file."""
    with storing(target, Exception):  # the libraries raise their own kinds
        if is_address(target):
            with tempfile.TemporaryDirectory() as scratch:
                write(Path(scratch))
                send(Path(scratch), target, last)
            return
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
        try:
            partial.mkdir(parents=True)
            write(partial)
            os.replace(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _save_weights(
    folder: Path, spec: DecoderSpec, flat: dict[str, Array | Adapted], dtype: str, max_file_bytes: int
) -> None:
    files: list[list[Tensor]] = [[]]
    sizes = [0]
    for tensor in tensors_of(spec):
        size = math.prod(tensor.shape) * jnp.dtype(dtype).itemsize
        if files[-1] and sizes[-1] + size > max_file_bytes:
            files.append([])
            sizes.append(0)
        files[-1].append(tensor)
        sizes[-1] += size
    names = [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    if len(files) == 1:
        names = [SINGLE]
    for name, tensors in zip(names, files, strict=True):
        arrays = {}
        for t in tensors:
            arrays[t.name] = to_stored(t, _on_host(flat[t.path], t.layer).astype(jnp.dtype(dtype), copy=False))
        safetensors.numpy.save_file(arrays, folder / name, metadata={"format": "pt"})
    if len(files) > 1:
        weight_map = {t.name: name for name, tensors in zip(names, files, strict=True) for t in tensors}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
