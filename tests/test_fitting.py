"""Tokenizers and checkpoints that belong together, and those that do not."""

import dataclasses

import numpy as np
import pytest
from bpe import train_bpe
from helpers import random_params

from fgrpo_jax.config import MADE_OF_DATA, Config, ConfigError, DataConfig, ModelConfig, TranscriptConfig
from fgrpo_jax.data.datasets import DataError, Dataset, in_memory
from fgrpo_jax.models import decoder, hf
from fgrpo_jax.policies.llm import fitting, system
from fgrpo_jax.policies.llm.validation import problems
from fgrpo_jax.types import RankingExample

SPEC = decoder.DecoderSpec(
    vocab_size=280, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_size=8
)
TRANSCRIPT = TranscriptConfig("index", slate_min=1, slate_max=2, rank_min=1, rank_max=2, separator=" > ")


def bpe(*special, size=280):
    """A tokenizer of `size` tokens, and special ones that are added behind."""
    tokenizer = train_bpe([f"item {letter}" for letter in "abcdefghijklmnopqrstuvwxyz"] * 9, size)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)}, replace_extra_special_tokens=False)
    return tokenizer


def policy(folder, own=None, other=None, size=280, **model):
    """Of a checkpoint with a tokenizer of its own, or with another one."""
    hf.save(folder / "model", SPEC._replace(vocab_size=size), random_params(SPEC._replace(vocab_size=size)), None, own)
    if other:
        other.save_pretrained(folder / "other")
    example = RankingExample("q", "", (("1", "item a"), ("2", "item b")), (0.0, 1.0))
    dataset = Dataset("tiny", "qa", "Choose.", (), {"test": in_memory([example])}, False, {})
    config = Config(
        tokenizer=str(folder / ("other" if other else "model")),
        transcript=TRANSCRIPT,
        data=DataConfig(prompt_buckets=(256,)),
        model=ModelConfig(checkpoint=str(folder / "model"), **model),
    )
    (made,) = system.policies(config, dataset, folder / "run").values()
    return made


def query(text, query_id="q7"):
    return RankingExample(query_id, "", (("1", text), ("2", "item b")), (0.0, 1.0))


def test_a_surplus_special_token_is_let_be_until_a_text_has_it(tmp_path):
    """As Gemma 3 1B's: its tokenizer has a token for images, one more than the model."""
    tokenizer = bpe("<image_soft_token>")
    assert len(tokenizer) == 281
    made = policy(tmp_path, tokenizer)
    assert np.max(made.encode([query("item a")]).prompt) < 280
    with pytest.raises(DataError, match="query 'q7': the model's vocabulary of 280 has no token '<image_soft_token>'"):
        made.encode([query("item b", "q6"), query("item <image_soft_token>"), query("item <image_soft_token>", "q8")])
    dataset = Dataset("tiny", "qa", "Choose.", (), {"test": in_memory([query("item <image_soft_token>")])}, False, {})
    with pytest.raises(DataError, match="query 'q7': the model's vocabulary of 280 has no token"):
        made.check(None, dataset, "test")  # before anything is trained
    tokens = [[1, 2], [3, 280], [280]]
    with pytest.raises(DataError, match="query 'b': .* no token '<image_soft_token>'"):
        fitting.check_ids(tokenizer, 280, tokens, ["a", "b", "c"])


def test_a_literal_of_the_transcript_beyond_the_vocabulary_is_refused(tmp_path):
    """As one that was added to the tokenizer as a special token: the model could not write it."""
    literal = TRANSCRIPT.slate_close.strip()
    with pytest.raises(ConfigError, match=f"only 280, and none for '{literal}'"):
        policy(tmp_path, bpe(literal))


def test_other_tokens_beyond_the_vocabulary_are_refused(tmp_path):
    tokenizer = bpe()
    tokenizer.add_tokens(["surplus"])
    with pytest.raises(ConfigError, match="has 281 tokens, model.checkpoint .* only 280, and none for 'surplus'"):
        policy(tmp_path, tokenizer)


def test_an_eos_token_beyond_the_vocabulary_is_refused(tmp_path):
    tokenizer = bpe("<end>")
    tokenizer.eos_token = "<end>"
    with pytest.raises(ConfigError, match="only 280, and none for '<end>'"):
        policy(tmp_path, tokenizer)


# --------------------------------------------------------------------- the tokenizer of the checkpoint


@pytest.mark.parametrize("name", MADE_OF_DATA)
def test_a_tokenizer_made_of_data_is_none_of_a_checkpoint(name):
    config = Config(tokenizer=name, model=ModelConfig(checkpoint="smollm2"))
    (found,) = problems(config)
    assert f"tokenizer='{name}' is made of the data, and its ids mean nothing to model.checkpoint='smollm2'" in found
    assert problems(dataclasses.replace(config, model=ModelConfig())) == []


def test_another_tokenizer_than_the_checkpoints_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="other' is another one than that of model.checkpoint=.*: token 2"):
        policy(tmp_path, bpe(), train_bpe(["other words"] * 9, 270))


def test_tokens_that_are_added_or_called_otherwise_make_it_no_other(tmp_path):
    """A copy with tags in place of reserved special tokens, and one more behind."""
    policy(tmp_path, bpe("<reserved>"), bpe("<tag>", "<more>"), size=282)


def test_a_checkpoint_without_a_tokenizer_of_its_own_takes_any(tmp_path):
    hf.save(tmp_path / "saved", SPEC, random_params(SPEC), None, bpe())
    (tmp_path / "saved" / "tokenizer.json").unlink()
    fitting.check_own(Config(model=ModelConfig(checkpoint=str(tmp_path / "saved"))), bpe())


def test_a_gguf_file_and_the_directory_it_was_made_of_fit(tmp_path):
    pytest.importorskip("gguf", reason="the gguf extra is not installed")
    from write_gguf import write_gguf

    spec = SPEC._replace(hidden_size=32, head_dim=32, mlp_size=32)
    hf.save(tmp_path / "model", spec, random_params(spec), {"model_type": "qwen3"}, bpe())
    file = write_gguf(tmp_path / "model.gguf", tmp_path / "model", "qwen3")
    config = Config(tokenizer=str(tmp_path / "model"), model=ModelConfig(checkpoint=str(file)))
    fitting.check_own(config, bpe())
    with pytest.raises(ConfigError, match="is another one than that of model.checkpoint"):
        fitting.check_own(config, train_bpe(["other words"] * 9, 270))
