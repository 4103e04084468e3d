"""The staging copy of a draft: the same module tree with parameters of its own, and what a
checkpoint for it must hold.

This module imports torch but no sglang.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from aurora_sglang_plugin.drafts.kinds import fixed_config, of_the_target, served_shapes
from aurora_sglang_plugin.weights.reader import Expected


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The draft's own parameters: all but the target's."""
    shared = of_the_target(model)
    return [(n, p) for n, p in model.named_parameters() if not any(s in n for s in shared)]


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
    """The same module tree with fresh parameters, except the target's; everything else is shared.

    Not a deepcopy: that would drop the parameters' attributes (SGLang's `weight_loader`), and copy
    process groups, streams and attention backends. A loader bound to a live layer is right for the
    staging copy: it writes to the parameter that it is given, and reads from the layer only its
    shard.
    """
    memo: dict[int, Any] = {}
    shared = of_the_target(model)

    def parameter(live: nn.Parameter | None) -> nn.Parameter | None:
        if live is not None and id(live) not in memo:
            staged = torch.Tensor._make_subclass(type(live), torch.empty_like(live.data), False)
            staged.__dict__.update(live.__dict__)
            memo[id(live)] = staged
        return None if live is None else memo[id(live)]

    def module(live: nn.Module, name: str) -> nn.Module:
        if name in shared:
            return live
        if id(live) not in memo:
            staged = memo[id(live)] = copy.copy(live)
            staged._parameters = {n: parameter(p) for n, p in live._parameters.items()}
            staged._modules = {
                n: None if m is None else module(m, n) for n, m in live._modules.items()
            }
        return memo[id(live)]

    return module(model, "")


def expected_weights(model: nn.Module, target_ids: torch.Tensor | None, target: str) -> Expected:
    """What a published version must hold to be loaded into `model`.

    Raises ValueError as `served_shapes`.
    """
    mapped = None if target_ids is None else len(target_ids)
    shapes = served_shapes(model, trainable(model), mapped)
    config: Any = model.config
    return Expected(target, shapes, config.vocab_size, fixed_config(config))
