"""Checkpoints in and out, against `transformers` on torch; what is broken is refused by name."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from bpe import train_bpe
from helpers import quick_jit

from fgrpo_jax import objectives, rewards, transcript
from fgrpo_jax.advantages import make_batch
from fgrpo_jax.config import Config, DataConfig, TranscriptConfig
from fgrpo_jax.models import decoder, hf
from fgrpo_jax.policies import llm
from fgrpo_jax.policies.logged import logged
from fgrpo_jax.types import Credit, RankingExample, TrainState
from fgrpo_jax.update import make_optimizer, make_update

WORDS = "amber basil cedar delta ember fjord grove heron ivory jetty kelp lotus maple north olive pearl".split()
CONFIG = Config(
    data=DataConfig(prompt_buckets=(96,)),
    transcript=TranscriptConfig(
        identifier="index", separator=" > ", slate_min=2, slate_max=4, rank_min=1, rank_max=2, constrained=False
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
NUMERICS = {"dtype": "float32", "param_dtype": "float32", "remat": False, "logit_chunk": 64}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["Choose and rank. Candidates: Question: [1] [12] > " + " ".join(WORDS)] * 5, SPEC.vocab_size)


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch", reason="PARITY WITH transformers NOT TESTED: torch is not installed")
    torch.set_num_threads(1)  # the models are tiny; waiting for threads would take longer
    return torch


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
    return decoder.logits(params, decoder.completions(spec, params, prompt, prompt_len, actions))


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


def make_policy(config, spec, tokenizer, group):
    return llm.make(config, spec, tokenizer, "qa", "Choose and rank.", group)


def new_state(params, optimizer):
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def optimizer_of(rate):
    return make_optimizer(rate, 100, 0, "constant", 0.9, 0.98, 1e-8, 0.0, 1.0)


@pytest.mark.parametrize("torch_model", [SPEC], ids=["tied"], indirect=True)
def test_hf_directory_in_one_fgrpo_step_out(torch_model, tokenizer, tmp_path):
    """The weights that come out are the updated ones, and transformers reads them."""
    model, _, several = torch_model
    spec = hf.read_spec(several, **NUMERICS)
    config = dataclasses.replace(CONFIG, transcript=dataclasses.replace(CONFIG.transcript, constrained=True))
    policy = make_policy(config, spec, tokenizer, group=4)
    optimizer = optimizer_of(1e-3)
    credit = Credit((("slate", "recall", 1.0), ("rank", "ndcg", 1.0)))
    query = policy.encode(examples())
    update = make_update(policy, objectives.OBJECTIVES["clipped_pg"](), optimizer)

    @quick_jit
    def step(state, query, key):
        rollout, lists = policy.rollout(state.params, {}, query, key)
        reward = rewards.term_rewards(credit, lists, query, 2, rewards.broken_values(-0.1, ()))
        batch = make_batch(query, rollout, reward, credit, "token")
        return (*update(state, {}, batch), lists, batch)

    state, metrics, lists, batch = step(new_state(hf.load(several, spec), optimizer), query, jax.random.key(0))
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
    policy = make_policy(CONFIG, spec, tokenizer, group=1)
    grammar = llm.make_grammar(CONFIG, tokenizer)
    teacher = logged(policy, grammar, False, "first", True)
    optimizer = optimizer_of(3e-3)
    update = make_update(teacher, objectives.OBJECTIVES["nll"](), optimizer)
    query = policy.encode(examples())
    rollout, _ = quick_jit(teacher.rollout)({}, {}, query, jax.random.key(0))
    no_reward = jnp.zeros((*rollout.actions.shape[:2], 0))
    batch = make_batch(query, rollout, no_reward, Credit(()), "token")

    @quick_jit
    def fit(state, batch, steps):
        return jax.lax.fori_loop(0, steps, lambda _, s: update(s, {}, batch)[0], state)

    state = new_state(hf.load(one, spec), optimizer)
    greedy = quick_jit(policy.greedy)
    compared: list = []
    for steps in (0, 60):
        state = fit(state, batch, steps)
        directory = tmp_path / str(len(compared))
        hf.save(directory, spec, state.params, None, tokenizer)
        compared += compare_greedy(torch, from_transformers(directory), grammar, query, *greedy(state.params, {}, query))
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
        compared.append((ended, transcript.OUTCOMES[int(lists.outcome[b, 0])]))
    return compared


# --------------------------------------------------------------------- round trip and refusals, without torch


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """(params, directory with several files) of a random untied model."""
    params = decoder.init(UNTIED, jax.random.key(0))
    folder = tmp_path_factory.mktemp("saved") / "model"
    hf.save(folder, UNTIED, params, None, tokenizer, max_file_bytes=200_000)
    return params, folder


@pytest.fixture
def broken(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved[1], tmp_path / "broken")


def set_fields(folder, **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "remove"}))


def refusal(call, *args):
    with pytest.raises(hf.ModelFilesError) as caught:
        call(*args)
    return str(caught.value)


def read(folder):
    return hf.read_spec(folder, **NUMERICS)


def test_round_trip(saved):
    params, folder = saved
    assert read(folder) == UNTIED._replace(init_std=0.02)
    assert same(params, hf.load(folder, UNTIED))
    assert hf.TENSORS.keys() == hf.flatten_dict(decoder.param_table(UNTIED), sep="/").keys()


def test_load_onto_shardings(saved):
    params, folder = saved
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = hf.load(folder, UNTIED, jax.tree.map(lambda _: sharding, decoder.shapes(UNTIED)))
    assert same(params, placed)
    assert all(x.sharding == sharding for x in jax.tree.leaves(placed))


@pytest.mark.parametrize(
    "fields, complaint",
    [
        ({"model_type": "llama"}, "model_type='llama' is not supported, only 'qwen3' is"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu' is"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds 'sliding_attention'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling={'type': 'yarn', 'factor': 4.0}"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4}}, "only unscaled rotary embedding"),
        ({"rope_theta": 1e6}, "contradicts itself: rope_parameters.rope_theta=50000.0, rope_theta=1000000.0"),
        ({"rope_theta": "remove", "rope_parameters": None}, "neither rope_theta nor rope_parameters.rope_theta"),
        ({"hidden_size": "remove"}, "has no field 'hidden_size'"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers='3' must be a positive integer"),
        ({"rms_norm_eps": -1}, "rms_norm_eps=-1 must be a positive number"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 31}, "head_dim=31 must be even"),
    ],
)
def test_configs_that_are_refused(broken, fields, complaint):
    set_fields(broken, **fields)
    assert complaint in refusal(read, broken)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": "remove", "rope_scaling": None},  # as transformers 4 writes
        {"rope_theta": "remove"},  # as transformers 5 writes
        {"layer_types": ["full_attention"] * 3, "sliding_window": None, "max_window_layers": 28},
    ],
)
def test_configs_that_are_the_same_model(broken, fields):
    set_fields(broken, **fields)
    assert read(broken) == UNTIED._replace(init_std=0.02)


def test_missing_directory_and_config(tmp_path):
    assert "nowhere is not a directory" in refusal(read, tmp_path / "nowhere")
    assert "nowhere is not a directory" in refusal(hf.load, tmp_path / "nowhere", SPEC)
    assert "config.json does not exist" in refusal(read, tmp_path)
    assert "holds neither model.safetensors nor" in refusal(hf.load, tmp_path, SPEC)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refusal(read, tmp_path)


def test_missing_truncated_and_damaged_files(broken):
    files = sorted(broken.glob("*.safetensors"))
    assert len(files) > 3
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-10])
    assert f"{files[1].name} is truncated or damaged" in refusal(hf.load, broken, UNTIED)
    files[1].write_bytes(whole[:5])
    assert f"{files[1].name} is truncated or damaged" in refusal(hf.load, broken, UNTIED)
    files[1].unlink()
    assert f"{files[1].name} is missing, but model.safetensors.index.json names it" in refusal(
        hf.load, broken, UNTIED
    )
    (broken / hf.INDEX).write_text('{"metadata": {}}')
    assert "has no weight_map" in refusal(hf.load, broken, UNTIED)


def rewrite(folder, change):
    """All tensors into one file, after `change` of the dict."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(path)
        path.unlink()
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / hf.SINGLE)


