"""config.json of every family: what is refused, by field and value, and what may be left out."""

import json

import pytest
from test_families import LLAMA3, NUMERICS

from fgrpo_jax.models import decoder, hf
from fgrpo_jax.models.decoder import DELTA, FULL, LOCAL

BASE = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True, "vocab_size": 300,
}  # fmt: skip


GEMMA = {"head_dim": 16, "sliding_window": 512}


def spec_of(folder, fields):
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (BASE | fields).items() if v != "remove"}))
    return hf.read_spec(folder, **NUMERICS)


@pytest.mark.parametrize(
    "family, fields, complaint",
    [
        ("llama", {"attention_bias": True}, "attention_bias=True is not supported, only False is"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True is not supported, only False is"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu' is"),
        ("llama", {"sliding_window": 16}, "sliding_window=16 is not supported, leave it out"),
        ("llama", {"attn_logit_softcapping": 50}, "attn_logit_softcapping=50 is not supported, leave it out"),
        ("llama", {"final_logit_softcapping": 30}, "final_logit_softcapping=30 is not supported, leave it out"),
        ("llama", {"logit_scale": 0.0625}, "logit_scale=0.0625 is not supported, only 1 is"),
        ("llama", {"num_local_experts": 8}, "num_local_experts=8 is not supported, only 0 is"),
        ("qwen3", {"num_experts": 128}, "num_experts=128 is not supported, only 0 is"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias=True is not supported, only False is"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported, only 1.0 is"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'rope_type': 'dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "has no low_freq_factor"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scaling.factor=0 must be a positive"),
        (
            "llama",
            {"rope_scaling": LLAMA3 | {"rope_type": "llama3", "low_freq_factor": 4.0}},
            "high_freq_factor must exceed low_freq_factor",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "contradicts itself: rope_parameters=(), rope_scaling=(2.0,)",
        ),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True is not supported, only False is"),
        ("qwen2", {"num_key_value_heads": None}, "num_key_value_heads=None must be a positive integer"),
        ("qwen2", {"hidden_size": 4, "num_attention_heads": 8}, "head_dim=0 must be a positive integer"),
        ("qwen3", {}, "has no field 'head_dim'"),
        ("gemma3_text", {}, "has no field 'head_dim'"),
        ("gemma3_text", GEMMA | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        ("gemma3_text", GEMMA | {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
        ("gemma3_text", GEMMA | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not"),
        ("gemma3_text", GEMMA | {"hidden_activation": "relu"}, "hidden_activation='relu' is not supported, only 'gelu"),
        ("gemma3_text", GEMMA | {"sliding_window": None}, "sliding_window=None must be a positive integer"),
        ("gemma3_text", GEMMA | {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0 must be a positive number"),
        ("gemma3_text", GEMMA | {"layer_types": [FULL, "linear_attention"]}, "layer_types holds 'linear_attention'"),
        ("gemma3_text", GEMMA | {"layer_types": [FULL]}, "layer_types are 1, num_hidden_layers=2"),
        ("gemma3_text", GEMMA | {"layer_types": FULL}, "layer_types='full_attention' must be a list"),
        ("gemma3_text", GEMMA | {"sliding_window_pattern": 0}, "sliding_window_pattern=0 must be a positive integer"),
        ("gemma3_text", GEMMA | {"rope_parameters": {"rope_theta": 1e4}}, "must be of full_attention and of sliding"),
        (
            "gemma3_text",
            GEMMA | {"rope_parameters": {FULL: {}, LOCAL: {"rope_type": "linear", "factor": 8.0}}},
            "rope_type of sliding_attention must be 'default'",
        ),
        (
            "gemma3_text",
            GEMMA | {"rope_parameters": {FULL: {"rope_theta": 2.0}, LOCAL: {}}},
            "contradicts itself: rope_parameters.full_attention.rope_theta=2.0, rope_theta=10000.0",
        ),
    ],
)
def test_configs_that_are_refused(tmp_path, family, fields, complaint):
    with pytest.raises(hf.ModelFilesError) as caught:
        spec_of(tmp_path, {"model_type": family} | fields)
    assert complaint in str(caught.value)


def test_what_asks_for_nothing_is_let_be(tmp_path):
    """A window that is not used, as in published Qwen2.5; nulls, and a scale of one."""
    qwen2 = {"model_type": "qwen2", "sliding_window": 131_072, "use_sliding_window": False}
    assert spec_of(tmp_path, qwen2).window == 0
    nothing = {"sliding_window": None, "attn_logit_softcapping": None, "logit_scale": 1.0, "num_experts": 0}
    assert spec_of(tmp_path, {"model_type": "llama"} | nothing) == spec_of(tmp_path, {"model_type": "llama"})


def test_what_config_json_may_leave_out(tmp_path):
    left_out = {"num_key_value_heads": None, "rope_theta": "remove", "tie_word_embeddings": "remove"}
    spec = spec_of(tmp_path, {"model_type": "llama", "head_dim": None} | left_out)
    assert (spec.head_dim, spec.num_kv_heads, spec.rope_theta, spec.tie_embeddings) == (8, 4, 10_000.0, False)


def test_gemma_as_transformers_4_writes_it(tmp_path):
    """One layer in sliding_window_pattern sees everything; thetas of their own, which it may leave out."""
    fields = GEMMA | {"model_type": "gemma3_text", "num_hidden_layers": 8, "tie_word_embeddings": "remove"}
    given = {"rope_theta": 5e5, "rope_local_base_freq": 3e3, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    spec = spec_of(tmp_path, fields | given | {"sliding_window_pattern": 3, "query_pre_attn_scalar": 16})
    assert decoder.layer_kinds(spec) == (LOCAL, LOCAL, FULL) * 2 + (LOCAL, LOCAL) and spec.query_scalar is None
    assert (spec.rope_theta, spec.rope_scaling, spec.local_rope_theta) == (5e5, (8.0,), 3e3)
    spec = spec_of(tmp_path, fields | {"rope_theta": "remove"})
    assert spec.pattern == (LOCAL,) * 5 + (FULL,) and spec.window == 512 and spec.tie_embeddings
    assert (spec.rope_theta, spec.rope_scaling, spec.local_rope_theta) == (1e6, (), 1e4)


HYBRID = {"model_type": "qwen3_5_text", "head_dim": 16, "linear_conv_kernel_dim": 4, "linear_num_key_heads": 2}
HYBRID |= {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12}


@pytest.mark.parametrize(
    "fields, complaint",
    [
        ({"linear_key_head_dim": "remove"}, "has no field 'linear_key_head_dim'"),
        ({"linear_num_value_heads": 3}, "linear_num_value_heads=3 is not a multiple of linear_num_key_heads=2"),
        ({"head_dim": 20}, "head_dim=20 times partial_rotary_factor=0.25 must be even"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor=[1.5] must be one number up to 1"),
        ({"layer_types": [FULL, LOCAL]}, "layer_types holds 'sliding_attention'; only 'linear_attention' or 'full"),
        ({"attention_bias": True}, "attention_bias=True is not supported, only False is"),
        ({"attn_output_gate": False}, "attn_output_gate=False is not supported, only True is"),
        ({"sliding_window": 16}, "sliding_window=16 is not supported, leave it out"),
        ({"full_attention_interval": "4"}, "full_attention_interval='4' must be a positive integer"),
    ],
)
def test_hybrids_that_are_refused(tmp_path, fields, complaint):
    with pytest.raises(hf.ModelFilesError) as caught:
        spec_of(tmp_path, HYBRID | fields)
    assert complaint in str(caught.value)


def test_one_layer_in_four_attends(tmp_path):
    spec = spec_of(tmp_path, HYBRID | {"num_hidden_layers": 8})
    assert spec.pattern == (DELTA, DELTA, DELTA, FULL) and decoder.holders(spec, "q") == (3, 7)
    assert spec_of(tmp_path, HYBRID | {"full_attention_interval": 2}).pattern == (DELTA, FULL)
