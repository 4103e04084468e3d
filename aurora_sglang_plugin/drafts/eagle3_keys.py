"""What each key of a draft's config.json must hold for SGLang 0.5.23 to read it, and for the
trainer to compute it.

A key that SGLang never reads is not looked at, unless transformers would refuse its value. This
module imports neither torch nor sglang.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from aurora_sglang_plugin.drafts.tensor_files import shown

ARCHITECTURE = "LlamaForCausalLMEagle3"
# model_type -> what transformers takes for absent keys, which speculators leaves out where it is
# so. It reads what is written out in the same way for all of these, and SGLang builds the same
# Llama layer from it; other families add something of their own.
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
LATENT = (7168, 18432, 61, 128, 129280, 4096)


def _sizes(*sizes: int, **more: Any) -> dict[str, Any]:
    return dict(zip(SIZES, sizes, strict=True)) | more


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _sizes(4096, 11008, 32, 32, 32000, 2048),
    "qwen2": _sizes(4096, 22016, 32, 32, 151936, 32768, num_key_value_heads=32),
    "qwen2_moe": _sizes(2048, 5632, 24, 16, 151936, 32768, num_key_value_heads=16),
    "qwen3": _sizes(4096, 22016, 32, 32, 151936, 32768, num_key_value_heads=32, head_dim=128),
    "qwen3_moe": _sizes(2048, 6144, 24, 32, 151936, 32768, num_key_value_heads=4),
    "mistral": _sizes(4096, 14336, 32, 32, 32000, 131072, num_key_value_heads=8),
    "mixtral": _sizes(
        4096, 14336, 32, 32, 32000, 131072, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6
    ),
    "phi3": _sizes(
        3072, 8192, 32, 32, 32064, 4096, rms_norm_eps=1e-5, original_max_position_embeddings=4096
    ),
    "deepseek_v3": _sizes(*LATENT, num_key_value_heads=128, head_dim=64),
    "kimi_k2": _sizes(*LATENT, num_key_value_heads=128, head_dim=64),
}
# what shapes follow from
SHAPED = (
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "num_hidden_layers",
)
NESTED = ("text_config", "llm_config", "language_config", "thinker_config")

COUNT, COUNT_OR_NULL = "a positive integer", "a positive integer or null"
FLAG, SWITCH = "true or false", "true, false or null"
INTEGER, SMALL = (
    "an integer or null",
    "a number above 0 written with a point or exponent, like 1e-06",
)
DTYPES = ("float32", "float16", "bfloat16", "torch.float32", "torch.float16", "torch.bfloat16")
KINDS: dict[str, Callable[[Any], bool]] = {
    COUNT: lambda v: type(v) is int and v > 0,
    COUNT_OR_NULL: lambda v: v is None or (type(v) is int and v > 0),
    FLAG: lambda v: type(v) is bool,
    SWITCH: lambda v: v is None or type(v) is bool or v in (0, 1),
    INTEGER: lambda v: v is None or type(v) is int,
    SMALL: lambda v: type(v) is float and 0 < v < math.inf,
    "an integer, a list of them, or null": lambda v: (
        v is None or type(v) is int or (isinstance(v, list) and all(type(i) is int for i in v))
    ),
    "a number or null": lambda v: v is None or type(v) in (int, float),
    "a number from 0 to 1 written with a point": lambda v: type(v) is float and 0 <= v <= 1,
    "an object": lambda v: isinstance(v, dict),
    "the name of a dtype": lambda v: v is None or (isinstance(v, str) and v in DTYPES),
}
# What a key must hold where it is there. The last lines are of keys that SGLang does not read and
# transformers checks.
TYPES = {
    **dict.fromkeys((*SHAPED, "vocab_size", "max_position_embeddings", "target_hidden_size"),
    COUNT),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "num_aux_hidden_states"), COUNT_OR_NULL),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias"), FLAG),
    **dict.fromkeys(("bias", "fc_norm", "use_aux_norm", "norm_before_fc", "norm_output"), SWITCH),
    "rms_norm_eps": SMALL,
    **dict.fromkeys(("dtype", "torch_dtype"), "the name of a dtype"),
    **dict.fromkeys(("mlp_bias", "use_cache"), FLAG),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "pretraining_tp"), INTEGER),
    "eos_token_id": "an integer, a list of them, or null",
    "attention_dropout": "a number or null",
    "initializer_range": "a number from 0 to 1 written with a point",
    "auto_map": "an object",
}  # fmt: skip
# read by eagle3_rope.py
ROPE = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
)


def read_keys(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(values of the keys that hold what they must, nulls and wrong ones left out; a sentence for
    each problem).

    Absent keys of a family other than Llama have the family's defaults.
    """
    kind = raw.get("model_type")
    values = {**(FAMILIES.get(kind, {}) if isinstance(kind, str) else {}), **raw}
    problems = _kind_problems(raw, values)
    usable = {}
    for key, wanted in TYPES.items():
        if key in values and not fits(wanted, values[key]):
            problems.append(f"config.json has {key} = {shown(values[key])}, expected {wanted}.")
        elif values.get(key) is not None:
            usable[key] = values[key]
    return {key: values[key] for key in ROPE if key in values} | usable, problems


