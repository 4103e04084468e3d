"""What a target's config.json says of its language model, checked before anything goes by it.

Imports no torch, and transformers only where a config leaves out what its family's defaults say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aurora_sglang_plugin.drafts.eagle3_rope import nested
from aurora_sglang_plugin.drafts.tensor_files import shown

OF_THE_WHOLE = (
    "eos_token_id",
    "dtype",
    "torch_dtype",
    "tie_word_embeddings",
    "quantization_config",
)
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# what else a draft's shape follows from; a config inside another one leaves out what its family's
# defaults say
SHAPES = (
    "intermediate_size",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
)
ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
# LongCat's names
ALIASES = {"num_hidden_layers": "num_layers", "intermediate_size": "ffn_hidden_size"}

COUNT, NUMBER, OBJECT = "a positive integer", "a positive number", "an object"
HOLDS: dict[str, Callable[[Any], bool]] = {
    COUNT: lambda v: type(v) is int and v > 0,
    NUMBER: lambda v: type(v) in (int, float) and 0 < v < math.inf,
    OBJECT: lambda v: isinstance(v, dict),
    "true or false": lambda v: type(v) is bool,
    "a text": lambda v: isinstance(v, str),
    "a list of texts": lambda v: isinstance(v, list) and all(isinstance(i, str) for i in v),
}
# what a key must hold where it is there; null is as good as absent
TYPES = {
    **dict.fromkeys((*NEEDED, "intermediate_size", "num_key_value_heads", "head_dim"), COUNT),
    **dict.fromkeys(("v_head_dim", "kv_lora_rank", "max_position_embeddings"), COUNT),
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), NUMBER),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config"), OBJECT),
    **dict.fromkeys(("tie_word_embeddings", "use_gemma_norm"), "true or false"),
    **dict.fromkeys(("model_type", "dtype", "torch_dtype"), "a text"),
    **dict.fromkeys(("hidden_act", "hidden_activation", "norm_type"), "a text"),
    "architectures": "a list of texts",
}

# Families whose norms are y = x * (1 + w) in SGLang 0.5.23 (GemmaRMSNorm, Gemma3RMSNorm, or one
# added when the weights are loaded); Gemma 3n and Gemma 4 multiply by w. Underscores, _text and
# _moe are left out. tests/trainer/drafts/test_eagle3_init_norms.py reads SGLang's own models.
ZERO_CENTRED = (
    "gemma", "gemma2", "gemma3", "vaultgemma", "recurrentgemma", "qwen3next", "qwen35", "qwen4exp",
    "interns2mobius", "step3p5", "step3p7", "musespark", "museglimmer", "gigachat35",
)  # fmt: skip
# whose last norm, unlike its others, multiplies by w
PLAIN_LAST_NORM = ("museglimmer",)


def language_model_config(file: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the language model in `file`, which holds `raw`: with what the whole says of
    it, and what its family's defaults say where it stands inside another config.

    Raises ValueError with everything that is wrong.
    """
    inner = raw.get("text_config", raw) if "hidden_size" not in raw else raw
    if not isinstance(inner, dict):
        raise ValueError(
            f"{file} has a text_config that is no object; expected the config of a language model"
        )
    config = dict(inner)
    for key, alias in ALIASES.items():
        if config.get(key) is None and config.get(alias) is not None:
            config[key] = config[alias]
    whole = {}
    # what the whole says of the language model
    if inner is not raw:
        whole = {k: raw[k] for k in OF_THE_WHOLE if raw.get(k) is not None}
    _check(file, whole | config)
    expected = NEEDED if inner is raw else (*NEEDED, *SHAPES)
    if config and any(config.get(k) is None for k in expected):
        config = _with_defaults(config, whole)
    config = whole | config
    missing = [k for k in NEEDED if config.get(k) is None]
    if missing and config:
        raise ValueError(
            f"{file} lacks {', '.join(missing)}; expected the config of a language model"
        )
    if inner is not raw:
        # by which SGLang chooses the model
        config["architectures"] = raw.get("architectures")
    return config


def is_zero_centred(config: Mapping[str, Any], name: str) -> bool:
    """Whether SGLang multiplies by one more than the norm weight `name` of this target, e.g.
    model.norm.weight.
    """
    if config.get("use_gemma_norm"):
        return True
    # GigaChat 3.5 names its norm; absent, it is the zero-centred one
    if config.get("norm_type") is not None:
        return config["norm_type"].startswith("ZeroCentered")
    architectures = config.get("architectures") or []
    stems = {_stem(n) for n in (config.get("model_type"), *architectures) if n}
    if name == "model.norm.weight" and stems.intersection(PLAIN_LAST_NORM):
        return False
    return not stems.isdisjoint(ZERO_CENTRED)


def block_sizes(quantization: Mapping[str, Any]) -> list[list[int]]:
    """[rows, columns] that share a scale, of all that a quantization_config names."""
    groups = quantization.get("config_groups")
    said = [quantization.get("weight_block_size")]
    for group in groups.values() if isinstance(groups, dict) else []:
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            said += [weights.get("block_structure"), [1, weights.get("group_size")]]
    return [
        block
        for block in said
        if isinstance(block, list) and len(block) == 2
        and all(type(n) is int and n > 0 for n in block)
    ]  # fmt: skip


def _stem(name: str) -> str:
    """qwen35 of qwen3_5_moe_text and of Qwen3_5MoeForCausalLM."""
    bare = name.split("For")[0].lower().replace("_", "")
    return bare.removesuffix("text").removesuffix("moe")


def _check(file: Path, config: Mapping[str, Any]) -> None:
    wrong = [
        f"{key} = {shown(config[key])}, expected {wanted}"
        for key, wanted in TYPES.items()
        if config.get(key) is not None and not HOLDS[wanted](config[key])
    ]
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        for one in [rope, *nested(rope).values()] if isinstance(rope, dict) else []:
            theta = one.get("rope_theta")
            if theta is not None and not HOLDS[NUMBER](theta):
                wrong.append(f"{key}.rope_theta = {shown(theta)}, expected {NUMBER}")
    if wrong:
        raise ValueError(
            f"{file} has {'; '.join(wrong)}: no config of a language model that a draft can be"
            " made for. Correct it, or download the model's config.json again"
        )


def _with_defaults(config: dict[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers, and so the server, completes it; as it is for a family that it does not
    know.
    """
    from transformers import CONFIG_MAPPING

    try:
        full = CONFIG_MAPPING[config["model_type"]].from_dict(config).to_dict()
    except Exception:
        # one that transformers refuses too is told what it lacks
        return config
    # which transformers has put together
    moved = ROPE if full.get("rope_parameters") else ()
    kept = {k: v for k, v in config.items() if v is not None and k not in moved}
    return {k: v for k, v in full.items() if v is not None and k not in whole} | kept
