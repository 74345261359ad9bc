"""What tokenizers put before every text (BOS), which prompts begin with: in runs, exports, and runs of before."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers as backend
from bpe import train_bpe
from helpers import quick_runs, random_params
from test_prompted import ask_of
from tiny import changed, run_training, tiny_config, write_world

from fgrpo_jax.config import Config, ConfigError, PromptConfig, TranscriptConfig
from fgrpo_jax.config_files import to_json
from fgrpo_jax.export import export
from fgrpo_jax.models import decoder, hf
from fgrpo_jax.policies.llm import exported, files, prompts, serving, tokenizers
from fgrpo_jax.policies.llm.encode import prompt_tokens
from fgrpo_jax.rank import Ranker
from fgrpo_jax.types import RankingExample

TEXTS = ["item a", "item b", "Candidates:", "History:", "[1] > [12]"] * 9
CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<a>"
EXAMPLE = RankingExample("q", "", (("1", "item a"), ("2", "item b")), (0.0, 1.0))


def with_bos(template="<bos> $A"):
    """A tokenizer of pieces whose texts begin with a token of its own."""
    tokenizer = train_bpe(TEXTS, 280)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    made = backend.processors.TemplateProcessing(single=template, special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = made
    return tokenizer


@pytest.mark.parametrize("template", ["<bos> $A", "<bos> $A <eos>"])
def test_prompts_begin_as_the_tokenizers_texts_do(template):
    """With what stands before them, and not with what stands behind."""
    tokenizer, bare = with_bos(template), train_bpe(TEXTS, 280)
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    assert tokenizer.encode("item")[0] == bos
    assert prompts.beginning(PromptConfig(), tokenizer) == [bos]
    assert prompts.beginning(PromptConfig(bos=False), tokenizer) == []
    (ids,) = prompt_tokens(Config(), tokenizer, "qa", "Choose.", [EXAMPLE])
    (before,) = prompt_tokens(Config(), bare, "qa", "Choose.", [EXAMPLE])
    assert ids == [bos, *before]


@pytest.mark.parametrize("tokenizer", [train_bpe(TEXTS, 280), with_bos("$A <eos>")])
def test_other_tokenizers_put_nothing_there(tokenizer):
    assert prompts.beginning(PromptConfig(), tokenizer) == []


def test_a_chat_template_has_its_own():
    tokenizer = with_bos()
    tokenizer.chat_template = CHAT
    chat = PromptConfig(chat=True)
    assert prompts.beginning(chat, tokenizer) == []  # so a run of before, which recorded none, can be a start
    (ids,) = prompt_tokens(Config(prompt=chat), tokenizer, "qa", "Choose.", [EXAMPLE])
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


THINKING = CHAT + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"


def test_a_run_keeps_the_turns_of_its_chat(tmp_path):
    """Also one of an earlier version, which recorded none and let templates have models think first."""
    tokenizer, config = with_bos(), Config(prompt=PromptConfig(chat=True))
    tokenizer.chat_template = THINKING
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    record = tmp_path / "prompt_begins.json"
    record.write_text(json.dumps({"begins": [], "turn": "<bos><user>a<a><think></think>"}))
    assert files.keeping_beginning(config, tokenizer, tmp_path).prompt.chat
    record.write_text(json.dumps({"begins": []}))
    with pytest.raises(ConfigError, match="prompts began as '<bos><user>a<a>', and its chat template makes"):
        files.keeping_beginning(config, tokenizer, tmp_path)
    assert files.keeping_beginning(Config(), tokenizer, tmp_path) == Config(prompt=PromptConfig(bos=False))
    tokenizer.chat_template = CHAT  # without thinking it was the same
    assert files.keeping_beginning(config, tokenizer, tmp_path).prompt.chat


@pytest.mark.parametrize("template", [None, CHAT])
def test_a_model_that_is_asked_in_words_is_given_it_once(template):
    tokenizer = with_bos()
    tokenizer.chat_template = template
    (asked,) = ask_of(tokenizer, [EXAMPLE])
    assert asked[0] == tokenizer.bos_token_id and asked.count(tokenizer.bos_token_id) == 1


# --------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that starts from a checkpoint with such a tokenizer, and its export."""
    folder = tmp_path_factory.mktemp("bos")
    (folder / "data").mkdir()
    write_world(folder / "data", train=8, validation=8)
    tokenizer = with_bos()
    spec = decoder.DecoderSpec(
        vocab_size=300, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_size=8, init_std=0.3
    )
    hf.save(
        folder / "llama", spec._replace(qk_norm=False), random_params(spec._replace(qk_norm=False)), None, tokenizer
    )
    fields = {
        "model.checkpoint": str(folder / "llama"),
        "tokenizer": str(folder / "llama"),
        "transcript": TranscriptConfig("index", slate_min=2, slate_max=3, rank_min=1, rank_max=3, separator=" > "),
        "data.prompt_buckets": (256,),
        "sft.batch_queries": 4,
        "sft.eval_every": 1,
    }
    config = changed(tiny_config(folder / "data", folder / "prepared", folder / "run", sft_steps=1), fields)
    with quick_runs(), pytest.warns(UserWarning, match="the tokenizer merges"):
        assert run_training(config) == 0
    export(config.run_dir, str(folder / "out"), "sft")
    return config, folder / "out"