def fits(wanted: str, value: Any) -> bool:
    """Whether `value` is what the text `wanted`, a key of KINDS, says."""
    return KINDS[wanted](value)


def _kind_problems(raw: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """What another kind of model, or another computation, would be."""
    problems = []
    found = raw.get("architectures")
    if not isinstance(found, list) or found[:1] != [ARCHITECTURE]:
        problems.append(
            f"architectures is {shown(found)}, expected {[ARCHITECTURE]}: not an EAGLE3 draft."
        )
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        problems.append(
            f"config.json has model_type = {shown(kind)}; expected one of {', '.join(FAMILIES)}, "
            "which SGLang reads as "
            "they are written. Where the draft is a Llama layer, say llama."
        )
    problems += [
        f"config.json nests a model in {key}, which SGLang would read in its stead; expected the "
        "draft's keys alone."
        for key in NESTED
        if key in raw
    ]
    if raw.get("hidden_act", "silu") != "silu":
        problems.append(
            f"config.json has hidden_act = {shown(raw['hidden_act'])}; this trainer computes only "
            "'silu'."
        )
    if raw.get("tie_word_embeddings") is True:
        problems.append("tie_word_embeddings is true; expected false and a head in lm_head.weight.")
    for key in ("quantization_config", "compression_config"):
        if raw.get(key) is not None:
            problems.append(
                f"config.json has {key}: a quantized draft. Expected float tensors, and no such "
                "key."
            )
    if raw.get("norm_before_residual"):
        problems.append(
            "norm_before_residual is true: a computation of speculators that SGLang's draft lacks "
            "(it adds the state "
            "as it came)."
        )
    factor = raw.get("partial_rotary_factor", 1)
    if type(factor) not in (int, float) or factor != 1:
        problems.append(
            f"config.json has partial_rotary_factor = {shown(factor)}; this trainer computes only "
            "1, all of a head."
        )
    if not raw.get("rope_is_neox_style", True) or not isinstance(
        raw.get("rope_is_neox_style", True), bool | int
    ):
        problems.append(
            f"config.json has rope_is_neox_style = {shown(raw['rope_is_neox_style'])}; this "
            "trainer computes only true."
        )
    cap = raw.get("final_logit_softcapping")
    if cap is not None and (type(cap) not in (int, float) or cap > 0):
        problems.append(
            f"config.json has final_logit_softcapping = {shown(cap)}, which this trainer does not "
            "compute."
        )
    layers, types = values.get("num_hidden_layers"), raw.get("layer_types")
    listed = (
        isinstance(types, list) and len(types) == layers and all(isinstance(t, str) for t in types)
    )
    if types is not None and not listed:
        problems.append(
            f"config.json has layer_types = {shown(types)}, which transformers refuses for "
            f"{shown(layers)} layers; "
            "`aurora-trainer import` leaves it out."
        )
    return problems
