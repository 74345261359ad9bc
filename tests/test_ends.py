"""Tokens that end a text, a turn or a transcript, as checkpoints, runs and exports know them."""

import json

import pytest
from bpe import train_bpe
from helpers import random_params
from write_gguf import write_gguf

from fgrpo_jax.config import Config, ModelConfig
from fgrpo_jax.errors import ModelFilesError
from fgrpo_jax.models import decoder, hf
from fgrpo_jax.policies.llm.files import ends_of_answers

SPEC = decoder.DecoderSpec(
    vocab_size=300, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_size=8, qk_norm=True
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["one text"], SPEC.vocab_size)


@pytest.fixture
def folder(tmp_path, tokenizer):
    """As Gemma 3's and Qwen3.5's: config.json says what ends a text, generation_config.json a chat's turn too."""
    hf.save(tmp_path / "model", SPEC, random_params(SPEC), {"model_type": "qwen3", "eos_token_id": 7}, tokenizer)
    said = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(said | {"eos_token_id": 7}))
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "top_k": 20}))
    return tmp_path / "model"


def test_what_a_checkpoint_says_in_two_places_is_read_together(folder, tokenizer, tmp_path):
    assert hf.read_config(folder)["eos_token_id"] == [7, 9]
    config = Config(model=ModelConfig(checkpoint=str(folder)))
    assert ends_of_answers(config, tokenizer, tmp_path) == (tokenizer.eos_token_id, 7, 9)
    assert ends_of_answers(Config(), tokenizer, tmp_path) == (tokenizer.eos_token_id,)
    (folder / "generation_config.json").unlink()
    assert hf.read_config(folder)["eos_token_id"] == 7


def test_an_export_ends_at_what_transcripts_end_with_too(folder, tokenizer, tmp_path):
    import transformers

    hf.save(tmp_path / "out", SPEC, random_params(SPEC), hf.read_config(folder), tokenizer)
    assert tokenizer.eos_token_id not in (7, 9)
    expected = [7, 9, tokenizer.eos_token_id]
    assert hf.read_config(tmp_path / "out")["eos_token_id"] == expected
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == expected
    hf.save(tmp_path / "new", SPEC, random_params(SPEC), None, tokenizer)
    assert hf.read_config(tmp_path / "new")["eos_token_id"] == tokenizer.eos_token_id


def test_a_file_says_its_end_of_turn(folder, tmp_path):
    pytest.importorskip("gguf", reason="the gguf extra is not installed")
    path = write_gguf(tmp_path / "model.gguf", folder, "qwen3", more=[("tokenizer.ggml.eot_token_id", 9)])
    eos, turn_end = hf.read_config(path)["eos_token_id"]
    assert turn_end == 9 != eos


@pytest.mark.parametrize("value", ["1", [1, "2"], -1, True, [None]])
def test_ends_that_are_no_tokens_are_refused(folder, value):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ModelFilesError, match=r"generation_config.json: eos_token_id=.* must be a token's number"):
        hf.read_config(folder)
