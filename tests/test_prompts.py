"""Prompt templates, and the tokenizers they are encoded with."""

import dataclasses

import pytest
from bpe import marked_bpe, train_bpe
from hypothesis import given, settings
from hypothesis import strategies as st

from fgrpo_jax.config import Config, ConfigError, PromptConfig, TranscriptConfig
from fgrpo_jax.data.datasets import DataError, Dataset, in_memory, one_line
from fgrpo_jax.policies.llm import prompts, serving, tokenizers
from fgrpo_jax.policies.llm.checks import check_training
from fgrpo_jax.types import RankingExample

PIECES = train_bpe(["ab ab", "aab b"] * 9, 266)  # letters outside of ASCII are two to four tokens
MARKED = marked_bpe(["ab ab", "aab b"] * 9, 300)
ITEMS = tuple((str(i), f"artist {i} & co") for i in range(30))
EXAMPLE = RankingExample("q1", "", ITEMS[:2], (0.0, 1.0), ITEMS[2:4])
QUESTION = RankingExample("q2", "who\n was it?", (("a", "A:  some\ttext"), ("b", "B: more")), (1.0, 0.0))


def encode(tokenizer, text, chat, query_id="q"):
    return prompts.encode_prompts(tokenizer, [text], chat, [query_id])[0]


def dataset(catalogue=ITEMS, rows=()):
    return Dataset("tiny", "recommendation", "Rank these.", catalogue, {"train": in_memory(rows)}, True, {})


def catalogue(made=None, transcript=TranscriptConfig(), prompt=PromptConfig()):
    return tokenizers.load("catalogue", made or dataset(), transcript, prompt)


def render(example, kind="recommendation", instruction="Rank these.", identifier="text"):
    return prompts.render(example, kind, instruction, identifier, "<SLATE>")


def test_recommendation_prompt():
    assert render(EXAMPLE) == (
        "Rank these.\nHistory:\nartist 2 & co\nartist 3 & co\nCandidates:\nartist 0 & co\nartist 1 & co\n<SLATE>"
    )


def test_question_prompt_with_numbers():
    assert render(QUESTION, "qa", identifier="index") == (
        "Rank these.\nCandidates:\n[1] A: some text\n[2] B: more\nQuestion: who was it?\n<SLATE>"
    )
    assert prompts.identifier_texts(QUESTION, "index") == ["[1]", "[2]"]
    assert prompts.identifier_texts(QUESTION, "text") == ["A: some text", "B: more"]


def test_empty_parts_are_left_out_with_their_heading():
    bare = RankingExample("q", "", ITEMS[:1], (1.0,))
    assert render(bare, instruction="") == "Candidates:\nartist 0 & co\n<SLATE>"
    with pytest.raises(ConfigError, match="not recommendation or qa"):
        render(bare, kind="other")


