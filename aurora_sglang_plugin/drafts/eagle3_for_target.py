"""The shape of an untrained draft for a target, from the target's config alone: trainer and server
come to the same one, also if no draft exists yet.

This module imports neither torch nor sglang.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from aurora_sglang_plugin.drafts.aux_layers import ids_that_name
from aurora_sglang_plugin.drafts.eagle3_config import DraftConfig, read_draft_config
from aurora_sglang_plugin.drafts.eagle3_rope import nested, read_rope

Kind = Literal["random", "target"]
# tokens that a draft can propose, if nothing else is said: its head costs as much as its layer
DRAFT_VOCAB = 32_768


def head_dim(target: Mapping[str, Any]) -> int:
    """Of a draft's attention; a latent (MLA) target has one for its values only."""
    own = target.get("v_head_dim") if "kv_lora_rank" in target else target.get("head_dim")
    return own or target["hidden_size"] // target["num_attention_heads"]


def is_mixture(target: Mapping[str, Any]) -> bool:
    """Of experts: its layers have no dense MLP, and its intermediate_size may be an expert's."""
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    return any(target.get(key) for key in keys)


def first_config(target: dict[str, Any]) -> DraftConfig:
    """Of the draft that is made if none is given."""
    return draft_config(target)


def default_aux_layer_ids(num_layers: int) -> tuple[int, ...]:
    """Three layers whose outputs are features: SGLang's own choice, or low, middle and last for a
    shallow target.
    """
    if num_layers >= 8:
        return (1, num_layers // 2 - 1, num_layers - 4)
    # the last layer's output is never captured
    last = num_layers - 2
    return tuple(sorted({0, last // 2, last}))


def draft_config(
    target: dict[str, Any],
    draft_vocab_size: int | None = None,
    aux_layer_ids: tuple[int, ...] | None = None,
    kv_heads: int | None = None,
    eagle31: bool = False,
    kind: Kind = "target",
) -> DraftConfig:
    """`target` is its (text) config. One layer with its widths and heads; of kind "target" with a
    norm for each feature and as many key heads as hold the embedding. Raises ValueError.

    draft_vocab_size: None for DRAFT_VOCAB of them, or all if there are fewer.
    Where the target has none of its own to go by: an MLP of 3 H where the target's experts are
    narrower than that is useful, 8 key heads for latent attention, and no rope scaling for a
    scaling that the trainer does not compute.
    eagle31: the shape of EAGLE 3.1, one norm over all features before fc, and the normed state
        handed on.
    """
    # null is as good as absent
    raw = {key: value for key, value in target.items() if value is not None}
    draft_vocab_size = draft_vocab_size or min(DRAFT_VOCAB, raw["vocab_size"])
    inner = raw.get("intermediate_size") or 0
    if not inner or (is_mixture(target) and inner < 2 * raw["hidden_size"]):
        inner = 3 * raw["hidden_size"]
    if "kv_lora_rank" in raw:
        raw["num_key_value_heads"] = min(8, raw["num_attention_heads"])
    by_layer_type = nested(raw.get("rope_parameters") or {})
    if by_layer_type:
        raw["rope_parameters"] = by_layer_type.get(
            "full_attention", next(iter(by_layer_type.values()))
        )
    theta, scaling, _ = read_rope(raw)
    layers, heads = raw["num_hidden_layers"], raw["num_attention_heads"]
    chosen, kv_heads = kv_heads, kv_heads or raw.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(
            f"--kv-heads {kv_heads}: expected a divisor of the target's {heads} attention heads"
        )
    outputs = tuple(aux_layer_ids or default_aux_layer_ids(layers))
    if len(outputs) < 2:
        raise ValueError(f"aux layers {outputs}: expected two or more different ids, ascending")
    ids = ids_that_name(outputs, target)
    config = DraftConfig(
        hidden_size=raw["hidden_size"],
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim(raw),
        vocab_size=raw["vocab_size"],
        draft_vocab_size=draft_vocab_size,
        aux_layer_ids=tuple(ids),
        entered_layer_ids=None if ids == list(outputs) else tuple(o + 1 for o in outputs),
        num_aux=len(outputs),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        norm_before_fc=eagle31,
        norm_output=eagle31,
    )
    if kind == "target" and not eagle31:
        heads = chosen or enough_key_heads(config)
        config = replace(config, fc_norm=True, num_key_value_heads=heads)
    _, problems = read_draft_config(config.to_json())
    if problems:
        raise ValueError(
            "the target's config asks for a draft that no server loads:"
            f" {' '.join(problems)} Correct the target's config.json where it is wrong; else no"
            " draft of this kind can be made for it"
        )
    return config


def enough_key_heads(config: DraftConfig) -> int:
    """As few as hold the whole embedding: the next token enters the draft through its value heads
    alone.
    """
    heads = config.num_attention_heads
    enough = (
        n
        for n in range(config.num_key_value_heads, heads + 1)
        if n * config.head_dim >= config.hidden_size
    )
    return next((n for n in enough if heads % n == 0), heads)
