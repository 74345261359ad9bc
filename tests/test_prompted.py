"""Zero-shot prompting: reading answers, asking twice, and a run with rows of it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from bpe import train_bpe
from helpers import quick_jit, quick_runs
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import changed, run_training, tiny_config, write_world

import eval as evaluation
from fgrpo_jax.config import Config, TranscriptConfig
from fgrpo_jax.models import decoder, head, hf
from fgrpo_jax.policies.llm import prompted
from fgrpo_jax.policies.llm.prompted import NO_RANKING, NO_SLATE, Asking, named
from fgrpo_jax.types import OK, RankingExample

NUMBERS = [f"[{n}]" for n in range(1, 13)]
LETTERS = [*"ABCDEF"]


@pytest.mark.parametrize(
    "answer, wanted",
    [
        ("[3] > [1] > [12]", [2, 0, 11]),
        ("3, 1 and 12.", [2, 0, 11]),
        ("The 2 best of 12: [7], [7], [2]", [6, 1]),  # where there are brackets, other numbers say something else
        ("[13] [0] [ 4 ]", [3]),
        ("1. 7\n2. 3\n", [6, 2]),  # of a numbered list the labels
        ("1. [7]\n 2) [3]", [6, 2]),
        ("1. \n2", [0, 1]),
        ("99999999999999999999", []),
        ("None of these.", []),
        ("", []),
    ],
)
def test_numbers_are_read_in_the_order_of_their_first_mention(answer, wanted):
    assert named(answer, NUMBERS, "index") == wanted


@pytest.mark.parametrize(
    "answer, wanted",
    [
        ("B, A, F", [1, 0, 5]),
        ("The best are D and (C).", [3, 2]),
        ("BAD CAFE", []),  # letters of words
        ("I'd say: B.", [1]),
        ("A good choice is C, and A", [2, 0]),
        ("b", []),  # a candidate of its own in larger pools
        ("Z, E, E", [4]),
    ],
)
def test_letters_count_where_they_stand_alone(answer, wanted):
    assert named(answer, LETTERS, "letter") == wanted


def test_letters_that_are_words_are_none():
    letters = [*"ABCDEFGHI"]
    assert named("I think the order is C, I, A", letters, "letter") == [2, 8, 0]
    assert named("A and I, then B", letters, "letter") == [8, 1]  # "A and" reads as an article


def test_names_are_whole_words_in_either_case():
    assert named("Apple, PEAR, hammer", ["apple", "pear", "hammer"], "text") == [0, 1, 2]
    assert named("These are then ranked: pear", ["ear", "hen", "tea", "pear", "red"], "text") == [3]
    assert named("us, US", ["US", "us"], "text") == [1, 0]  # two names that differ in case alone


def test_of_names_within_names_the_longer_one_is_meant():
    names = ["Alien", "Aliens", "Alien (1979)", "Toy  Story"]
    assert named("1. Aliens\n2. Toy\nStory 3. Alien (1979) 4. Alien", names, "text") == [1, 2, 0]  # as names are cut
    assert named("Toy Story", ["Toy Story"], "text") == [0]


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(12)), st.integers(0, 12))
def test_what_is_written_is_read(order, count):
    items = order[:count]
    assert named(" > ".join(NUMBERS[i] for i in items), NUMBERS, "index") == items
    letters = prompted.serving.LETTERS
    assert named(", ".join(letters[i] for i in items), [*letters[:12]], "letter") == items


class Words:
    """A tokenizer whose tokens are characters, which keeps what it is asked."""

    chat_template, unk_token_id, eos_token_id = "", None, 0

    def __init__(self):
        self.asked = []

    def __call__(self, texts, add_special_tokens, return_offsets_mapping=False):
        spans = [[(n, n + 1) for n in range(len(text))] for text in texts]
        return {"input_ids": [[*map(ord, text)] for text in texts], "offset_mapping": spans}

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, filter(None, ids)))


def ask(method, answers, slate_max=3, rank_max=2, text_tokens=0):
    """(what the method makes of two queries, the prompts), where the model gives these answers in turn."""
    config = Config(transcript=TranscriptConfig(identifier="index", slate_max=slate_max, rank_max=rank_max))
    config = changed(config, {"prompt.text_tokens": text_tokens})
    pool = tuple((str(i), f"text {i}") for i in range(5))
    examples = [RankingExample(str(q), f"question {q}", pool, (0.0,) * 5) for q in range(2)]
    left, asked = list(answers), []

    def write(prompts, most):
        asked.extend("".join(map(chr, ids)) for ids in prompts)
        assert most % 16 == 0 and most >= 5 * 3
        return [[*map(ord, left.pop(0)), 0, 0] for _ in prompts]

    found = prompted.METHODS[method](Asking(config, Words(), "qa", "Do it.", 1000), examples, write)
    assert not left
    return found, asked


def ask_of(tokenizer, examples):
    """Token ids of the prompts by which a model with this tokenizer is asked of the examples."""
    asked = []

    def write(prompts, most):
        asked.extend(prompts)
        return [[] for _ in prompts]

    config = Config(transcript=TranscriptConfig(identifier="index", slate_max=3, rank_max=2))
    prompted.one_step(Asking(config, tokenizer, "qa", "Do it.", len(tokenizer)), examples, write)
    return asked


def test_in_one_step_the_first_labels_are_slate_and_ranking():
    found, asked = ask("zero_shot", ["[5] [1] [2] [3]", "I do not know"])
    assert found == [((4, 0, 1), (4, 0), OK), ((), (), NO_SLATE)]
    assert asked[0] == (
        "Do it.\nCandidates:\n[1] text 0\n[2] text 1\n[3] text 2\n[4] text 3\n[5] text 4\nQuestion: question 0\n"
        "Rank the 3 candidates that fit best, the best one first. Answer with their numbers alone: as in [1], [2]\n"
        "Answer:"
    )


def test_long_texts_are_asked_about_by_their_beginnings():
    _, asked = ask("zero_shot", ["[1]", "[1]"], text_tokens=3)
    assert "Candidates:\n[1] tex\n[2] tex\n[3] tex\n[4] tex\n[5] tex\nQuestion: question 1\n" in asked[1]


def test_in_two_steps_the_second_is_asked_of_the_slate_alone():
    found, asked = ask("zero_shot_2", ["[5], [2]", "[4]", "[2] > [1]", "no"])
    assert found == [((4, 1), (1, 4), OK), ((3,), (), NO_RANKING)]
    assert "[1] text 4\n[2] text 1\nQuestion: question 0\n" in asked[2] and "text 0" not in asked[2]
    found, asked = ask("zero_shot_2", ["no", "none"])
    assert found == [((), (), NO_SLATE)] * 2 and len(asked) == 2  # nothing is left to ask


def test_writing_is_the_argmax_of_the_whole_forward(spec, params):
    """Of prompts of several lengths, and nothing after eos."""
    rng = np.random.default_rng(3)
    prompt, length = rng.integers(2, spec.vocab_size, (3, 8)).astype(np.int32), np.array([8, 3, 5], np.int32)
    params = {**params, "head": params["embed"] + 0.5 * rng.normal(size=params["embed"].shape).astype(np.float32)}
    spec = spec._replace(tie_embeddings=False)
    write = quick_jit(prompted.write, static_argnums=(0, 1, 5))
    free = np.asarray(write(spec, (1,), params, prompt, length, 6))
    row, t = next((r, t) for r in range(3) for t in range(5) if free[r, t + 1] not in {1, *free[r, : t + 1]})
    end = int(free[row, t])  # so that this answer is over where another token would follow
    written = write(spec, (end,), params, prompt, length, 6)
    both = np.asarray(
        write(spec, (1, end), params, prompt, length, 6)
    )  # the same answers, that an end of turn ends too
    np.testing.assert_array_equal(both, np.where(np.asarray(written) == end, 1, written))
    whole = decoder.whole_ends(spec, params)
    hidden = quick_jit(decoder.completions, static_argnums=0)(spec, whole, prompt, length, written[:, None])
    best = np.asarray(head.logits(whole, hidden).argmax(-1))[:, 0]
    for found, wanted in zip(np.asarray(written), best, strict=True):
        ends = [*found, end].index(end) + 1
        assert [*found[:ends]] == [*wanted[:ends]] and set(found[ends:]) <= {end}
    assert int(written[row, t + 1]) == end and len({tuple(row) for row in np.asarray(written)}) == 3


SPEC = decoder.DecoderSpec(
    vocab_size=262, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_size=8, init_std=0.3
)


def test_a_template_that_thinks_in_any_case_is_refused_at_the_start(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    write_world(tmp_path / "data", train=8, validation=4, test=1)
    source, tokenizer = tmp_path / "model", train_bpe(["bytes alone"], SPEC.vocab_size)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
    hf.save(source, SPEC, decoder.init(SPEC, jax.random.key(0)), {"model_type": "qwen3"}, tokenizer)
    config = changed(
        tiny_config(tmp_path / "data", tmp_path / "prepared", tmp_path / "run", sft_steps=1),
        {
            "model.checkpoint": str(source), "tokenizer": str(source), "transcript.identifier": "index",
            "transcript.separator": " > ", "data.prompt_buckets": (256,), "eval.prompted": ("zero_shot",),
        },
    )  # fmt: skip
    assert run_training(config) == 2
    assert "eval.prompted: this chat template begins every answer with <think>" in capsys.readouterr().err


def test_a_run_has_rows_of_it(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    write_world(tmp_path / "data", train=8, validation=4, test=1)
    source, tokenizer = tmp_path / "model", train_bpe(["bytes alone"], SPEC.vocab_size)
    hf.save(source, SPEC, decoder.init(SPEC, jax.random.key(0)), {"model_type": "qwen3"}, tokenizer)
    config = changed(
        tiny_config(tmp_path / "data", tmp_path / "prepared", tmp_path / "run", sft_steps=1),
        {
            "model.checkpoint": str(source), "tokenizer": str(source),
            "transcript.identifier": "index", "transcript.separator": " > ", "data.prompt_buckets": (256,),
            "eval.baselines": ("random",), "eval.prompted": ("zero_shot", "zero_shot_2"), "eval.versus": "zero_shot",
        },
    )  # fmt: skip
    with quick_runs():
        assert run_training(config) == 0
    found = json.loads((tmp_path / "run" / "eval" / "validation" / "metrics.json").read_text())
    assert set(found["methods"]) == {"random", "zero_shot", "zero_shot_2", "sft"}
    for name in ("zero_shot", "zero_shot_2"):
        assert sum(found["outcomes"][name].values()) == 4
        assert set(found["outcomes"][name]) <= {"ok", NO_SLATE.name, NO_RANKING.name}
    capsys.readouterr()
    source.rename(tmp_path / "elsewhere")
    with quick_runs():
        assert evaluation.main([str(tmp_path / "run"), "--eval.versus", "sft"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"note: no row zero_shot and zero_shot_2: model.checkpoint: {source} is not there")
    assert run_training(dataclasses.replace(config, tokenizer="catalogue", model=Config().model)) == 2
    assert "a model from random weights answers nothing" in capsys.readouterr().err
