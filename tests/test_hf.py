"""Checkpoints in and out, against `transformers` on torch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bpe import train_bpe
from helpers import quick_jit

from fgrpo_jax.algorithm import objectives, rewards
from fgrpo_jax.algorithm.advantages import make_batch
from fgrpo_jax.algorithm.update import make_optimizer, make_update
from fgrpo_jax.config import Config, DataConfig, StageConfig, TranscriptConfig
from fgrpo_jax.models import decoder, head, hf
from fgrpo_jax.policies.llm import policy as llm
from fgrpo_jax.policies.llm import transcript
from fgrpo_jax.policies.llm.targets import rollout as target_rollout
from fgrpo_jax.types import Credit, RankingExample, TrainState

WORDS = "amber basil cedar delta ember fjord grove heron ivory jetty kelp lotus maple north olive".split()
CONFIG = Config(
    data=DataConfig(prompt_buckets=(96,)),
    transcript=TranscriptConfig(
        identifier="index",
        separator=" > ",
        slate_min=2,
        slate_max=4,
        rank_min=1,
        rank_max=2,
        constrained=False,
    ),
)
# head_dim * num_heads is not the hidden size, nor is anything else like anything else.
SPEC = decoder.DecoderSpec(
    vocab_size=320,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_size=96,
    rope_theta=50_000.0,
    norm_eps=1e-5,
    init_std=0.1,
    logit_chunk=64,
)
UNTIED = SPEC._replace(tie_embeddings=False)
NUMERICS = {
    "dtype": "float32", "param_dtype": "float32", "remat": False, "attention": "auto", "logit_chunk": 64
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    text = "Choose and rank. Candidates: Question: [1] [12] > " + " ".join(WORDS)
    return train_bpe([text] * 5, SPEC.vocab_size)


@pytest.fixture(scope="module", params=[SPEC, UNTIED], ids=["tied", "untied"])
def torch_model(request, torch, tmp_path_factory):
    """(model, directory of one file, directory of several files); the norms are not one."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=SPEC.vocab_size,
        hidden_size=SPEC.hidden_size,
        num_hidden_layers=SPEC.num_layers,
        num_attention_heads=SPEC.num_heads,
        num_key_value_heads=SPEC.num_kv_heads,
        head_dim=SPEC.head_dim,
        intermediate_size=SPEC.mlp_size,
        rope_parameters={"rope_theta": SPEC.rope_theta, "rope_type": "default"},
        rms_norm_eps=SPEC.norm_eps,
        initializer_range=0.1,
        tie_word_embeddings=request.param.tie_embeddings,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    one, several = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("several")
    model.save_pretrained(one)
    model.save_pretrained(several, max_shard_size="100KB")
    return model, one, several


def torch_logits(torch, model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens), dtype=torch.long)[None]).logits[0].float().numpy()


def from_transformers(directory):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


@functools.partial(quick_jit, static_argnums=0)
def all_logits(spec, params, prompt, prompt_len, actions):
    return head.logits(params, decoder.completions(spec, params, prompt, prompt_len, actions))


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b))


# --------------------------------------------------------------------- parity


def test_logits_equal_transformers(torch, torch_model):
    model, one, several = torch_model
    spec = hf.read_spec(one, **NUMERICS)
    expected = UNTIED if not model.config.tie_word_embeddings else SPEC
    assert spec == expected._replace(init_std=spec.init_std)
    params = hf.load(one, spec)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), decoder.shapes(spec)
    )
    assert (several / hf.INDEX).is_file()
    assert same(params, hf.load(several, hf.read_spec(several, **NUMERICS)))

    rng = np.random.default_rng(0)
    lengths = np.array([1, 5, 9])  # of 9: the first prompt is all padding but one token
    prompt, actions = rng.integers(0, SPEC.vocab_size, (3, 9)), rng.integers(0, SPEC.vocab_size, (3, 2, 24))
    ours = np.asarray(all_logits(spec, params, prompt, lengths, actions))
    for b, length in enumerate(lengths):
        for g in range(2):
            theirs = torch_logits(torch, model, [*prompt[b, :length], *actions[b, g, :-1]])
            # Prompt of one token: every position of the whole sequence is compared.
            np.testing.assert_allclose(ours[b, g], theirs[length - 1 :], atol=1e-4, rtol=0)


