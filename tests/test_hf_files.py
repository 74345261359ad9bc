"""Checkpoint directories without torch: a round trip, and what is broken is refused by name."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from bpe import train_bpe
from helpers import random_params, refusal

from fgrpo_jax.models import decoder, hf

SPEC = decoder.DecoderSpec(
    vocab_size=300,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_size=96,
    rope_theta=50_000.0,
    tie_embeddings=False,
    logit_chunk=64,
)
NUMERICS = {
    "dtype": "float32", "param_dtype": "float32", "remat": False, "attention": "auto", "logit_chunk": 64
}  # fmt: skip


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["one text"], SPEC.vocab_size)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """(params, directory with several files) of a random untied model."""
    params = random_params(SPEC)
    folder = tmp_path_factory.mktemp("saved") / "model"
    hf.save(folder, SPEC, params, None, tokenizer, max_file_bytes=200_000)
    return params, folder


@pytest.fixture
def broken(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved[1], tmp_path / "broken")


def set_fields(folder, **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "remove"}))


def read(folder):
    return hf.read_spec(folder, **NUMERICS)


def test_round_trip(saved):
    params, folder = saved
    assert read(folder) == SPEC
    assert same(params, hf.load(folder, SPEC))


def test_load_onto_shardings(saved):
    params, folder = saved
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = hf.load(folder, SPEC, jax.tree.map(lambda _: sharding, decoder.shapes(SPEC)))
    assert same(params, placed)
    assert all(x.sharding == sharding for x in jax.tree.leaves(placed))


@pytest.mark.parametrize(
    "fields, complaint",
    [
        ({"model_type": "mistral"}, "model_type='mistral' is not supported; supported are qwen3, qwen2, llama"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu' is"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds 'sliding_attention'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling={'type': 'yarn', 'factor': 4.0}"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4}}, "only rope_type default, linear, llama3"),
        ({"rope_theta": 1e6}, "contradicts itself: rope_parameters.rope_theta=50000.0, rope_theta=1000000.0"),
        ({"rope_theta": "remove", "rope_parameters": None}, "neither rope_theta nor rope_parameters"),
        ({"hidden_size": "remove"}, "has no field 'hidden_size'"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers='3' must be a positive integer"),
        ({"rms_norm_eps": -1}, "rms_norm_eps=-1 must be a positive number"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 31}, "head_dim=31 must be even"),
    ],
)
def test_configs_that_are_refused(broken, fields, complaint):
    set_fields(broken, **fields)
    assert complaint in refusal(read, broken)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": "remove", "rope_scaling": None},  # as transformers 4 writes
        {"rope_theta": "remove"},  # as transformers 5 writes
        {"layer_types": ["full_attention"] * 3, "sliding_window": None, "max_window_layers": 28},
    ],
)
def test_configs_that_are_the_same_model(broken, fields):
    set_fields(broken, **fields)
    assert read(broken) == SPEC


def test_missing_directory_and_config(tmp_path):
    assert "nowhere is not there: give a Hugging Face directory, a GGUF file or smollm2" in refusal(
        read, tmp_path / "nowhere"
    )
    assert "nowhere is not there: give a Hugging Face directory, a GGUF file or smollm2" in refusal(
        hf.load, tmp_path / "nowhere", SPEC
    )
    assert "config.json does not exist" in refusal(read, tmp_path)
    assert "holds neither model.safetensors nor" in refusal(hf.load, tmp_path, SPEC)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(read, tmp_path)


def test_missing_truncated_and_damaged_files(broken):
    files = sorted(broken.glob("*.safetensors"))
    assert len(files) > 3
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-10])
    assert f"{files[1].name} is truncated or damaged" in refusal(hf.load, broken, SPEC)
    files[1].write_bytes(whole[:5])
    assert f"{files[1].name} is truncated or damaged" in refusal(hf.load, broken, SPEC)
    files[1].unlink()
    assert f"{files[1].name} is missing, but model.safetensors.index.json names it" in refusal(hf.load, broken, SPEC)
    (broken / hf.INDEX).write_text('{"metadata": {}}')
    assert "has no weight_map" in refusal(hf.load, broken, SPEC)


def rewrite(folder, change):
    """All tensors into one file, after `change` of the dict."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(path)
        path.unlink()
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / hf.SINGLE)


@pytest.mark.parametrize(
    "name, value, complaint",
    [
        ("model.layers.1.mlp.up_proj.weight", None, "has no tensor model.layers.1.mlp.up_proj.weight"),
        ("lm_head.weight", None, "has no tensor lm_head.weight (config.json says the embeddings are not"),
        ("model.layers.3.mlp.up_proj.weight", (2, 2), "no place: model.layers.3.mlp.up_proj.weight"),
        ("model.layers.0.self_attn.q_proj.bias", (128,), "no place: model.layers.0.self_attn.q_proj.bias"),
        (
            "model.layers.2.self_attn.k_proj.weight",
            (64, 32),
            "model.layers.2.self_attn.k_proj.weight has shape (64, 32), but config.json gives (64, 64)",
        ),
        ("model.norm.weight", np.zeros(64, np.int8), "model.norm.weight has type I8; supported are F32, F16"),
    ],
)
def test_tensors_that_are_refused(broken, name, value, complaint):
    def change(tensors):
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value if isinstance(value, np.ndarray) else np.zeros(value, np.float32)

    rewrite(broken, change)
    assert complaint in refusal(hf.load, broken, SPEC)


def test_a_stored_tied_head_must_be_the_embedding(broken):
    set_fields(broken, tie_word_embeddings=True)
    spec = read(broken)
    assert spec.tie_embeddings
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(hf.load, broken, spec)
    rewrite(broken, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert "head" not in hf.load(broken, spec)


def test_save_replaces_nothing_and_leaves_nothing_half_written(saved, tokenizer, tmp_path):
    params, folder = saved
    before = sorted(p.name for p in folder.iterdir())
    assert "exists and is not empty" in refusal(hf.save, folder, SPEC, params, None, tokenizer)
    assert sorted(p.name for p in folder.iterdir()) == before
    incomplete = {**params, "final_norm": None}
    with pytest.raises(ValueError):
        hf.save(tmp_path / "new", SPEC, incomplete, None, tokenizer)
    assert list(tmp_path.iterdir()) == []
