"""The text models of checkpoints of images and text."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from bpe import train_bpe
from helpers import random_params
from test_families import CASES, NUMERICS, SIZES, saved, tokens, torch_logits, with_gradient

from fgrpo_jax.config import Config, ConfigError, LoraConfig, ModelConfig
from fgrpo_jax.models import decoder, hf
from fgrpo_jax.policies.llm import files


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["one text"], SIZES["vocab_size"])


def test_the_text_model_of_one_of_images_and_text(tokenizer, tmp_path):
    """Its names have a prefix, its sizes are nested, and others lie beside it."""
    spec = files.make_spec(ModelConfig(family="qwen3_5_text", num_layers=4), SIZES["vocab_size"], tmp_path)
    params = random_params(spec)
    tensors = saved(tmp_path / "text", spec, params, None, tokenizer)
    whole = tmp_path / "whole"
    whole.mkdir()
    text = hf.read_config(tmp_path / "text")
    config = {"model_type": "qwen3_5", "tie_word_embeddings": text.pop("tie_word_embeddings"), "text_config": text}
    (whole / "config.json").write_text(json.dumps(config | {"vision_config": {"depth": 1}}))
    renamed = {name.replace("model.", "model.language_model.", 1): x for name, x in tensors.items()}
    beside = {"model.visual.norm.weight": np.ones(3, np.float32), "mtp.norm.weight": np.ones(3, np.float32)}
    safetensors.numpy.save_file(renamed | beside, whole / hf.SINGLE)
    numerics = NUMERICS | {"logit_chunk": 4096, "rows_first": True}
    assert hf.read_spec(whole, **numerics) == hf.read_spec(tmp_path / "text", **numerics)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), hf.load(whole, spec), params))
    (whole / "config.json").write_text(json.dumps(config | {"text_config": None}))
    with pytest.raises(hf.ModelFilesError, match="text_config=None must be an object"):
        hf.read_spec(whole, **numerics)
    safetensors.numpy.save_file(renamed | {"model.other": np.ones(3, np.float32)}, whole / hf.SINGLE)
    with pytest.raises(hf.ModelFilesError, match="no place: model.other"):
        hf.load(whole, spec)


@pytest.fixture(scope="module")
def gemma_with_images(torch, tmp_path_factory):
    """(model, its directory): Gemma 3 as transformers makes it for images, asked about text alone."""
    import transformers

    _, fields, _ = CASES["gemma 3"]
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.Gemma3Config(
        text_config=SIZES | fields, vision_config=vision | {"image_size": 8, "patch_size": 4}, mm_tokens_per_image=4,
        image_token_index=SIZES["vocab_size"],
    )  # fmt: skip
    torch.manual_seed(0)
    model, folder = transformers.Gemma3ForConditionalGeneration(config).eval(), tmp_path_factory.mktemp("gemma")
    model.save_pretrained(folder)
    return model, folder


def test_gemma_with_images_is_read_by_its_text(torch, gemma_with_images, tokenizer, tmp_path):
    """Under the names in which it is published, and in which transformers 5 holds it."""
    import transformers

    model, folder = gemma_with_images
    stored = safetensors.numpy.load_file(folder / hf.SINGLE)
    assert "language_model.model.norm.weight" in stored and any(name.startswith("vision_tower.") for name in stored)
    spec = hf.read_spec(folder, **NUMERICS)
    params, (prompt, actions, weight) = hf.load(folder, spec), tokens()
    _, logits = with_gradient(spec, params, prompt, actions, weight)
    with torch.no_grad():
        theirs = torch_logits(torch, model, prompt, actions).numpy()
    np.testing.assert_allclose(logits, theirs, atol=1e-4, rtol=0)
    hf.save(tmp_path / "out", spec, params, hf.read_config(folder), tokenizer)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(back).__name__ == "Gemma3ForCausalLM"
    with torch.no_grad():
        np.testing.assert_allclose(torch_logits(torch, back, prompt, actions).numpy(), theirs, atol=1e-5, rtol=0)

    other = tmp_path / "held"
    other.mkdir()
    (other / "config.json").write_text((folder / "config.json").read_text())
    held = {name: x.contiguous().numpy() for name, x in model.state_dict().items() if name != "lm_head.weight"}
    assert "model.language_model.norm.weight" in held
    safetensors.numpy.save_file(held, other / hf.SINGLE)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), hf.load(other, spec), params))


def test_what_published_gemma_leaves_out_is_what_transformers_takes_it_to_be(tmp_path):
    """The 4B model's text_config names no more."""
    import transformers

    said = {"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34, "sliding_window": 1024}
    text = said | {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    spec, theirs = hf.read_spec(tmp_path, **NUMERICS), transformers.Gemma3TextConfig(**text)
    assert (spec.vocab_size, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.norm_eps, spec.tie_embeddings) == (
        theirs.vocab_size, theirs.num_attention_heads, theirs.num_key_value_heads, theirs.head_dim,
        theirs.rms_norm_eps, theirs.tie_word_embeddings,
    )  # fmt: skip
    assert (spec.query_scalar or spec.head_dim) == theirs.query_pre_attn_scalar and spec.rope_scaling == (8.0,)
    assert decoder.layer_kinds(spec) == tuple(theirs.layer_types)
    assert (spec.rope_theta, spec.local_rope_theta) == (1e6, 1e4) and spec.window == theirs.sliding_window


def test_adapters_of_gemma_with_images_are_exported_merged_alone(gemma_with_images, tokenizer, tmp_path):
    """peft would put them into the whole, whose names are others, and find none of theirs."""
    _, folder = gemma_with_images
    config = Config(tokenizer=str(folder), model=ModelConfig(checkpoint=str(folder), lora=LoraConfig(rank=2)))
    spec = files.make_spec(config.model, len(tokenizer), tmp_path / "run")
    made = files.policy_files(config, spec, tokenizer, tmp_path / "run", lambda: {})
    with pytest.raises(ConfigError, match="a model of images and text, onto which peft loads none: export with --form"):
        made.exports["adapter"](tmp_path / "out", {}, {})