@pytest.mark.filterwarnings("ignore:the tokenizer merges")
def test_a_start_that_died_half_way_says_nothing_of_the_next(made, tmp_path):
    """Where the beginning was written, and not yet the tokenizer, and the prompts are to begin otherwise now."""
    config = changed(made[0], {"run_dir": str(tmp_path), "prompt.bos": False})
    (tmp_path / "config.json").write_text(to_json(config))
    (tmp_path / "prompt_begins.json").write_text('{"begins": [280]}\n')
    with quick_runs():
        assert run_training(config) == 0
        bos = tokenizers.from_directory(str(made[1])).bos_token_id
        assert json.loads((tmp_path / "prompt_begins.json").read_text()) == {"begins": []}
        assert first_token(Ranker.open(tmp_path)) != bos


def first_token(ranker):
    (policy,) = ranker._experiment.policies.values()
    return policy.encode([EXAMPLE]).prompt[0, 0]


def test_a_run_and_its_export_begin_alike(made):
    """Also by ranking.py, whose tokens are those of the run."""
    config, out = made
    said, tokenizer = serving.load(out), tokenizers.from_directory(str(out))
    bos = tokenizer.bos_token_id
    assert said["prompt"]["begins"] == [bos]
    (expected,) = prompt_tokens(config, tokenizer, "recommendation", said["prompt"]["instruction"], [EXAMPLE])
    text = serving.prompt(said, "", ["item a", "item b"], [], tokenizer)
    assert serving.tokens(said, text, tokenizer) == expected == tokenizer.encode(text)
    with quick_runs():
        rankers = [Ranker.open(where) for where in (config.run_dir, out)]
        assert [first_token(ranker) for ranker in rankers] == [bos, bos]
        lists = [ranker.rank("which?", [("1", "item a"), ("2", "item b"), ("3", "item c")]) for ranker in rankers]
    assert lists[0] == lists[1]


@pytest.mark.filterwarnings("ignore:the tokenizer merges")
def test_a_run_of_before_keeps_to_what_it_began_with(made, tmp_path, capsys):
    """It holds a tokenizer and says nothing of beginnings; an export says of it that there are none."""
    config, out = made
    old = tmp_path / "old"
    shutil.copytree(config.run_dir, old)
    (old / "prompt_begins.json").unlink()
    config = changed(config, {"run_dir": str(old)})
    assert run_training(config) == 0 and not (old / "prompt_begins.json").exists()
    bos = tokenizers.from_directory(str(out)).bos_token_id
    assert first_token(Ranker.open(old)) != bos
    export(str(old), str(tmp_path / "out"), "sft")
    assert serving.load(tmp_path / "out")["prompt"]["begins"] == []
    assert first_token(Ranker.open(tmp_path / "out")) != bos
    said = json.loads((tmp_path / "out" / "ranking.json").read_text())
    del said["prompt"]["begins"]  # of an export of before
    (tmp_path / "out" / "ranking.json").write_text(json.dumps(said))
    assert not exported.read(tmp_path / "out")[0].prompt.bos
    started = changed(config, {"run_dir": str(tmp_path / "new"), "start_from": str(old), "sft.steps": 0, "rl.steps": 1})
    assert run_training(started) == 2
    assert "begin with the tokens [] there and with [280] here: set prompt.bos=False" in capsys.readouterr().err


def test_a_tokenizer_that_begins_otherwise_than_the_run_did_is_refused(made):
    config, _ = made
    with pytest.raises(ConfigError, match=r"began with the tokens \[280\], and its tokenizer puts \[\] before a text"):
        files.keeping_beginning(config, train_bpe(TEXTS, 280), Path(config.run_dir))
