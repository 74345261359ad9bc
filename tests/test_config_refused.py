"""Configurations that cannot run, and what is said of each."""

import dataclasses
import re

import pytest
from tiny import ROOT, changed

import train
from fgrpo_jax.config import ConfigError
from fgrpo_jax.config_files import load_file
from fgrpo_jax.data.datasets import DATASETS, builder_class
from fgrpo_jax.run.experiment import KNOWN
from fgrpo_jax.run.validation import validate
from fgrpo_jax.run.validation_of_data import data_problems

DEFAULT = load_file(ROOT / "configs" / "synthetic.py")


def problems(**fields):
    with pytest.raises(ConfigError, match="this configuration cannot run:") as error:
        validate(changed(DEFAULT, {name.replace("__", "."): value for name, value in fields.items()}), KNOWN)
    return [line.removeprefix("  - ") for line in str(error.value).splitlines()[1:]]


def test_values_of_the_wrong_type():
    """Every field is looked at: each gets a value of no allowed type, in turn."""

    def leaves(config, where=""):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                yield f"{where}{field.name}"
                yield from leaves(value, f"{where}{field.name}.")
            else:
                yield f"{where}{field.name}"

    for name in leaves(DEFAULT):
        (found,) = problems(**{name.replace(".", "__"): {"a": 1}})
        assert found.startswith(f"{name}={{'a': 1}} must be of type "), found
    assert problems(rl__credit__terms=(("slate", "recall", 1.0), ("rang", "ndcg", 1.0)))[0].startswith(
        "rl.credit.terms="
    )
    assert problems(model__dtype="float16") == ["model.dtype='float16' must be of type Literal['float32', 'bfloat16']"]
    validate(changed(DEFAULT, {"rl.optim.clip_norm": 1}), KNOWN)  # a whole number is a float


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(data__name="nope"), "data.name: 'nope' is not one of .*jsonl, lastfm, musique, next_item, synthetic"),
        (dict(data__kcore=0), "data.kcore=0 must be positive"),
        (dict(data__retrieved=6), "data.retrieved=6 must be at least 12, two lists of six"),
        (dict(data__pool="half"), "data.pool='half' must be of type"),
        (dict(data__name="jsonl"), "set data.manual_dir to their folder, of train.jsonl, validation"),
        (dict(data__prompt_buckets=(64, 40)), "data.prompt_buckets=.* must be ascending"),
        (dict(data__pool_size=1), "data.pool_size=1 must be at least 2"),
        (dict(data__history_dropout=float("nan")), r"data.history_dropout=nan must be in \[0, 1\)"),
        (dict(data__history_max=0), "data.history_max=0 must be at least 1"),
        (
            dict(data__interactions__user="who"),
            "data.interactions.user: 'user' -> 'who': data.name='synthetic' does not",
        ),
        (dict(transcript__slate_min=11), "slate_min=11 and transcript.slate_max=10: need 1 <= min <= max"),
        (dict(transcript__rank_min=0), "rank_min=0 and transcript.rank_max=5: need 1 <= min <= max"),
        (dict(transcript__rank_max=11), "rank_max=11 exceeds transcript.slate_max=10: only items of the slate"),
        (dict(transcript__slate_min=4), "rank_min=5 exceeds transcript.slate_min=4: .* lower rank_min or raise"),
        (dict(transcript__identifier_width=0), "transcript.identifier_width=0 must be from 1 to 512"),
        (
            dict(transcript__identifier="letter", transcript__identifier_width=4),
            "identifier_width=4 only lengthens transcripts of letters",
        ),
        (dict(transcript__rank_close=""), "transcript.rank_close must not be empty"),
        (dict(transcript__identifier="index"), "set transcript.identifier='text', or tokenizer to a Hugging Face"),
        (dict(prompt__text_tokens=-1), "prompt.text_tokens=-1 must not be negative; 0: whole texts"),
        (dict(prompt__text_tokens=9), "prompt.text_tokens=9 cuts the texts by which transcripts name candidates"),
        (dict(prompt__chat=True), "prompt.chat needs a tokenizer with a chat template"),
        (dict(model__num_heads=3), "model.num_heads=3 must be a multiple of num_kv_heads=2"),
        (dict(model__head_dim=5), "model.head_dim=5 must be even"),
        (dict(model__head_dim=12, model__family="qwen3_5_text"), "head_dim=12 of which 0.25 is rotated must be even"),
        (
            dict(model__delta=(3, 4, 16, 16)),
            r"model.delta=\(3, 4, 16, 16\): at least 1 each, and heads of values a multiple",
        ),
        (dict(model__window=0), "model.window=0 must be at least 1"),
        (dict(model__mlp_size=0), "model.mlp_size=0 must be at least 1"),
        (dict(model__init_std=0.0), "model.init_std=0.0 must be positive"),
        (dict(model__logit_chunk=0), "model.logit_chunk must be at least 1"),
        (dict(reward__k=0), "reward.k=0 must be at least 1"),
        (dict(reward__broken=float("-inf")), "the reward of 'broken', -inf, is not finite"),
        (dict(reward__rules=(("slate_wrong", -1.0),)), "reward.rules: 'slate_wrong' is not one of rank_duplicate,"),
        (dict(sft__steps=0, rl__steps=0), "sft.steps, rl.steps are all 0"),
        (dict(sft__steps=-1), "sft.steps=-1 is negative"),
        (dict(sft__group_size=2), "sft.source='logged' needs sft.group_size=1 and sft.objective.name='nll'"),
        (
            dict(sft__objective__kl_weight=0.1),
            "sft.objective.kl_weight=0.1: 'nll' has no such term or option: leave",
        ),
        (dict(start_from="runs/other"), "start_from replaces the sft stage: set sft.steps=0"),
        (
            dict(rl__credit__scheme="labels", transcript__slate_min=9),
            "rl.credit.scheme='labels' teaches no lengths: set",
        ),
        (
            dict(rl__credit__scheme="labels", transcript__separator=" | "),
            "rl.credit.scheme='labels' teaches not where a text ends that begins another one",
        ),
        (
            dict(rl__credit__scheme="labels", rl__credit__terms=(("slate", "recall", -1.0),)),
            "rl.credit.scheme='labels' imitates .*, and that of .slate, recall. is -1.0: raise it, or leave",
        ),
        (
            dict(rl__credit__scheme="labels", rl__credit__terms=(("slate", "recall", 1.0), ("rank", "ndcg", 0.0))),
            "and that of .rank, ndcg. is 0.0: raise it, or leave the term out of rl.credit.terms",
        ),
        (dict(rl__credit__scheme="labels", rl__source="mixed"), "it judges what the policy itself wrote"),
        (dict(rl__group_size=1), "rl.group_size=1: an advantage centred by its group is then always 0; use 2"),
        (dict(rl__batch_queries=10, rl__microbatches=4), "rl.batch_queries=10 is not divisible by rl.microbatches=4"),
        (dict(rl__eval_every=0), "rl.eval_every=0 must be at least 1"),
        (dict(rl__patience=-1), "rl.patience=-1 must not be negative; 0: never stop early"),
        (dict(rl__subset=(0.5, 0.5)), r"rl.subset=\(0.5, 0.5\): need 0 <= low < high <= 1"),
        (dict(rl__objective__name="ppo"), "rl.objective.name: 'ppo' is not one of clipped_pg, group_softmax, nll"),
        (
            dict(rl__objective__name="group_softmax"),
            "'group_softmax' reads one reward: name one in rl.credit.terms, not 2",
        ),
        (dict(rl__objective__sigma=-1.0), "rl.objective.sigma=-1.0 must be >= 0 and finite"),
        (dict(rl__objective__normalised=False), "rl.objective.normalised=False: 'clipped_pg' has no such term"),
        (dict(rl__objective__name="nll"), "rl.objective.name='nll' ignores rewards"),
        (dict(rl__objective__epochs=0), "rl.objective.epochs=0 must be at least 1"),
        (dict(rl__starts_from="dpo"), "rl.starts_from: 'dpo' is not one of sft"),
        (
            dict(rl__starts_from="sft", sft__steps=0, eval__versus="rl"),
            "rl.starts_from: stage 'sft' is skipped, its steps are 0",
        ),
        (dict(sft__frozen_from=("rl",)), "sft.frozen_from: 'rl' is not one of "),
        (dict(rl__objective__kl_weight=float("nan")), "rl.objective.kl_weight=nan must be >= 0 and finite; 0: no"),
        (dict(rl__objective__clip_low=1.0), r"rl.objective.clip_low=1.0 must be in \[0, 1\)"),
        (dict(rl__objective__clip_high=-0.5), "rl.objective.clip_high=-0.5 must be >= 0; inf: ratios are not clipped"),
        (dict(rl__credit__terms=()), "rl.credit.terms is empty: nothing would be trained"),
        (dict(rl__credit__terms=(("slate", "coverage", 1.0),)), "rl.credit.terms: 'coverage' is not one of f1, hit,"),
        (dict(rl__credit__terms=(("slate", "f1", float("nan")),)), "rl.credit.terms: weight nan is not finite"),
        (dict(rl__credit__scheme="best"), "rl.credit.scheme='best' must be of type Literal"),
        (
            dict(rl__credit__shrinkage=2.0),
            "rl.credit.shrinkage=2.0: 'group' has no such term or option: leave it at 1.0",
        ),
        (dict(rl__credit__scheme="exact", rl__credit__shrinkage=0.0), "rl.credit.shrinkage=0.0 must be positive"),
        (dict(rl__credit__scheme="to_go", rl__credit__normalise="sum"), "rl.credit.normalise='sum': 'to_go' has no"),
        (
            dict(rl__credit__scheme="to_go", rl__credit__terms=(("slate", "ndcg", 1.0), ("rank", "mrr", 1.0))),
            r"'to_go': \(slate, ndcg\) is not one .*: \(slate, recall\), \(rank, ndcg\)\n.*: \(rank, mrr\) is not",
        ),
        (
            dict(rl__credit__scheme="exact", rl__objective__epochs=2),
            "'exact' is on policy: rl.objective.epochs must be 1",
        ),
        (
            dict(rl__credit__scheme="exact", transcript__constrained=False),
            "rl.credit.scheme='exact' needs the choices of the grammar: set transcript.constrained=True",
        ),
        (
            dict(rl__credit__scheme="outcome", rl__objective__name="group_softmax"),
            "rl.credit.scheme='outcome' needs rl.objective.name='clipped_pg', not 'group_softmax'",
        ),
        (
            dict(rl__credit__scheme="outcome", rl__source="mixed"),
            "it judges what the policy itself wrote; use rl.source='sampled'",
        ),
        (dict(sft__credit__scheme="exact"), "sft.credit.scheme='exact': it judges what the policy itself wrote"),
        (dict(rl__optim__learning_rate=0.0), "rl.optim.learning_rate=0.0 must be positive"),
        (dict(rl__optim__b2=1.0), r"rl.optim: b1=0.9 and b2=1.0 must be in \[0, 1\)"),
        (dict(rl__optim__weight_decay=float("nan")), "rl.optim.weight_decay=nan must be finite and not"),
        (dict(rl__optim__warmup_steps=-2), "rl.optim.warmup_steps=-2 must not be negative; 0: none"),
        (dict(eval__metric="ndcg"), "eval.metric: 'ndcg' is not one of .*mrr, ndcg@1"),
        (dict(eval__metrics=("ndcg", "auc")), "eval.metrics: 'auc' is not one of alpha_ndcg, diversity, f1, hit,"),
        (dict(eval__metric="map@5"), "eval.metric: 'map@5' is not one of"),
        (dict(eval__metrics=("recall",)), "eval.metric: 'ndcg@5' is not one of"),
        (dict(eval__metric="ndcg@4"), "eval.metric: 'ndcg@4' is not one of"),
        (dict(eval__metric="mrr@5"), "eval.metric: 'mrr@5' is not one of"),
        (dict(eval__baselines=("random", "als")), "eval.baselines: 'als' is not one of bm25,"),
        (dict(eval__versus="gru4rec"), "eval.versus: 'gru4rec' is not one of .*rl, sft"),
        (dict(eval__bootstrap=0), "eval.bootstrap=0 must be at least 1"),
        (dict(eval__batch_queries=0), "eval.batch_queries=0 must be at least 1"),
        (dict(eval__queries=-1), "eval.queries=-1 must be at least 0; 0: all of them"),
        (dict(eval__transcripts=-1), "eval.transcripts=-1 must be at least 0; 0: none"),
        (dict(eval__cutoffs=(0, 5)), r"eval.cutoffs=\(0, 5\) must hold positive numbers"),
        (dict(checkpoint__keep=0), "checkpoint.keep=0 must be at least 1"),
        (dict(log_every=-3), "log_every=-3 must be at least 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_values(fields, message):
    found = problems(**fields)
    with pytest.raises(ConfigError, match=message):
        raise ConfigError("\n".join(found))
    if message.startswith(("data.name: 'nope'", "rl.group_size")):
        assert len(found) == 1


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(targets=0), "data.interactions.targets=0 must be at least 1"),
        (dict(kcore=0), "data.interactions.kcore=0 must be at least 1"),
        (dict(windows=0), "data.interactions.windows=0 must be at least 1"),
        (dict(min_history=0), "data.interactions.min_history=0 must be at least 1"),
        (dict(history=9), "data.interactions.history=9 is below data.history_max=10"),
        (dict(user=""), "data.interactions: user, item, time, item_id and text must name columns"),
        (dict(text=()), "data.interactions: user, item, time, item_id and text must name columns"),
        (dict(time="user"), "data.interactions: user, item, time, rating are different columns"),
        (dict(text=("a", "a")), "text names none twice"),
        (dict(min_rating=3.0), "min_rating and gain='rating' need data.interactions.rating, the column"),
        (dict(gain="rating"), "min_rating and gain='rating' need data.interactions.rating, the column"),
        (dict(rating="r", min_rating=float("nan")), "data.interactions.min_rating=nan must be finite"),
        (dict(split="time", held_out=(0.5, 0.5)), "must be shares above 0 that leave some for training"),
        (dict(held_out=(0.2, 0.2)), "is read with split='time' only: leave it at its default"),
        (dict(candidates_file="x.csv"), "candidates_file is read with candidates='file' only"),
        (dict(targets=20), "data.interactions.targets=20 leave no room for others in data.pool_size=20"),
        (dict(split="random"), "data.interactions.split='random' must be of type Literal"),
        (dict(data__pool="closed"), "pools that are drawn .data.interactions.candidates. always hold their targets"),
        (dict(data__pool_size=9), "data.pool_size=9 is smaller than the lists, of up to 10 items: raise it"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_values_of_interactions(fields, message):
    named = {name if "__" in name else f"data__interactions__{name}": value for name, value in fields.items()}
    found = problems(data__name="interactions", data__manual_dir="logs", **named)
    assert any(re.search(message, line) for line in found) and len(found) == 1, found


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(run_file="bm25.trec"), "data.ir.run_file='bm25.trec' is read with first_stage='run' only"),
        (dict(first_stage="run", run_file=""), "data.ir.run_file must name a file"),
        (dict(first_stage="tfidf"), "data.ir.first_stage='tfidf' must be of type Literal"),
        (dict(data__pool_size=5), "data.pool_size=5 is smaller than the lists, of up to 10 items"),
        (dict(data__interactions__targets=2), "data.interactions.targets: 1 -> 2: data.name='ir' does not read it"),
        (dict(data__kcore=5), "data.kcore=5: data.name='ir' does not read it; leave it at its default, 20"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_values_of_ir(fields, message):
    named = {name if "__" in name else f"data__ir__{name}": value for name, value in fields.items()}
    (found,) = problems(data__name="ir", data__manual_dir="collection", **named)
    assert found.startswith(message)


@pytest.mark.parametrize("name", DATASETS)
def test_only_data_sets_of_files_need_their_folder(name):
    needed = builder_class(name).MANUAL_DOWNLOAD_INSTRUCTIONS
    found = data_problems(changed(DEFAULT, {"data.name": name}), KNOWN)
    said = f"data.name={name!r} reads files: set data.manual_dir to their folder, of {needed}"
    assert found == ([said] if needed else [])


def test_a_new_data_set_says_itself_what_it_reads():
    config = changed(DEFAULT, {"data.name": "new"})
    known = KNOWN._replace(datasets=KNOWN.datasets | {"new"})
    assert not data_problems(config, known._replace(raw_files=lambda name: None))
    assert "of new.csv" in data_problems(config, known._replace(raw_files=lambda name: f"{name}.csv"))[0]


def test_all_problems_are_told_at_once(capsys):
    assert train.main(["--rl.group-size", "1", "--data.name", "nope", "--run-dir", "/nowhere/to/be/made"]) == 2
    assert capsys.readouterr().err == (
        "error: this configuration cannot run:\n"
        "  - data.name: 'nope' is not one of categories, goalrank_book, goalrank_ml1m, goalrank_world, hotpotqa, "
        "interactions, ir, jsonl, lastfm, musique, next_item, synthetic\n"
        "  - rl.group_size=1: an advantage centred by its group is then always 0; use 2 or more\n"
    )