def test_catalogue_gives_every_line_a_token_of_its_own():
    tokenizer = catalogue()
    ids = encode(tokenizer, render(EXAMPLE), False)
    assert len(ids) == len(set(ids)) == 8
    assert tokenizer.convert_ids_to_tokens(ids) == render(EXAMPLE).split("\n")
    pieces = ("<SLATE>", "</SLATE><RANK>", "</RANK>", *(text for _, text in ITEMS))
    encoded = [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
    assert all(len(piece) == 1 for piece in encoded)
    tokens = {*sum(encoded, []), tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(tokens) == len(pieces) + 2
    assert tokenizer.unk_token_id not in sum(encoded, [])
    assert len(tokenizer) == len(ITEMS) + 3 + 3 + 3  # specials, literals, instruction and headings


def test_separators_and_instructions_of_the_config_are_known():
    transcript, prompt = TranscriptConfig(separator=" > "), PromptConfig(instruction="Two\nlines")
    tokenizer = catalogue(transcript=transcript, prompt=prompt)
    assert len(tokenizer.encode(" > ", add_special_tokens=False)) == 1
    ids = encode(tokenizer, render(EXAMPLE, instruction="Two\nlines"), False)
    assert tokenizer.convert_ids_to_tokens(ids)[:2] == ["Two", "lines"]


@settings(deadline=None, max_examples=200)
@given(
    tokenizer=st.sampled_from([PIECES, MARKED]),
    texts=st.lists(st.text("ab é\u4e2d\U0001f600\u00bd.", max_size=12).map(one_line), max_size=4),
    most=st.integers(1, 8),
)
def test_beginnings_have_at_most_so_many_tokens(tokenizer, texts, most):
    """A letter can be several tokens, a word other ones than its beginning, and one token stand before all."""

    def count(text):
        return len(tokenizer.encode(text, add_special_tokens=False))

    found = serving.beginnings(texts, most, tokenizer)
    for text, begin in zip(texts, found, strict=True):
        assert text.startswith(begin) and begin == one_line(begin) and bool(begin) == bool(text)
        assert count(begin) <= most or len(begin) == 1
        assert (begin == text) == (count(text) <= most or len(text) <= 1)
    assert serving.beginnings(found, most, tokenizer) == found


@given(st.text(" \t\n\u00a0\u2028ab\x00\U0001f600"))
def test_one_line_is_what_white_space_parts(text):
    assert one_line(text) == " ".join(text.split())


def test_beginnings_lose_no_more_than_they_must():
    ids = PIECES.encode("ab ab ab ab", add_special_tokens=False)
    assert [PIECES.decode(ids[:n]) for n in (1, 2)] == ["ab", "ab ab"]
    assert serving.beginnings(["ab ab ab ab", "ab"], 2, PIECES) == ["ab ab", "ab"]
    assert serving.beginnings(["\U0001f600 ab"], 2, PIECES) == ["\U0001f600"]  # four tokens, but something is shown
    assert serving.beginnings([], 2, PIECES) == []


def test_texts_of_candidates_and_history_are_shortened_and_the_question_is_not():
    example = RankingExample("q", "ab ab ab", (("1", "ab  ab\nab"), ("2", "a")), (1.0, 0.0), (("3", "ab ab ab"),))
    assert prompts.shortened([example], 0, None) == [example]
    (short,) = prompts.shortened([example], 2, PIECES)
    assert short.query == "ab ab ab" and short.candidates == (("1", "ab ab"), ("2", "a"))
    assert short.history == (("3", "ab ab"),) and short.relevance == example.relevance


def test_a_full_prompt_has_34_tokens():
    full = RankingExample("q", "", ITEMS[:20], (1.0,) + (0.0,) * 19, ITEMS[20:30])
    assert len(encode(catalogue(), render(full), False)) == 20 + 10 + 4


def test_without_a_catalogue_the_items_of_the_splits_are_taken():
    tokenizer = catalogue(dataset((), [EXAMPLE]))
    assert len(encode(tokenizer, render(EXAMPLE), False)) == 8


def test_unknown_text_names_the_query():
    stranger = RankingExample("q9", "", (("x", "nobody"),), (1.0,))
    with pytest.raises(DataError, match="query 'q9': the tokenizer has no token for 'nobody'"):
        encode(catalogue(), render(stranger), False, "q9")


def test_items_that_look_like_the_template_are_refused():
    for text in ("History:", "<eos>", "<SLATE>", "Rank  these."):
        with pytest.raises(DataError, match="rename it"):
            catalogue(dataset((("0", text), ("1", "fine"))))


def test_words_are_shared_by_items(tmp_path):
    """Two items of the same words have the same tokens, also an item that was never listed."""
    made = dataset((("0", "red lamp"), ("1", "blue  chair")))
    tokenizer = tokenizers.load("words", made, TranscriptConfig(separator=" > "), PromptConfig())
    pool = (("0", "red lamp"), ("x", "blue lamp"))
    ids = encode(tokenizer, render(RankingExample("q", "", pool, (1.0, 0.0), (("1", "blue  chair"),))), False)
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "Rank", "these.", "History:", "blue", "chair", "Candidates:", "red", "lamp", "blue", "lamp", "<SLATE>"
    ]  # fmt: skip
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(" > ", add_special_tokens=False)) == [">"]
    tokenizer.save_pretrained(tmp_path)
    assert tokenizers.load(str(tmp_path), None, TranscriptConfig(), PromptConfig()).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(DataError, match="query 'q9': the tokenizer has no token for 'green'"):
        encode(tokenizer, render(RankingExample("q9", "", (("x", "green lamp"),), (1.0,))), False, "q9")
    with pytest.raises(DataError, match="the word '</RANK>' of an item is also a special token or a literal"):
        tokenizers.load("words", dataset((("0", "a </RANK> b"),)), TranscriptConfig(), PromptConfig())