def test_export_back_is_the_same_model(torch, torch_model, tokenizer, tmp_path):
    import transformers

    model, one, _ = torch_model
    spec = hf.read_spec(one, **NUMERICS)
    params = hf.load(one, spec)
    hf.save(tmp_path / "out", spec, params, hf.read_config(one), tokenizer, max_file_bytes=100_000)
    assert (tmp_path / "out" / hf.INDEX).is_file()
    back = from_transformers(tmp_path / "out")
    theirs, ours = model.state_dict(), back.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    tokens = np.arange(40) * 7 % SPEC.vocab_size
    assert np.array_equal(torch_logits(torch, model, tokens), torch_logits(torch, back, tokens))
    assert back.config.rope_parameters["rope_theta"] == SPEC.rope_theta
    assert back.config.eos_token_id == 1
    text = "maple > [12]</SLATE><RANK>"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").encode(text) == tokenizer.encode(text)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # nothing partial is left


def test_bfloat16(torch, torch_model, tokenizer, tmp_path):
    model, one, _ = torch_model
    spec = hf.read_spec(one, **{**NUMERICS, "param_dtype": "bfloat16"})
    params = hf.load(one, spec)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    hf.save(tmp_path / "out", spec, params, None, tokenizer)
    assert (tmp_path / "out" / hf.SINGLE).is_file()
    half = from_transformers(tmp_path / "out")
    assert half.dtype == torch.bfloat16
    rounded = model.state_dict()
    assert all(torch.equal(rounded[k].to(torch.bfloat16), v) for k, v in half.state_dict().items())
    assert same(params, hf.load(tmp_path / "out", spec))
    wide = hf.load(tmp_path / "out", spec._replace(param_dtype="float32"))
    assert same(wide, jax.tree.map(lambda x: x.astype(jnp.float32), params))


# --------------------------------------------------------------------- one step, and greedy decoding


def examples(n=4, pool=6):
    rng = np.random.default_rng(3)
    made = []
    for i in range(n):
        words = rng.permutation(WORDS)[: pool + i % 2]
        relevance = [0.0] * len(words)
        relevance[int(rng.integers(pool))] = 2.0
        relevance[0] += 1.0
        made.append(
            RankingExample(
                query_id=f"q{i}",
                query=" ".join(rng.permutation(WORDS)[: 1 + i]),
                candidates=tuple((f"c{j}", str(word)) for j, word in enumerate(words)),
                relevance=tuple(relevance),
            )
        )
    return made


def make_policy(config, spec, tokenizer):
    return llm.make(config, spec, tokenizer, "qa", "Choose and rank.")


def new_state(params, optimizer):
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def optimizer_of(rate):
    return make_optimizer(rate, 100, 0, "constant", 0.9, 0.98, 1e-8, 0.0, 1.0, True)


