"""Every family of models against `transformers` on torch, from the same random checkpoint."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from bpe import train_bpe
from helpers import quick_jit, random_params

from fgrpo_jax.config import LoraConfig, ModelConfig
from fgrpo_jax.models import decoder, head, hf, lora, peft
from fgrpo_jax.models.decoder import DELTA, FULL, LOCAL
from fgrpo_jax.models.families import FAMILIES
from fgrpo_jax.models.lora import Lora
from fgrpo_jax.policies.llm import files
from fgrpo_jax.types import map_params

NUMERICS = {
    "dtype": "float32", "param_dtype": "float32", "remat": False, "attention": "auto", "logit_chunk": 64
}  # fmt: skip
SIZES = dict(
    vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, rms_norm_eps=1e-5, initializer_range=0.2, eos_token_id=1,
    pad_token_id=None,  # torch gives its embedding no gradient
)  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
# Name -> class of the configuration, what differs from SIZES, and the fields of the spec that tell.
CASES = {
    "qwen3": ("Qwen3Config", {"head_dim": 16, "rope_theta": 5e4}, {"head_dim": 16, "qk_norm": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True, "rope_theta": 5e4}, {"qkv_bias": True, "head_dim": 8}),
    "llama": (  # of the four frequencies one is kept, one is between, two are divided
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4} | LLAMA3},
        {"qk_norm": False, "rope_scaling": (8.0, 1.0, 4.0, 128.0)},
    ),
    "gemma 3": (  # windows shorter than prompts and than rollouts; the first layers and the last have one
        "Gemma3TextConfig",
        {
            "head_dim": 16, "num_hidden_layers": 4, "layer_types": [*([LOCAL] * 2), FULL, LOCAL], "sliding_window": 4,
            "query_pre_attn_scalar": 24, "rope_parameters": {
                FULL: {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
                LOCAL: {"rope_type": "default", "rope_theta": 1e3},
            },
        },
        {
            "post_norms": True, "norm_plus_one": True, "scale_embeddings": True, "activation": "gelu_pytorch_tanh",
            "pattern": (LOCAL, LOCAL, FULL), "window": 4, "query_scalar": 24.0, "rope_theta": 1e5,
            "rope_scaling": (4.0,), "local_rope_theta": 1e3, "tie_embeddings": True,
        },
    ),
    "qwen 3.5": (  # two repeats are scanned over, and one layer is left
        "Qwen3_5TextConfig",
        {
            "head_dim": 16, "num_hidden_layers": 5, "layer_types": [*([DELTA, FULL] * 2), DELTA],
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
            "linear_value_head_dim": 12, "rope_theta": 5e4, "initializer_range": 0.1,
        },
        {
            "pattern": (DELTA, FULL), "delta": (2, 4, 8, 12, 4), "attention_gate": True, "norm_plus_one": True,
            "rotary_fraction": 0.25, "rope_theta": 5e4, "tie_embeddings": False,
        },
    ),
}  # fmt: skip
LENGTHS = np.array([1, 5, 9])  # of 9: the first prompt is all padding but one token
GROUP, LENGTH, RATE = 2, 12, 0.003


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["one text"], SIZES["vocab_size"])


@pytest.fixture(scope="module", params=CASES)
def case(request, torch, tmp_path_factory):
    """(model, its directory, fields of the spec); norms are not one, biases not zero."""
    import transformers

    config, fields, expected = CASES[request.param]
    config = getattr(transformers, config)(**SIZES | fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(0.2 * torch.randn_like(weight))
            if name.endswith("A_log"):  # states that last
                weight.copy_(torch.log(0.02 + 0.3 * torch.rand_like(weight)))
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder, expected


def tokens():
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, SIZES["vocab_size"], (len(LENGTHS), LENGTHS.max()))
    actions = rng.integers(0, SIZES["vocab_size"], (len(LENGTHS), GROUP, LENGTH))
    return prompt, actions, rng.normal(size=actions.shape).astype(np.float32)


def torch_logits(torch, model, prompt, actions):
    """[B,G,T,V], every rollout read with its own prompt."""
    found = []
    for b, length in enumerate(LENGTHS):
        whole = [[*prompt[b, :length], *actions[b, g, :-1]] for g in range(GROUP)]
        found.append(model(torch.tensor(np.array(whole), dtype=torch.long)).logits[:, length - 1 :])
    return torch.stack(found)


def torch_loss(torch, logits, actions, weight):
    chosen = torch.log_softmax(logits, -1).gather(-1, torch.tensor(actions)[..., None])[..., 0]
    return (torch.tensor(weight) * chosen).sum()


@functools.partial(quick_jit, static_argnums=0)
def with_gradient(spec, params, prompt, actions, weight):
    """Logits [B,G,T,V], and the gradient of weighted log-probabilities of the actions."""

    def loss(params):
        hidden = decoder.completions(spec, params, prompt, jnp.asarray(LENGTHS), actions)
        return (weight * head.action_logprobs(spec, params, hidden, actions)).sum(), head.logits(params, hidden)

    return jax.grad(loss, has_aux=True)(params)


@functools.partial(quick_jit, static_argnums=0)
def decoded_logits(spec, params, prompt_BS, actions_BGT):
    """The same logits, from one decoding step after the other."""
    cache_of_prompt = decoder.prefill(spec, params, prompt_BS, jnp.asarray(LENGTHS))
    weights = decoder.unstack(spec, params, actions_BGT[..., 0].size)
    last_B = jnp.take_along_axis(prompt_BS, jnp.asarray(LENGTHS)[:, None] - 1, 1)

    def step(carry, t):
        token, cache = carry
        hidden, cache = decoder.decode_step(spec, weights, cache_of_prompt, cache, token, t)
        return (actions_BGT[..., t], cache), head.logits(weights, hidden)

    first = jnp.broadcast_to(last_B, actions_BGT.shape[:2]), decoder.empty_cache(spec, *actions_BGT.shape)
    _, logits_TBGV = jax.lax.scan(step, first, jnp.arange(actions_BGT.shape[-1]))
    return jnp.moveaxis(logits_TBGV, 0, 2)


def saved(folder, spec, params, original, tokenizer):
    """The tensors of an export, by their names in a checkpoint."""
    hf.save(folder, spec, params, original, tokenizer)
    return safetensors.numpy.load_file(folder / hf.SINGLE)


def test_logits_gradients_and_a_step_equal_transformers(torch, case, tokenizer, tmp_path):
    import transformers

    model, folder, expected = case
    spec = hf.read_spec(folder, **NUMERICS)
    assert {name: getattr(spec, name) for name in expected} == expected
    params, (prompt, actions, weight) = hf.load(folder, spec), tokens()
    gradient, logits = with_gradient(spec, params, prompt, actions, weight)
    theirs = torch_logits(torch, model, prompt, actions)
    np.testing.assert_allclose(logits, theirs.detach().numpy(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(decoded_logits(spec, params, prompt, actions), logits, atol=1e-4, rtol=0)

    model.zero_grad()
    torch_loss(torch, theirs, actions, weight).backward()
    gradients = {name: x.grad.numpy() for name, x in model.named_parameters()}
    ours = saved(tmp_path / "gradient", spec, gradient, hf.read_config(folder), tokenizer)
    assert ours.keys() == gradients.keys()
    for name, x in gradients.items():
        assert np.abs(x).max() > 0.01, name
        np.testing.assert_allclose(ours[name], x, rtol=1e-4, atol=1e-4 * np.abs(x).max(), err_msg=name)

    optimizer = optax.adam(RATE, eps=1e-2)  # so that a step is smooth in the gradient
    stepped = optax.apply_updates(params, optimizer.update(gradient, optimizer.init(params))[0])
    hf.save(tmp_path / "stepped", spec, stepped, hf.read_config(folder), tokenizer)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    torch.optim.Adam(model.parameters(), RATE, eps=1e-2).step()
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stepped").eval()
    with torch.no_grad():
        one, other = (torch_logits(torch, m, prompt, actions).numpy() for m in (model, back))
    model.load_state_dict(before)
    assert np.abs(one - logits).max() > 0.5
    np.testing.assert_allclose(other, one, atol=1e-4, rtol=0)


def test_bfloat16_is_as_far_from_float32_as_in_torch(torch, case):
    """Of weights that bfloat16 holds; both round at other places, so within a factor of two."""
    import transformers

    _, folder, _ = case
    prompt, actions, weight = tokens()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        theirs = torch_logits(torch, model, prompt, actions).float().numpy()
        exact = torch_logits(torch, model.float(), prompt, actions).numpy()
    spec = hf.read_spec(folder, **NUMERICS | {"dtype": "bfloat16", "param_dtype": "bfloat16"})
    params = hf.load(folder, spec)
    gradient, ours = with_gradient(spec, params, prompt, actions, weight)
    of_steps = decoded_logits(spec, params, prompt, actions)
    their_error, *our_errors = (np.abs(x - exact).mean() for x in (theirs, ours, of_steps))
    assert 0.001 < their_error < 0.1 * exact.std() and max(our_errors) < 2 * their_error, (their_error, our_errors)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(gradient))


def test_what_is_read_is_what_is_written(torch, case, tokenizer, tmp_path):
    """Weights bit for bit, and the model that config.json says, with the original's config and without."""
    import transformers

    model, folder, _ = case
    spec = hf.read_spec(folder, **NUMERICS)
    params, (prompt, actions, _) = hf.load(folder, spec), tokens()
    for name, original in (("kept", hf.read_config(folder)), ("new", None)):
        hf.save(tmp_path / name, spec, params, original, tokenizer)
        assert hf.read_spec(tmp_path / name, **NUMERICS) == spec
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert type(back) is type(model)
        assert all(torch.equal(x, back.state_dict()[key]) for key, x in model.state_dict().items())
        with torch.no_grad():
            one, other = (torch_logits(torch, m, prompt, actions) for m in (model, back))
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_adapters_of_every_weight_are_what_peft_loads(torch, case, tokenizer, tmp_path):
    """On every projection that a family has, and merged: logits equal to peft's on transformers' model."""
    import transformers

    library = pytest.importorskip("peft", reason="the parity extra is not installed")
    _, folder, _ = case
    known = typing.get_args(typing.get_args(typing.get_type_hints(LoraConfig)["projections"])[0])
    plain = hf.read_spec(folder, **NUMERICS)
    spec = plain._replace(lora=Lora(3, 5.0, known))
    base, table = hf.load(folder, plain), lora.split(decoder.param_table(spec))[1]
    assert table["layers"].keys() == {name for name in known if name in decoder.param_table(plain)["layers"]}
    rng = np.random.default_rng(0)
    adapters = map_params(lambda p: jnp.asarray(0.1 * rng.normal(size=p.shape), "float32"), table)
    peft.save(tmp_path / "adapter", spec, adapters, str(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model = library.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()

    prompt, actions, weight = tokens()
    with torch.no_grad():
        theirs = torch_logits(torch, model, prompt, actions).numpy()
    _, ours = with_gradient(spec, lora.join(base, adapters, spec.lora), prompt, actions, weight)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    hf.save(tmp_path / "merged", plain, lora.join(base, adapters, spec.lora), None, tokenizer)
    _, merged = with_gradient(plain, hf.load(tmp_path / "merged", plain), prompt, actions, weight)
    np.testing.assert_allclose(merged, theirs, atol=1e-4, rtol=0)
    _, bare = with_gradient(plain, base, prompt, actions, weight)
    assert np.abs(bare - ours).max() > 0.5


# --------------------------------------------------------------------- the table


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_of_a_family_are_exported_as_that(family, tokenizer, tmp_path):
    spec = files.make_spec(ModelConfig(family=family), SIZES["vocab_size"], tmp_path)
    tensors = saved(tmp_path / "out", spec, random_params(spec), None, tokenizer)
    config = hf.read_config(tmp_path / "out")
    assert config["model_type"] == family and config["architectures"] == [FAMILIES[family].architecture]
    assert hf.read_spec(tmp_path / "out", **NUMERICS | {"logit_chunk": 4096, "rows_first": True}) == spec._replace(
        attention="auto"
    )
    assert all((x == 0).all() for name, x in tensors.items() if name.endswith("proj.bias"))
    assert sum(x.size for x in tensors.values()) == decoder.num_params(spec)


def test_families_are_told_apart_by_their_specs():
    assert typing.get_args(typing.get_type_hints(ModelConfig)["family"]) == tuple(FAMILIES)
    rows = [family.spec for family in FAMILIES.values()]
    assert all(row.keys() == rows[0].keys() for row in rows) and len({tuple(row.values()) for row in rows}) == len(rows)
    bare = decoder.DecoderSpec(8, 8, 2, 1, 1, 8, 8, tie_embeddings=False, pattern=(DELTA, FULL), delta=(1, 1, 1, 1, 1))
    every = [hf.flatten_dict(decoder.param_table(bare._replace(**row)), sep="/") for row in rows]
    assert hf.TENSORS.keys() <= set().union(*every)


def test_a_model_of_no_family_is_not_exported(tokenizer, tmp_path):
    spec = decoder.DecoderSpec(300, 8, 1, 1, 1, 8, 8, qk_norm=True, qkv_bias=True)
    with pytest.raises(hf.ModelFilesError, match="no family with qk_norm=True, qkv_bias=True"):
        hf.save(tmp_path / "out", spec, random_params(spec), None, tokenizer)


def test_weights_of_another_family_are_refused(tokenizer, tmp_path):
    spec = decoder.DecoderSpec(300, 8, 1, 1, 1, 8, 8)
    hf.save(tmp_path / "out", spec, random_params(spec), None, tokenizer)
    with pytest.raises(hf.ModelFilesError, match="no place: model.layers.0.self_attn.k_norm.weight"):
        hf.load(tmp_path / "out", spec._replace(qk_norm=False))
