"""GGUF files that are broken, foreign or not read are refused by name."""

import sys

import gguf as library
import numpy as np
import pytest
from helpers import refusal
from write_gguf import NUMERICS, load_tokenizer, rewritten, write_gguf

from fgrpo_jax.models import hf


def test_the_library_is_asked_for(qwen3, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf", qwen3, "qwen3")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "is read by the library gguf: pip install -e '.[gguf]'" in refusal(hf.read_config, path)


def test_no_gguf_file(tmp_path):
    assert "nowhere.gguf does not exist" in refusal(hf.read_config, tmp_path / "nowhere.gguf")
    for content in (b"", b"GG", b"PK\x03\x04 a zip", b"{}"):
        (tmp_path / "model.gguf").write_bytes(content)
        for call in (hf.read_config, load_tokenizer):
            assert "model.gguf is not a GGUF file" in refusal(call, tmp_path / "model.gguf")


def test_truncated_anywhere(qwen3, tmp_path):
    whole = write_gguf(tmp_path / "model.gguf", qwen3, "qwen3", "Q8_0").read_bytes()
    data = library.GGUFReader(tmp_path / "model.gguf").data_offset
    for size in (5, 10, 30, 100, 1000, data // 2, data - 70, data, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        assert "cut.gguf is truncated, damaged" in refusal(hf.read_config, tmp_path / "cut.gguf"), size


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"leave_out": ["block_count"]}, "model.gguf has no qwen3.block_count"),
        ({"leave_out": ["token_embd.weight"]}, "model.gguf has no tensor token_embd.weight"),
        ({"more": [("qwen3.rope.dimension_count", 16)], "leave_out": ["rope.dimension_count"]}, "a part of a head"),
        ({"more": [("qwen3.attention.value_length", 16)], "leave_out": ["attention.value_length"]}, "another length"),
        ({"more": [("qwen3.rope.scaling.type", "yarn")]}, "'yarn'"),
        ({"more": [("qwen3.attention.sliding_window", 64)]}, "qwen3.attention.sliding_window is not supported"),
        ({"more": [("qwen3.expert_count", 8)]}, "qwen3.expert_count is not supported"),
        ({"more": [("split.count", 3)]}, "is one of 3 files of a split model: join them"),
        (
            {"more": [("qwen3.attention.head_count", 0)], "leave_out": ["attention.head_count"]},
            "attention.head_count=0 must be one positive number",
        ),
        (
            {"more": [("qwen3.block_count", "two")], "leave_out": ["block_count"]},
            "block_count='two' must be one positive number",
        ),
    ],
)
def test_models_that_are_refused(qwen3, tmp_path, options, complaint):
    path = write_gguf(tmp_path / "model.gguf", qwen3, "qwen3", **options)
    assert complaint in refusal(hf.read_spec, path, **NUMERICS)


def test_another_scaling_than_llama_3s_is_refused(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("write_gguf.llama3_factors", lambda *_, **__: np.linspace(1, 32, 16, dtype=np.float32))
    path = write_gguf(tmp_path / "model.gguf", folders["llama"], "llama")
    assert "rope_freqs.weight scales rotary embedding otherwise than Llama 3" in refusal(hf.read_config, path)


def test_another_family_is_refused(qwen3, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", qwen3, "qwen3")
    path.write_bytes(path.read_bytes().replace(b"qwen3", b"gemma"))
    for call in (hf.read_config, load_tokenizer):
        assert "architecture 'gemma' is not supported; supported are qwen3, qwen2, llama" in refusal(call, path)


def test_tensors_that_are_refused(qwen3, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf", qwen3, "qwen3", leave_out=["blk.1.ffn_up.weight"])
    spec = hf.read_spec(path, **NUMERICS)
    assert "has no tensor model.layers.1.mlp.up_proj.weight" in refusal(hf.load, path, spec)
    path = write_gguf(tmp_path / "other.gguf", qwen3, "qwen3")
    narrow = spec._replace(mlp_size=64)
    assert "has shape (96, 64), but its metadata give (64, 64)" in refusal(hf.load, path, narrow)
    assert "no place: model.layers.1." in refusal(hf.load, path, spec._replace(num_layers=1))


def test_values_that_cannot_be_dequantized(qwen3, tmp_path, monkeypatch):
    """I32 is a type of the format, and none of weights."""
    kinds = library.GGMLQuantizationType
    monkeypatch.setattr(library.quants, "quantize", lambda array, kind: array.astype(np.int32))
    with monkeypatch.context() as patch:
        patch.setattr(library, "GGMLQuantizationType", {"F32": kinds.I32})
        path = write_gguf(tmp_path / "model.gguf", qwen3, "qwen3")
    spec = hf.read_spec(path, **NUMERICS)
    assert "is quantized as I32, which is not read" in refusal(hf.load, path, spec)


def test_a_later_part_of_a_split_model_says_so_too(tmp_path):
    """It has no other metadata."""
    writer = library.GGUFWriter(tmp_path / "model-00002-of-00003.gguf", "qwen3")
    writer.kv_data[0].clear()
    writer.add_uint16("split.count", 3)
    writer.add_tensor("blk.1.ffn_up.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for call in (hf.read_config, load_tokenizer):
        assert "is one of 3 files of a split model" in refusal(call, tmp_path / "model-00002-of-00003.gguf")


def test_values_of_a_type_that_the_library_does_not_know(qwen3, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", qwen3, "qwen3")
    name, data = b"token_embd.weight", bytearray(path.read_bytes())
    at = data.index(name) + len(name) + 4 + 2 * 8  # the number of axes, two sizes
    assert data[at : at + 4] == bytes(4)  # F32
    data[at] = 99
    path.write_bytes(data)
    assert "quantized as type 99, which gguf " in (said := refusal(hf.read_config, path)) and "--upgrade gguf" in said


def test_tokenizers_that_are_refused(qwen3, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", qwen3, "qwen3", leave_out=["tokenizer"])
    hf.read_spec(path, **NUMERICS)  # the model can be read, with a tokenizer from elsewhere
    assert "holds no tokenizer: set `tokenizer` to a Hugging Face directory" in refusal(load_tokenizer, path)
    path = rewritten(tmp_path, qwen3, "unheard-of")
    assert "split by the rule 'unheard-of', which is none of gpt-2, smollm" in refusal(load_tokenizer, path)
    for name, value, complaint in (
        ("add_tokenizer_model", "llama", "a tokenizer of kind 'llama'"),
        ("add_eos_token_id", 320, "tokenizer.ggml.eos_token_id=320 is none of 320 tokens"),
        ("add_token_merges", ["no such pair"], "the merges do not fit the vocabulary"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            before = getattr(library.GGUFWriter, name)
            patch.setattr(library.GGUFWriter, name, lambda self, _, before=before, value=value: before(self, value))
            path = write_gguf(tmp_path / "broken.gguf", qwen3, "qwen3")
        assert complaint in refusal(load_tokenizer, path)
