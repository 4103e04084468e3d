"""Which layers of the target feed the draft: what SGLang 0.5.23 captures for the ids that a draft's
config names.

SGLang captures the state that ENTERS a layer. By default an id means that layer's OUTPUT, one layer
earlier than what enters the next; some models read the ids in a way of their own (`CONVENTIONS`:
set_eagle3_layers_to_capture of each model under sglang/srt/models). This module imports neither
torch nor sglang.

L target layers; an output o is what enters layer o + 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEY = "eagle_aux_hidden_state_layer_ids"


@dataclass(frozen=True)
class Convention:
    """How one of SGLang's models reads the ids, and what it can capture."""

    # outputs only where the first id is 1, else what enters
    outputs_if_first_is_1: bool = False
    # what enters where the largest id is L, else outputs
    entering_if_last_is_count: bool = False
    # the output of the last layer can be captured too
    last_output: bool = False
    # of the three layers that are taken where no ids are named
    default_shift: int = 0


# By the target's architectures or model_type.
CONVENTIONS = {
    ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM",
    "Glm4MoeLiteForCausalLM",
     "GlmMoeDsaForCausalLM", "KimiK25ForConditionalGeneration", "MistralLarge3ForCausalLM",
     "deepseek_v2",
     "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_k2", "kimi_k25"):
        Convention(outputs_if_first_is_1=True),
    ("GptOssForCausalLM", "gpt_oss"): Convention(entering_if_last_is_count=True, last_output=True),
    ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration",
     "gemma3", "gemma3_text", "gemma4", "gemma4_text", "MiniMaxM3SparseForCausalLM", "minimax_m3"):
        Convention(last_output=True),
    ("MiniMaxM3SparseForConditionalGeneration", "minimax_m3_vl"): Convention(last_output=True,
    default_shift=1),
}  # fmt: skip


def convention(target_config: Mapping[str, Any]) -> Convention:
    architectures = target_config.get("architectures")
    names = list(architectures) if isinstance(architectures, list | tuple) else []
    for name in (*names, target_config.get("model_type")):
        for known, found in CONVENTIONS.items():
            if name in known:
                return found
    return Convention()


def aux_layer_ids(
    draft_config: Mapping[str, Any],
    num_target_layers: int,
    target_config: Mapping[str, Any] | None = None,
) -> list[int]:
    """The layers of the target whose OUTPUT the draft reads, low to high; SGLang's default where
    none are named.

    target_config says which model it is (architectures, model_type); None: one without a convention
    of its own. Raises ValueError where SGLang would capture others than the draft asks for, or
    fewer.
    """
    how, layers = convention(target_config or {}), num_target_layers
    ids = named_ids(draft_config)
    if ids is None:
        entering = _entering(None, layers, how)
        outputs = [e - 1 for e in entering]
        if outputs != sorted(set(outputs)) or outputs[0] < 0 or entering[-1] >= layers:
            raise ValueError(
                f"eagle_config.{KEY} is not set, and SGLang's default {outputs} does not name "
                "three layers of a "
                f"target of {layers}; set it, for example to {_spread(layers)}."
            )
        return outputs
    whole = isinstance(ids, list) and bool(ids) and all(type(i) is int for i in ids)
    shift = _entering(ids, layers, how)[0] - ids[0] if whole else 1
    low, high = 1 - shift, layers - shift - (not how.last_output)
    if not whole or not all(low <= i <= high for i in ids):
        why = "" if how.last_output else " (the last layer's output is never captured)"
        raise ValueError(
            f"{KEY} {ids}: expected ids from {low} to {high} for a target of {layers} layers{why}, "
            "for example "
            f"{_spread(layers, first=int(how.outputs_if_first_is_1))}."
        )
    if ids != sorted(set(ids)):
        raise ValueError(
            f"{KEY} {ids}: SGLang captures each layer once, low to high; expected "
            f"{sorted(set(ids))} and fc.weight to "
            "match."
        )
    return [e - 1 for e in _entering(ids, layers, how)]


def ids_that_name(outputs: Sequence[int], target_config: Mapping[str, Any]) -> list[int]:
    """The ids by which SGLang captures exactly these outputs of this target.

    Raises ValueError where it has none for them.
    """
    layers = target_config["num_hidden_layers"]
    for ids in (list(outputs), [o + 1 for o in outputs]):
        try:
            if aux_layer_ids({"eagle_config": {KEY: ids}}, layers, target_config) == list(outputs):
                return ids
        except ValueError:
            continue
    how = convention(target_config)
    highest = layers - 1 if how.last_output else layers - 2
    first = (
        ", the first not 0 (SGLang has no ids for that in this model)"
        if how.outputs_if_first_is_1
        else ""
    )
    raise ValueError(
        f"aux layers {list(outputs)} of a target of {layers} layers: expected different ids, "
        "ascending, between 0 and "
        f"{highest}{first}"
    )


def named_ids(draft_config: Mapping[str, Any]) -> Any:
    """What eagle_config names, as it stands there; None: nothing."""
    eagle = draft_config.get("eagle_config")
    return eagle.get(KEY) if isinstance(eagle, dict) else None


def _entering(ids: list[int] | None, layers: int, how: Convention) -> list[int]:
    if ids is None:
        return [i + how.default_shift for i in (2, layers // 2, layers - 3)]
    as_they_are = (how.outputs_if_first_is_1 and ids[0] != 1) or (
        how.entering_if_last_is_count and max(ids) == layers
    )
    return [i if as_they_are else i + 1 for i in ids]


def _spread(num_layers: int, first: int = 0) -> list[int]:
    """Three captured outputs, low, middle and high, of a target that has as many; fewer where it
    has fewer."""
    return sorted({first, (num_layers - 2) // 2, num_layers - 2}) if num_layers > 1 else []
