"""MuSiQue as it is published, at the prompt lengths it has: the data, one step of each stage,
and memory that does not grow with rollouts x prompt."""

import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bpe import train_bpe
from helpers import quick_jit, random_params

from fgrpo_jax.algorithm import objectives, rewards
from fgrpo_jax.algorithm.advantages import make_batch
from fgrpo_jax.algorithm.update import make_optimizer, make_update
from fgrpo_jax.config import Config, DataConfig, StageConfig, TranscriptConfig
from fgrpo_jax.data import batches as data
from fgrpo_jax.data import datasets
from fgrpo_jax.models import decoder
from fgrpo_jax.policies.llm import policy as llm
from fgrpo_jax.policies.llm import prompts, tokenizers
from fgrpo_jax.policies.llm.targets import rollout as target_rollout
from fgrpo_jax.policies.llm.transcript import OUTCOMES
from fgrpo_jax.types import Credit, TrainState

RAW = pathlib.Path(__file__).parents[2] / "shared" / "data" / "musique"
VOCABULARY, SHORTEST, PROMPT = 6000, 2000, 2560
B, G = 2, 8
SPEC = decoder.DecoderSpec(
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    mlp_size=192,
)
CREDIT = Credit((("slate", "recall", 1.0), ("rank", "ndcg", 1.0)))

pytestmark = pytest.mark.skipif(not RAW.is_dir(), reason=f"REAL MUSIQUE FILES NOT TESTED: {RAW} is absent")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return Config(
        data=DataConfig(
            name="musique",
            manual_dir=str(RAW),
            prepared_dir=str(tmp_path_factory.mktemp("prepared")),
            prompt_buckets=(PROMPT,),
        ),
        transcript=TranscriptConfig(identifier="index", separator=" > "),
        rl=StageConfig(steps=1, batch_queries=B, group_size=G),
    )


@pytest.fixture(scope="module")
def dataset(config):
    return datasets.load(config.data)


@pytest.fixture(scope="module")
def tokenizer(config, dataset, tmp_path_factory):
    """Trained on the training passages, saved, and loaded the way a run loads it."""
    rows = dataset.splits["train"]
    texts = [text for row in rows for _, text in row.candidates] + [row.query for row in rows]
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(texts, VOCABULARY).save_pretrained(folder)
    return tokenizers.load(str(folder), dataset, config.transcript, config.prompt)


def prompt_length(config, dataset, tokenizer, example):
    text = prompts.render(example, dataset.kind, dataset.instruction, "index", config.transcript.slate_open)
    return len(prompts.encode_prompts(tokenizer, [text], False, [example.query_id])[0])


@pytest.fixture(scope="module")
def query(config, dataset, tokenizer):
    """The first training batch whose prompts are between SHORTEST and PROMPT tokens."""
    batches = data.make_batches(dataset, config, "rl", config.rl)
    for step in range(100):
        batch = batches.batch_at(step)
        if all(SHORTEST <= prompt_length(config, dataset, tokenizer, e) <= PROMPT for e in batch):
            return make_policy(config, dataset, tokenizer).encode(batch)
    raise AssertionError("no batch of ordinary prompts among the first 100")


def make_policy(config, dataset, tokenizer):
    return llm.make(config, SPEC, tokenizer, dataset.kind, dataset.instruction)


OPTIMIZER = make_optimizer(1e-3, 10, 0, "constant", 0.9, 0.98, 1e-8, 0.0, 1.0, True)


@pytest.fixture(scope="module")
def start():
    params = random_params(SPEC)
    return TrainState(jnp.int32(0), params, OPTIMIZER.init(params))


def rl_batch(query, rollout, lists):
    reward_BGR = rewards.term_rewards(CREDIT, lists, query, {}, 5, rewards.broken_values(-0.1, (), OUTCOMES))
    return make_batch(query, rollout, reward_BGR, CREDIT, "token")


