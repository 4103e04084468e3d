"""A draft that SGLang has built: what a version must hold to be loaded into it, and the loading.

Its parameters are fused (qkv, gate and up) and sharded; names and full shapes follow from them and
its config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aurora_sglang_plugin.drafts.eagle3_vocab import MAP, MAPS
from aurora_sglang_plugin.drafts.tensor_files import canonical_name

if TYPE_CHECKING:
    from torch import Tensor, nn

# Values of config.json, or of its eagle_config, that a running server cannot change; compared where
# both name them.
FIXED_CONFIG = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "draft_vocab_size", "rms_norm_eps",
    "hidden_act", "norm_output", "norm_before_fc", "fc_norm", "num_aux_hidden_states",
    "target_hidden_size", "eagle_aux_hidden_state_layer_ids",
)  # fmt: skip
FLOATS = ("torch.float32", "torch.float16", "torch.bfloat16")


def of_the_target(model: nn.Module) -> tuple[str, ...]:
    """The names of modules in `model` that are the target's own: never written."""
    return ("embed_tokens",)


def feature_layers(model: nn.Module) -> tuple[int, int]:
    """How many of the target's layers feed the draft, and the width of each."""
    inner: Any = model.model
    return inner.num_aux_hidden_states, inner.hidden_size_in


def fixed_config(config: Any) -> dict[str, Any]:
    """The values of FIXED_CONFIG that the draft was built with."""
    named = vars(config) | (getattr(config, "eagle_config", None) or {})
    return {k: named[k] for k in FIXED_CONFIG if named.get(k) is not None}


def differing_config(config: dict[str, Any], fixed: Mapping[str, Any]) -> dict[str, tuple]:
    """Where config.json names another value than `fixed`: (theirs, this server's).

    Raises TypeError or AttributeError for what is no config.
    """
    named = config | (config.get("eagle_config") or {})
    both = {k: (named[k], v) for k, v in fixed.items() if named.get(k) is not None}
    return {k: (theirs, ours) for k, (theirs, ours) in both.items() if theirs != ours}


def served_shapes(
    model: nn.Module, parameters: list[tuple[str, nn.Parameter]], mapped: int | None
) -> dict[str, tuple[int, ...] | None]:
    """Canonical names and full (unsharded) shapes of a checkpoint of `model`.

    `parameters`: its own, by name; `mapped`: draft ids of a reduced vocabulary. Raises ValueError
    if the draft shares its head with the target, or is quantized: such weights cannot be swapped.
    """
    config: Any = model.config
    if getattr(model, "load_lm_head_from_target", False) or getattr(
        config, "tie_word_embeddings", False
    ):
        raise ValueError(
            "this draft uses the target's lm_head or ties its own to the embedding; expected a head"
            " of its own: give draft_vocab_size in its config.json and tie_word_embeddings=false"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rows = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    shapes: dict[str, tuple[int, ...] | None] = {}
    for live_name, live in parameters:
        name = canonical_name(live_name)
        if str(live.dtype) not in FLOATS:
            raise ValueError(
                f"draft parameter {name} is {live.dtype}; expected an unquantized draft"
            )
        if ".qkv_proj." in name:
            for part, size in rows.items():
                shapes[name.replace("qkv_proj", f"{part}_proj")] = (size, *live.shape[1:])
        elif ".gate_up_proj." in name:
            for part in ("gate", "up"):
                size = config.intermediate_size
                shapes[name.replace("gate_up_proj", f"{part}_proj")] = (size, *live.shape[1:])
        elif name.endswith("o_proj.weight"):
            shapes[name] = (live.shape[0], heads * head_dim)
        elif name.endswith("down_proj.weight"):
            shapes[name] = (live.shape[0], config.intermediate_size)
        elif name == "lm_head.weight":
            # SGLang pads the rows
            shapes[name] = (config.draft_vocab_size, live.shape[1])
        else:
            shapes[name] = tuple(live.shape)
    if mapped is not None:
        shapes[MAP] = (mapped,)
    return shapes


def fill(model: nn.Module, target_ids: Tensor | None, tensors: dict[str, Tensor]) -> None:
    """Load a version's tensors, by canonical name, into `model`; and into `target_ids` int64 [VD],
    of a reduced vocabulary, the target id of each draft id.
    """
    import torch

    load: Any = model.load_weights
    load([(n, t) for n, t in tensors.items() if n not in MAPS])
    if target_ids is not None:
        ids = torch.arange(len(target_ids))
        target_ids.copy_(ids + tensors[MAP].to(torch.int64) if MAP in tensors else ids)


def any_target_ids(model: nn.Module, target_vocab: int) -> Tensor | None:
    """int64 [VD] for a draft whose weights bring none; None if its vocabulary is the target's."""
    import torch

    head: Any = model.lm_head
    return torch.arange(head.num_embeddings) if head.num_embeddings < target_vocab else None
