"""GGUF files of Hugging Face directories, as llama.cpp's converter writes them, for tests."""

import json

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy
from bpe import train_bpe

from fgrpo_jax.config import PromptConfig, TranscriptConfig
from fgrpo_jax.models import decoder, hf
from fgrpo_jax.models.families import FAMILIES
from fgrpo_jax.models.gguf import FAMILIES as FAMILIES_OF_FILES
from fgrpo_jax.policies.llm import tokenizers


def write_gguf(path, directory, family, quantized="F32", leave_out=(), more=()):
    """Matrices are quantized as asked, where a row holds whole blocks; vectors are floats.

    leave_out: metadata keys and tensors that the file lacks. more: (key, value) that are written, of uint32 or text.
    """
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(None, family)
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config.get("max_position_embeddings", 2048),
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "rope.dimension_count": config["head_dim"],
    }
    floats = {
        "rope.freq_base": config["rope_parameters"]["rope_theta"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }
    for name, value in keys.items():
        if name not in leave_out:
            writer.add_uint32(f"{family}.{name}", value)
    for name, value in floats.items():
        if name not in leave_out:
            writer.add_float32(f"{family}.{name}", value)
    if "tokenizer" not in leave_out:
        add_tokenizer(writer, directory)
    for key, value in more:
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    add_tensors(writer, directory, config, family, quantized, leave_out)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer, directory):
    """Of a byte-level BPE; its words are split by GPT-2's rule (tests/bpe.py)."""
    saved = json.loads((directory / "tokenizer.json").read_text())
    names = json.loads((directory / "tokenizer_config.json").read_text())
    ids = saved["model"]["vocab"] | {token["content"]: token["id"] for token in saved["added_tokens"]}
    tokens = sorted(ids, key=ids.get)
    special = {token["content"] for token in saved["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in saved["model"]["merges"]])
    writer.add_eos_token_id(ids[names["eos_token"]])
    writer.add_pad_token_id(ids[names["pad_token"]])
    if (directory / "chat_template.jinja").is_file():
        writer.add_chat_template((directory / "chat_template.jinja").read_text())


def add_tensors(writer, directory, config, family, quantized, leave_out):
    """The library's own table of names, not ours."""
    names = {text: arch for arch, text in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(names[family], config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    if config["rope_parameters"]["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config["head_dim"], **config["rope_parameters"]))
    for file in sorted(directory.glob("*.safetensors")):
        for name, array in safetensors.numpy.load_file(file).items():
            stem, kind = name.rsplit(".", 1)
            stored = f"{table.get_name(stem)}.{kind}"
            if stored in leave_out:
                continue
            if family == "llama" and (part := stem.rpartition(".")[2]) in heads:
                rows = array.reshape(heads[part], 2, -1, array.shape[-1])
                array = np.ascontiguousarray(rows.swapaxes(1, 2).reshape(array.shape))
            block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quantized]]
            its = quantized if array.ndim == 2 and array.shape[-1] % block == 0 else "F32"
            its = gguf.GGMLQuantizationType[its]
            writer.add_tensor(stored, gguf.quants.quantize(array.astype(np.float32), its), raw_dtype=its)


def llama3_factors(
    head_dim, rope_theta, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings, rope_type
):
    """By wave lengths: long ones are stretched, short ones are not, and between them the number of turns decides."""
    found = []
    for i in range(0, head_dim, 2):
        length = 2 * np.pi * rope_theta ** (i / head_dim)
        turns = original_max_position_embeddings / length
        if turns > high_freq_factor:
            found.append(1.0)
        elif turns < low_freq_factor:
            found.append(factor)
        else:
            smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


WORDS = "amber basil cedar delta ember fjord grove heron ivory jetty kelp lotus maple north olive".split()
NUMERICS = {
    "dtype": "float32", "param_dtype": "float32", "remat": False, "attention": "auto", "logit_chunk": 64
}  # fmt: skip


def directories(tmp_path_factory):
    """A Hugging Face directory of every family, with random weights."""
    tokenizer = train_bpe([" ".join(WORDS)] * 3, 320)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    found = {}
    for number, family in enumerate(FAMILIES_OF_FILES):
        found[family] = tmp_path_factory.mktemp(family)
        spec = decoder.DecoderSpec(
            vocab_size=320, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, mlp_size=96,
            rope_theta=50_000.0, norm_eps=1e-5, tie_embeddings=bool(number % 2), **FAMILIES[family].spec,
            rope_scaling=(32.0, 1.0, 4.0, 8192.0) if family == "llama" else (),
        )  # fmt: skip
        rng = np.random.default_rng(number)
        params = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32), decoder.shapes(spec))
        hf.save(found[family] / "model", spec, params, {"max_position_embeddings": 777, "eos_token_id": 1}, tokenizer)
    return {family: folder / "model" for family, folder in found.items()}


def load_tokenizer(name):
    return tokenizers.load(str(name), None, TranscriptConfig(), PromptConfig())


def rewritten(folder, source, rule, **options):
    """A file whose words are split by another rule than its tokenizer's."""
    with pytest.MonkeyPatch.context() as patch:
        before = gguf.GGUFWriter.add_tokenizer_pre
        patch.setattr(gguf.GGUFWriter, "add_tokenizer_pre", lambda self, _: before(self, rule))
        return write_gguf(folder / "other.gguf", source, "qwen3", **options)
