"""The staging copy of a draft: the same module tree with parameters of its own, and what a
checkpoint for it must hold.

This module imports torch but no sglang.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from aurora_sglang_plugin.drafts.tensor_files import canonical_name
from aurora_sglang_plugin.weights.reader import Expected

# Values of config.json, or of its eagle_config, that a running server cannot change; compared where
# both name them.
FIXED_CONFIG = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim",
    "vocab_size", "draft_vocab_size", "rms_norm_eps", "hidden_act", "norm_output", "norm_before_fc",
    "fc_norm",
    "num_aux_hidden_states", "target_hidden_size", "eagle_aux_hidden_state_layer_ids",
)  # fmt: skip


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The draft's own parameters: all but the embedding, which is the target's."""
    return [(n, p) for n, p in model.named_parameters() if "embed_tokens" not in n]


def reserve_staging_memory(model: nn.Module) -> torch.Tensor | None:
    """Device memory for the staging copy and the previous version, to be let go just before they
    are made; None on the CPU.
    """
    parameters = [p for _, p in trainable(model)]
    if not parameters[0].is_cuda:
        return None
    return torch.empty(
        2 * sum(p.nbytes for p in parameters), dtype=torch.uint8, device=parameters[0].device
    )


def make_staging_copy(model: nn.Module) -> nn.Module:
    """The same module tree with fresh parameters, except the embedding's; everything else is
    shared.

    Not a deepcopy: that would drop the parameters' attributes (SGLang's `weight_loader`), and copy
    process groups, streams and attention backends. A loader bound to a live layer is right for the
    staging copy: it writes to the parameter that it is given, and reads from the layer only its
    shard.
    """
    memo: dict[int, object] = {}

    def parameter(live: nn.Parameter | None) -> nn.Parameter | None:
        if live is not None and id(live) not in memo:
            staged = torch.Tensor._make_subclass(type(live), torch.empty_like(live.data), False)
            staged.__dict__.update(live.__dict__)
            memo[id(live)] = staged
        return None if live is None else memo[id(live)]

    def module(live: nn.Module, name: str) -> nn.Module:
        if name == "embed_tokens":
            return live
        if id(live) not in memo:
            staged = memo[id(live)] = copy.copy(live)
            staged._parameters = {n: parameter(p) for n, p in live._parameters.items()}
            staged._modules = {
                n: None if m is None else module(m, n) for n, m in live._modules.items()
            }
        return memo[id(live)]

    return module(model, "")


def expected_weights(model: nn.Module, hot_token_id: torch.Tensor | None, target: str) -> Expected:
    """What a published version must hold to be loaded into `model`.

    Raises ValueError as `expected_shapes`.
    """
    named = vars(model.config) | (getattr(model.config, "eagle_config", None) or {})
    fixed = {k: named[k] for k in FIXED_CONFIG if named.get(k) is not None}
    return Expected(target, expected_shapes(model, hot_token_id), model.config.vocab_size, fixed)


def expected_shapes(
    model: nn.Module, hot_token_id: torch.Tensor | None
) -> dict[str, tuple[int, ...] | None]:
    """Canonical names and full (unsharded) shapes of a checkpoint of `model`, from its parameters
    and its config.

    Raises ValueError where the draft shares its head with the target, or is quantized: such weights
    cannot be swapped.
    """
    config = model.config
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
    for live_name, live in trainable(model):
        name = canonical_name(live_name)
        if live.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"draft parameter {name} is {live.dtype}; expected an unquantized draft"
            )
        if ".qkv_proj." in name:
            for part, size in rows.items():
                shapes[name.replace("qkv_proj", f"{part}_proj")] = (size, *live.shape[1:])
        elif ".gate_up_proj." in name:
            for part in ("gate", "up"):
                shapes[name.replace("gate_up_proj", f"{part}_proj")] = (
                    config.intermediate_size,
                    *live.shape[1:],
                )
        elif name.endswith("o_proj.weight"):
            shapes[name] = (live.shape[0], heads * head_dim)
        elif name.endswith("down_proj.weight"):
            shapes[name] = (live.shape[0], config.intermediate_size)
        elif name == "lm_head.weight":
            # SGLang pads the rows
            shapes[name] = (config.draft_vocab_size, live.shape[1])
        else:
            shapes[name] = tuple(live.shape)
    if hot_token_id is not None:
        shapes["d2t"] = tuple(hot_token_id.shape)
    return shapes
