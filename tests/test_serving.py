"""What an export says to other engines: its prompts and its grammars make the lists that are made here."""

import importlib.util
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from bpe import train_bpe
from helpers import quick_runs, random_params
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rank import queries, stream
from tiny import changed, run_training, tiny_config, write_world

from fgrpo_jax.config import ConfigError, TranscriptConfig
from fgrpo_jax.data.batches import shown
from fgrpo_jax.data.jsonl import example_of
from fgrpo_jax.export import export
from fgrpo_jax.models import decoder, hf
from fgrpo_jax.policies.llm import exported, prompts, serving
from fgrpo_jax.rank import Ranker
from fgrpo_jax.types import RankingExample

SPEC = decoder.DecoderSpec(
    vocab_size=300, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_size=8, init_std=0.3
)
LONG = 4  # tokens of a text that are shown
TEXTS = [f"item {letter}" for letter in "abcdefghijklmnopqrstuvwx"]


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_runs():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of a language model with a tokenizer of pieces and numbered candidates, and its export."""
    folder = tmp_path_factory.mktemp("serving")
    (folder / "data").mkdir()
    write_world(folder / "data", train=8, validation=8)
    tokenizer = train_bpe(TEXTS * 9 + ["[1] > [12]</SLATE><RANK>", "Candidates:", "History:"] * 9, SPEC.vocab_size)
    hf.save(folder / "qwen", SPEC, random_params(SPEC), {"model_type": "qwen3"}, tokenizer)
    fields = {
        "model.checkpoint": str(folder / "qwen"),
        "tokenizer": str(folder / "qwen"),
        "transcript": TranscriptConfig("index", slate_min=2, slate_max=3, rank_min=1, rank_max=3, separator=" > "),
        "data.prompt_buckets": (256,),
        "prompt.text_tokens": LONG,
        "sft.batch_queries": 4,
        "sft.eval_every": 1,
    }
    config = changed(tiny_config(folder / "data", folder / "prepared", folder / "run", sft_steps=1), fields)
    with pytest.warns(UserWarning, match="the tokenizer merges"):  # a hard case: transcripts keep pieces apart
        assert run_training(config) == 0
    export(config.run_dir, str(folder / "out"), "sft")
    return config, folder / "out"


@pytest.fixture(scope="module")
def shipped(made):
    """ranking.py as it lies in the export, and what ranking.json says."""
    found = importlib.util.spec_from_file_location("ranking", made[1] / "ranking.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module, module.load(made[1])


@pytest.fixture(scope="module")
def transcripts(made):
    """Of every query as it is shown: its texts, and the tokens of the greedy transcript with its lists."""
    config, out = made
    ranker = Ranker.open(config.run_dir)
    rows = queries(config)
    found = []
    for row, line in zip(rows, stream(ranker, rows), strict=True):
        example, order = shown(example_of(row), config)
        place = {int(c): p for p, c in enumerate(order)}
        lists = [[place[c] for c in line[f"{name}_index"]] for name in ("slate", "ranking")]
        query = ranker._method.policy.encode([example])
        rollout, _ = ranker._method.policy.greedy(ranker._method.params, {}, jax.tree.map(jax.numpy.asarray, query))
        texts = [[text for _, text in items] for items in (example.candidates, example.history)]
        found.append((example, texts, np.asarray(rollout.actions)[0, 0].tolist(), lists))
        assert line["outcome"] == "ok"
    return found


# --------------------------------------------------------------------- prompts


TEXT = st.text("ab \n\t{%[]é", max_size=6)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(["qa", "recommendation"]),
    identifier=st.sampled_from(["index", "letter", "text"]),
    instruction=st.text("ab\n{%}", max_size=6),
    query=TEXT,
    texts=st.lists(TEXT.filter(str.strip), min_size=1, max_size=4),
    history=st.lists(TEXT.filter(str.strip), max_size=3),
)
def test_prompts_are_the_same(kind, identifier, instruction, query, texts, history):
    said = {"template": prompts.template(kind, identifier), "instruction": instruction, "opening": "<SLATE>"}
    said = {"prompt": said | {"chat": False, "history_max": 2}}
    ids = [(str(n), text) for n, text in enumerate(texts)]
    seen = [(str(n), text) for n, text in enumerate(history)][-2:]
    example = RankingExample("q", query, tuple(ids), (0.0,) * len(ids), tuple(seen))
    expected = prompts.render(example, kind, instruction, identifier, "<SLATE>")
    assert serving.prompt(said, query, texts, history) == expected


def test_a_chat_prompt_is_the_same():
    tokenizer = train_bpe(["bytes"], 262)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<a>"
    said = {"template": prompts.template("qa", "index"), "instruction": "Choose.", "opening": "<SLATE>"}
    said = {"prompt": said | {"chat": True, "history_max": 2}}
    example = RankingExample("q", "why?", (("1", "a"), ("2", "b")), (0.0, 0.0))
    text = prompts.render(example, "qa", "Choose.", "index", "<SLATE>")
    (expected,) = prompts.encode_prompts(tokenizer, [text], True, ["q"])
    written = serving.prompt(said, "why?", ["a", "b"], [], tokenizer)
    assert tokenizer.encode(written, add_special_tokens=False) == expected


def test_long_texts_are_shown_by_their_beginnings_everywhere(made, shipped):
    """By a run, by its export and by ranking.py: as if the texts ended there, however long they are."""
    config, out = made
    ranking, said = shipped
    _, tokenizer = opened(out)
    texts, past = TEXTS[:5], TEXTS[5:8]
    whole = [f"{text} and {'more of it ' * 200}" for text in texts]
    begins = ranking.beginnings(whole, LONG, tokenizer)
    assert all(begin.startswith(text) and len(begin) < 20 for begin, text in zip(begins, texts, strict=True))
    short = ranking.prompt(said, "", begins, past, tokenizer)
    with pytest.raises(ValueError, match="made with its tokenizer: give it too"):
        ranking.prompt(said, "", begins, past)
    assert ranking.prompt(said, "", whole, past, tokenizer) == short
    assert short == prompts.render(
        example_of({"query_id": "q", "query": "", "candidates": pairs(begins), "history": pairs(past)}),
        "recommendation", said["prompt"]["instruction"], "index", "<SLATE>",
    )  # fmt: skip
    for ranker in (Ranker.open(config.run_dir), Ranker.open(out)):
        assert ranker.summary.endswith(f"texts cut to {LONG} tokens")
        lists = [ranker.rank("", pairs(texts), history=past) for texts in (begins, whole)]
        assert lists[0] == lists[1]


def pairs(texts):
    return [{"id": str(n), "text": text} for n, text in enumerate(texts)]


# --------------------------------------------------------------------- the same lists


def decoded(model, tokens, next_allowed):
    """Greedy decoding by transformers: the most probable of the allowed tokens at every step."""
    import torch

    def only(batch, so_far):
        return next_allowed(so_far[len(tokens) :].tolist())

    said = model.generate(
        torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens), dtype=torch.long), max_new_tokens=64,
        do_sample=False, prefix_allowed_tokens_fn=only, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return said[0, len(tokens) :].tolist()


def opened(folder):
    pytest.importorskip("torch", reason="the model is decoded by transformers on PyTorch, in the parity extra")
    import torch
    import transformers

    torch.set_num_threads(1)  # more only wait for each other, over so small a model
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer


def engine():
    """What vLLM and SGLang can have such grammars read by."""
    return pytest.importorskip("llguidance", reason="no engine to check grammars with; in the parity extra")


def engine_tokenizer(tokenizer, **sizes):
    import llguidance.hf

    return llguidance.hf.from_tokenizer(tokenizer, **sizes)


def test_transformers_decodes_the_same_lists_token_for_token(made, shipped, transcripts):
    """From the exported directory alone: its model, tokenizer, ranking.json and ranking.py."""
    ranking, said = shipped
    model, tokenizer = opened(made[1])
    for example, (texts, history), tokens, lists in transcripts:
        asked = ranking.prompt(said, example.query, texts, history, tokenizer)
        prompt = ranking.tokens(said, asked, tokenizer)
        written = decoded(model, prompt, ranking.allowed(said, texts, tokenizer))
        assert written == tokens[: len(written)] and set(tokens[len(written) :]) <= {said["transcript"]["eos"]}
        assert list(ranking.lists(said, texts, tokenizer, written)) == lists


def test_llguidance_decodes_the_same_lists_token_for_token(made, shipped, transcripts):
    """With the masks that it makes of the grammar, which are those of `allowed` at every token."""
    llguidance = engine()

    ranking, said = shipped
    model, tokenizer = opened(made[1])
    vocabulary = engine_tokenizer(tokenizer, n_vocab=SPEC.vocab_size)
    for example, (texts, history), tokens, _ in transcripts[:4]:
        grammar = ranking.lark(said, texts, tokenizer)
        assert not llguidance.LLMatcher.validate_grammar(grammar, vocabulary)
        may_follow = ranking.allowed(said, texts, tokenizer)

        def matched(so_far):
            matcher = llguidance.LLMatcher(vocabulary, grammar)
            assert matcher.consume_tokens(so_far), matcher.get_error()
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            found = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
            assert found == may_follow(so_far)
            return found

        asked = ranking.prompt(said, example.query, texts, history, tokenizer)
        prompt = ranking.tokens(said, asked, tokenizer)
        written = decoded(model, prompt, matched)
        assert written == tokens[: len(written)]


def test_an_export_is_ranked_with_as_its_run(made):
    config, out = made
    rows = queries(config)
    exported_ranker = Ranker.open(str(out))
    assert stream(exported_ranker, rows, samples=2) and exported_ranker.name == "export"
    here, there = (stream(ranker, rows) for ranker in (Ranker.open(config.run_dir), exported_ranker))
    assert here == there
    with pytest.raises(ConfigError, match="is an export, of one stage"):
        Ranker.open(str(out), "sft")


def test_candidates_are_shown_in_the_order_of_an_evaluation(made, shipped):
    config, _ = made
    ranking, said = shipped
    for row in queries(config):
        order = shown(example_of(row), config)[1].tolist()
        assert ranking.order(said, row["query_id"], len(row["candidates"])) == order
    assert len({tuple(ranking.order(said, f"q{n}", 9)) for n in range(50)}) > 40


def test_the_export_needs_nothing_of_this_package(made):
    code = "import sys, ranking; s = ranking.load('.'); print(ranking.regex(s, ['a', 'b', 'c'])); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=made[1], capture_output=True, text=True, check=True)
    pattern, modules = done.stdout.splitlines()
    assert re.fullmatch(pattern, "[1] > [2] > [3]</SLATE><RANK>[2]</RANK>")
    assert not {"jax", "fgrpo_jax", "numpy", "transformers"} & set(modules.split())


def test_older_exports_know_no_width_of_names_and_cut_no_text(made, shipped, tmp_path):
    said = json.loads((made[1] / "ranking.json").read_text())
    whole = json.loads(json.dumps(said))
    del whole["prompt"]["text_tokens"]
    (tmp_path / "ranking.json").write_text(json.dumps(whole))
    assert exported.read(tmp_path)[0].prompt.text_tokens == 0
    assert "word " * 20 in shipped[0].prompt(whole, "", ["word " * 21])
    wide, old = (json.loads(json.dumps(said)) for _ in range(2))
    wide["run"]["identifier_width"] = 6
    del old["run"]["identifier_width"]
    for written, width in ((wide, 6), (old, 1)):
        (tmp_path / "ranking.json").write_text(json.dumps(written))
        config, _ = exported.read(tmp_path)
        assert config.transcript == changed(made[0], {"transcript.identifier_width": width}).transcript


def test_a_damaged_ranking_json_is_refused(made, tmp_path):
    said = json.loads((made[1] / "ranking.json").read_text())
    for broken in ({**said, "transcript": {"eos": 1}}, {name: said[name] for name in said if name != "run"}):
        (tmp_path / "ranking.json").write_text(json.dumps(broken))
        with pytest.raises(ConfigError, match="is damaged"):
            exported.read(tmp_path)