@pytest.fixture(scope="module")
def compiled(config, dataset, tokenizer, query, start):
    """Compiled (rollout, update) of a group size."""

    def programs(group):
        policy = make_policy(config, dataset, tokenizer)
        sample = policy.sources["sampled"](StageConfig(group_size=group))
        arguments = start.params, {}, query, jax.random.key(1)
        rollout = quick_jit(sample).lower(*arguments).compile()
        batch = jax.eval_shape(rl_batch, query, *jax.eval_shape(sample, *arguments))
        update = make_update(policy.logprobs, objectives.OBJECTIVES["clipped_pg"](), OPTIMIZER)
        return rollout, quick_jit(update).lower(start, {}, batch).compile()

    return {group: programs(group) for group in (2, G)}


def moved(before, after):
    change = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, after)
    return jax.tree.leaves(change)


# --------------------------------------------------------------------- the data


def test_the_published_files(config, dataset, tokenizer):
    sizes = {name: len(rows) for name, rows in dataset.splits.items()}
    assert sizes == {"train": 111, "validation": 238}
    for rows in dataset.splits.values():
        for row in rows:
            hops = int(row.query_id[0])  # 2hop__..., 3hop1__..., 4hop3__...
            assert sum(row.relevance) == hops and set(row.relevance) == {0.0, 1.0}, row.query_id
    pools = [len(row.candidates) for row in dataset.splits["validation"]]
    assert sorted(pools) == [19] + [20] * 237
    lengths = [prompt_length(config, dataset, tokenizer, row) for row in dataset.splits["train"]]
    assert 2300 < statistics.median(lengths) < 2900


# --------------------------------------------------------------------- one step of each stage


def test_one_sft_step(config, dataset, tokenizer, query, start):
    policy = make_policy(config, dataset, tokenizer)
    write = target_rollout(llm.make_grammar(config, tokenizer), True, "first", True)
    update = make_update(policy.logprobs, objectives.OBJECTIVES["nll"](), OPTIMIZER)

    @quick_jit
    def step(state, query, key):
        rollout, lists = write(state.params, {}, query, key)
        return (*update(state, {}, rl_batch(query, rollout, lists)), lists)

    state, metrics, lists = step(start, query, jax.random.key(0))
    assert (lists.outcome == 0).all()
    for b, relevance in enumerate(query.relevance):
        relevant = set(np.flatnonzero(relevance).tolist())
        assert set(lists.slate[b, 0, : len(relevant)].tolist()) == relevant
        assert set(lists.ranking[b, 0, : len(relevant)].tolist()) == relevant
    assert metrics["nonfinite"].value() == 0
    # An untrained model chooses evenly: between two tokens and twenty candidates at a time.
    assert np.log(2) < metrics["loss"].value() < np.log(20)
    assert 0 < max(moved(start.params, state.params)) < 2e-3


def test_one_fgrpo_step(query, start, compiled):
    rollout_program, update_program = compiled[G]
    assert query.prompt.shape == (B, PROMPT) and (query.prompt_len >= SHORTEST).all()
    rollout, lists = rollout_program(start.params, {}, query, jax.random.key(1))
    assert (lists.outcome == 0).all()  # constrained
    batch = quick_jit(rl_batch)(query, rollout, lists)
    assert (batch.advantage != 0).any()
    state, metrics = update_program(start, {}, batch)
    assert int(state.step) == 1 and metrics["nonfinite"].value() == 0
    assert metrics["drift"].value() < 1e-4  # sampler and trainer agree over the long prompt
    assert 0 < min(moved(start.params, state.params)) and max(moved(start.params, state.params)) < 2e-3


# --------------------------------------------------------------------- memory


@pytest.mark.parametrize("which", [0, 1], ids=["rollout", "update"])
def test_memory_does_not_grow_with_rollouts_times_prompt(compiled, which):
    """Temporary memory of the compiled program; no clock, no run.

    A program that repeats the prompt for every rollout grows in proportion to G: by
    (G - 2) / 2 = 3 times its memory at G = 2. Ours adds the transcripts' own activations and
    their attention to the prompt; bounded here by 15 % of proportional growth (it is 3 %).
    """
    small, large = (compiled[group][which].memory_analysis().temp_size_in_bytes for group in (2, G))
    assert large - small < 0.15 * (G - 2) / 2 * small, (small, large)