@pytest.mark.parametrize(
    "name, value, complaint",
    [
        ("model.layers.1.mlp.up_proj.weight", None, "has no tensor model.layers.1.mlp.up_proj.weight"),
        ("lm_head.weight", None, "has no tensor lm_head.weight (config.json says the embeddings are not tied)"),
        ("model.layers.3.mlp.up_proj.weight", (2, 2), "no place: model.layers.3.mlp.up_proj.weight"),
        ("model.layers.0.self_attn.q_proj.bias", (128,), "no place: model.layers.0.self_attn.q_proj.bias"),
        (
            "model.layers.2.self_attn.k_proj.weight",
            (64, 32),
            "tensor model.layers.2.self_attn.k_proj.weight has shape (64, 32), but config.json gives (64, 64)",
        ),
        ("model.norm.weight", np.zeros(64, np.int8), "model.norm.weight has type I8; supported are F32, F16, BF16"),
    ],
)
def test_tensors_that_are_refused(broken, name, value, complaint):
    def change(tensors):
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value if isinstance(value, np.ndarray) else np.zeros(value, np.float32)

    rewrite(broken, change)
    assert complaint in refusal(hf.load, broken, UNTIED)


def test_a_stored_tied_head_must_be_the_embedding(broken):
    set_fields(broken, tie_word_embeddings=True)
    spec = read(broken)
    assert spec.tie_embeddings
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(hf.load, broken, spec)
    rewrite(broken, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert "head" not in hf.load(broken, spec)


def test_save_replaces_nothing_and_leaves_nothing_half_written(saved, tokenizer, tmp_path):
    params, folder = saved
    before = sorted(p.name for p in folder.iterdir())
    assert "exists and is not empty" in refusal(hf.save, folder, UNTIED, params, None, tokenizer)
    assert sorted(p.name for p in folder.iterdir()) == before
    incomplete = {**params, "final_norm": None}
    with pytest.raises(AttributeError):
        hf.save(tmp_path / "new", UNTIED, incomplete, None, tokenizer)
    assert list(tmp_path.iterdir()) == []