@pytest.mark.parametrize("torch_model", [SPEC], ids=["tied"], indirect=True)
def test_hf_directory_in_one_fgrpo_step_out(torch_model, tokenizer, tmp_path):
    """The weights that come out are the updated ones, and transformers reads them."""
    model, _, several = torch_model
    spec = hf.read_spec(several, **NUMERICS)
    config = dataclasses.replace(CONFIG, transcript=dataclasses.replace(CONFIG.transcript, constrained=True))
    policy = make_policy(config, spec, tokenizer)
    sample = policy.sources["sampled"](StageConfig(group_size=4))
    optimizer = optimizer_of(1e-3)
    credit = Credit((("slate", "recall", 1.0), ("rank", "ndcg", 1.0)))
    query = policy.encode(examples())
    update = make_update(policy.logprobs, objectives.OBJECTIVES["clipped_pg"](), optimizer)

    @quick_jit
    def step(state, query, key):
        rollout, lists = sample(state.params, {}, query, key)
        reward = rewards.term_rewards(credit, lists, query, {}, 2, rewards.broken_values(-0.1, (), transcript.OUTCOMES))
        batch = make_batch(query, rollout, reward, credit, "token")
        return (*update(state, {}, batch), lists, batch)

    start = new_state(hf.load(several, spec), optimizer)
    state, metrics, lists, batch = step(start, query, jax.random.key(0))
    assert (lists.outcome == 0).all()  # constrained
    assert (batch.advantage != 0).any()
    assert metrics["nonfinite"].value() == 0 and metrics["drift"].value() < 1e-4
    hf.save(tmp_path / "out", spec, state.params, hf.read_config(several), tokenizer)
    before, after = model.state_dict(), from_transformers(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    changes = {name: float((before[name] - after[name]).abs().max()) for name in before}
    assert all(0 < change < 2e-3 for change in changes.values()), changes  # Adam moves by the learning rate


@pytest.mark.parametrize("torch_model", [UNTIED], ids=["untied"], indirect=True)
def test_greedy_tokens_equal_generate(torch, torch_model, tokenizer, tmp_path):
    """Unconstrained greedy decoding against generate(), up to the first violation.

    A random model breaks the grammar at once, so it is fitted to a few targets first: then
    most transcripts are long, and some are whole.
    """
    _, one, _ = torch_model
    spec = hf.read_spec(one, **NUMERICS)
    policy = make_policy(CONFIG, spec, tokenizer)
    grammar = llm.make_grammar(CONFIG, tokenizer)
    write = target_rollout(grammar, False, "first", True)
    optimizer = optimizer_of(3e-3)
    update = make_update(policy.logprobs, objectives.OBJECTIVES["nll"](), optimizer)
    query = policy.encode(examples())
    rollout, _ = quick_jit(write)({}, {}, query, jax.random.key(0))
    no_reward = jnp.zeros((*rollout.actions.shape[:2], 0))
    batch = make_batch(query, rollout, no_reward, Credit(()), "token")

    @quick_jit
    def fit(state, batch, steps):
        return jax.lax.fori_loop(0, steps, lambda _, s: update(s, {}, batch)[0], state)

    state = new_state(hf.load(one, spec), optimizer)
    greedy = quick_jit(policy.greedy)
    compared = []
    for steps in (0, 60):
        state = fit(state, batch, steps)
        directory = tmp_path / str(len(compared))
        hf.save(directory, spec, state.params, None, tokenizer)
        ours = greedy(state.params, {}, query)
        compared += compare_greedy(torch, from_transformers(directory), grammar, query, *ours)
    assert len(compared) == 8
    assert sum(outcome == "ok" for _, outcome in compared) >= 2, compared
    assert sum(outcome != "ok" for _, outcome in compared) >= 4, compared  # violations end ours early


def compare_greedy(torch, model, grammar, query, rollout, lists):
    """[(tokens compared, outcome)] of each query; every token up to the end must agree."""
    compared = []
    for b in range(len(query.prompt)):
        length = int(query.prompt_len[b])
        prompt = torch.tensor(query.prompt[b, :length], dtype=torch.long)[None]
        ours = np.asarray(rollout.actions[b, 0])
        labels = np.asarray(rollout.phase[b, 0])
        ended = int((labels > 0).sum())  # tokens up to and with the violation, or eos
        theirs = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=ended,
            eos_token_id=grammar.eos,
            pad_token_id=grammar.eos,
        )[0, length:].numpy()
        np.testing.assert_array_equal(ours[:ended], theirs)
        compared.append((ended, transcript.OUTCOMES[int(lists.outcome[b, 0])].name))
    return compared
