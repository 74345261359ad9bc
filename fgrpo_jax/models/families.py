"""In what model families differ: rows of a table, in the terms of the decoder and of config.json.

A family is nothing else than its row: the decoder reads fields of its spec and never a name, and a spec
belongs to the family whose row it agrees with.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Family(NamedTuple):
    """A `model_type` of transformers.

    architecture: the class that loads it there.
    spec: fields of DecoderSpec that its models have in common; every other family has another value of one.
    fixed: fields of config.json, and the values of them that are computed; the first is what an export writes.
    optional: what config.json may leave out, with its value; None: follows from the sizes, see hf_config.
    pattern: the kinds of layers that it may have, in the order that repeats where config.json names none.
    """

    architecture: str
    spec: dict[str, Any]
    fixed: dict[str, tuple]
    optional: dict[str, Any]
    pattern: tuple[str, ...] = ("full_attention",)


_PLAIN = {
    "qk_norm": False,
    "qkv_bias": False,
    "activation": "silu",
    "norm_plus_one": False,
    "post_norms": False,
    "scale_embeddings": False,
    "attention_gate": False,
}

FAMILIES = {
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _PLAIN | {"qk_norm": True},
        {"hidden_act": ("silu",), "attention_bias": (False, None), "use_sliding_window": (False, None)},
        {},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _PLAIN | {"qkv_bias": True},
        {"hidden_act": ("silu",), "use_sliding_window": (False, None)},
        {"head_dim": None},
    ),
    "llama": Family(
        "LlamaForCausalLM",
        _PLAIN,
        {
            "hidden_act": ("silu",),
            "attention_bias": (False, None),
            "sliding_window": (None,),
        },
        {"head_dim": None, "num_key_value_heads": None, "rope_theta": 10_000.0, "tie_word_embeddings": False},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _PLAIN
        | {
            "qk_norm": True,
            "activation": "gelu_pytorch_tanh",
            "norm_plus_one": True,
            "post_norms": True,
            "scale_embeddings": True,
        },
        {
            "hidden_activation": ("gelu_pytorch_tanh",),
            "attention_bias": (False, None),
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "tie_word_embeddings": True},
        ("sliding_attention",) * 5 + ("full_attention",),
    ),
    "qwen3_5_text": Family(
        "Qwen3_5ForCausalLM",
        _PLAIN | {"qk_norm": True, "norm_plus_one": True, "attention_gate": True},
        {
            "hidden_act": ("silu",),
            "attention_bias": (False, None),
            "attn_output_gate": (True, None),
            "sliding_window": (None,),
        },
        {"partial_rotary_factor": 0.25},
        ("linear_attention",) * 3 + ("full_attention",),
    ),
}
