"""Products with bfloat16 weights that are laid out for oneDNN once instead of at each call.

On a processor without AMX SGLang calls torch's F.linear, which brings a weight of [N, K] into
oneDNN's own layout at each call: for the few rows of a decode step that costs more than the
product. `AURORA_CPU_PACK=1` keeps the laid-out copy, which takes the weight's size again. A copy is
made again when its weight was written: by Aurora's swap, which counts the weight's version up, or
by one of SGLang's own calls in WRITERS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# The layout is chosen for so many rows, a verify step's; it serves fewer and more as well.
ROWS = 32
LINEAR = "sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod.apply"
HEAD = "sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head"
UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
WRITERS = (
    *(f"{UPDATER}.update_weights_from_{source}" for source in ("disk", "tensor", "ipc")),
    f"{UPDATER}.load_weights_from_distributed",
    f"{UPDATER}.end_weight_update",
    "sglang.srt.utils.weight_checker.WeightChecker.handle",
)

# of SGLang's own calls
_writes = 0


def register(registry: Any, kind: Any) -> None:
    """SGLang's hook registry and its HookType: before its modules are imported."""
    registry.register(LINEAR, _linear, kind.AROUND)
    registry.register(HEAD, _head, kind.AROUND)
    for name in WRITERS:
        registry.register(name, _write, kind.AROUND)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [.., K] @ weight [N, K]' + bias [N]."""
    return torch.ops.mkldnn._linear_pointwise(x, _packed(weight), bias, "none", [], "")


def fits(x: torch.Tensor, weight: Any) -> bool:
    """Whether `product` computes it."""
    return (
        type(weight) in (torch.Tensor, torch.nn.Parameter)
        and weight.dtype == x.dtype == torch.bfloat16
        and weight.dim() == 2
        and weight.is_contiguous()
        and x.numel() > 0
    )


def _packed(weight: torch.Tensor) -> torch.Tensor:
    state = (weight.data_ptr(), weight._version, _writes)
    kept = getattr(weight, "aurora_packed", None)
    if kept is None or kept[0] != state:
        holder: Any = weight
        kept = holder.aurora_packed = (
            state,
            torch.ops.mkldnn._reorder_linear_weight(weight.data, ROWS),
        )
    return kept[1]


def _linear(original: Callable, method: Any, layer: Any, x: torch.Tensor, bias: Any = None) -> Any:
    if fits(x, layer.weight):
        return product(x, layer.weight, bias)
    return original(method, layer, x, bias)


def _head(
    original: Callable, processor: Any, hidden: torch.Tensor, head: Any, *rest: Any, **named: Any
) -> Any:
    weight = getattr(head, "weight", None)
    plain = not hasattr(head, "apply_lora") and not processor.use_fp32_lm_head
    if plain and fits(hidden, weight):
        return product(hidden, weight, None)
    return original(processor, hidden, head, *rest, **named)


def _write(original: Callable, *args: Any, **kwargs: Any) -> Any:
    global _writes
    try:
        return original(*args, **kwargs)
    finally:
        _writes += 1