def test_the_catalogue_survives_saving(tmp_path):
    tokenizer = catalogue()
    tokenizer.save_pretrained(tmp_path)
    loaded = tokenizers.load(str(tmp_path), None, TranscriptConfig(), PromptConfig())
    assert loaded.get_vocab() == tokenizer.get_vocab() == catalogue().get_vocab()
    assert (loaded.eos_token, loaded.pad_token) == ("<eos>", "<pad>")
    text = render(EXAMPLE)
    assert encode(loaded, text, False) == encode(tokenizer, text, False)


def test_unknown_tokenizers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a directory; tokenizer must be 'catalogue', 'words', a GGUF file or"):
        tokenizers.load("Qwen/Nothing", None, TranscriptConfig(), PromptConfig())
    with pytest.raises(ConfigError, match="could not be loaded"):
        tokenizers.load(str(tmp_path), None, TranscriptConfig(), PromptConfig())
    with pytest.raises(ConfigError, match="made from a data set"):
        tokenizers.load("catalogue", None, TranscriptConfig(), PromptConfig())


def byte_pair():
    """A tiny byte-level BPE with ChatML turns, as Qwen's."""
    import tokenizers as backend
    import transformers

    model = backend.Tokenizer(backend.models.BPE())
    model.pre_tokenizer = backend.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = backend.decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = backend.pre_tokenizers.ByteLevel.alphabet()
    trainer = backend.trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    model.train_from_iterator([render(QUESTION, "qa")] * 3, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def test_other_tokenizers_and_chat(tmp_path):
    byte_pair().save_pretrained(tmp_path)
    tokenizer = tokenizers.load(str(tmp_path), None, TranscriptConfig(), PromptConfig())
    text = render(QUESTION, "qa")
    assert tokenizer.decode(encode(tokenizer, text, False)) == text
    body = text.removesuffix("\n<SLATE>")
    assert tokenizer.decode(encode(tokenizer, text, True)) == (
        f"<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n<SLATE>"
    )
    with pytest.raises(ConfigError, match="has no chat template"):
        encode(catalogue(), text, True)


def test_a_chat_neither_thinks_first_nor_tells_today():
    """Of templates that ask for it as Qwen3's and Llama 3's do; one that thinks in any case is refused."""
    tokenizer, text = byte_pair(), render(QUESTION, "qa")
    tokenizer.chat_template = (
        "{% if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y') }}\n{% endif %}" + tokenizer.chat_template
    )
    thought = "<think>\n\n</think>\n\n"
    before = tokenizer.chat_template
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}" + thought + "{% endif %}"
    said = tokenizer.decode(encode(tokenizer, text, True))
    assert said.startswith("Today: 26 Jul 2024\n") and said.endswith(f"assistant\n{thought}<SLATE>")
    tokenizer.chat_template = before + "<think>\n"
    with pytest.raises(ConfigError, match="prompt.chat=True: this chat template begins every answer with <think>"):
        encode(tokenizer, text, True)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = byte_pair()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no eos token"):
        tokenizers.load(str(tmp_path), None, TranscriptConfig(), PromptConfig())


def test_the_longest_prompts_are_looked_for_among_texts_as_they_are_shown():
    """Many short texts make a longer prompt than two that are cut."""
    two = [RankingExample(f"two{n}", "?", (("1", "ab " * 400), ("2", "ab " * 400)), (1.0, 0.0)) for n in range(16)]
    many = RankingExample("many", "?", tuple((str(n), "ab ab") for n in range(100)), (1.0,) + (0.0,) * 99)
    config = Config(tokenizer="a directory", prompt=PromptConfig(text_tokens=8))
    config = dataclasses.replace(config, transcript=TranscriptConfig(identifier="index", separator=">"))
    seen, rows = [], Dataset("tiny", "qa", "", (), {"test": in_memory([*two, many])}, False, {})
    check_training(config, PIECES, seen.extend, None, rows, "test")
    assert "many" in [example.query_id for example in seen]
