"""How the kernels of tree_attention are launched: block sizes, arguments, grids."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

# capability: kernel: (rows, keys, warps, stages) for heads up to 64, 128, 256
_BLOCKS = {
    8: {
        "fwd": [(128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)],
        "bwd_q": [(128, 64, 8, 3), (64, 64, 8, 2), (64, 32, 8, 2)],
        "bwd_positions": [(32, 128, 8, 3), (64, 64, 8, 2), (32, 64, 8, 2)],
    },
    9: {
        "fwd": [(128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 3)],
        "bwd_q": [(128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)],
        "bwd_positions": [(64, 128, 8, 3), (64, 128, 8, 3), (64, 64, 8, 2)],
    },
    10: {
        "fwd": [(128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)],
        "bwd_q": [(128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)],
        "bwd_positions": [(64, 128, 8, 3), (64, 128, 8, 2), (32, 64, 8, 2)],
    },
}
_SMALL = [(64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 1)]


def blocks(
    kernel: str, head_dim: int, dtype: torch.dtype, capability: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(rows, keys, warps, stages) of a block of `kernel`: "fwd", "bwd_q", "bwd_positions" or
    "bwd_nodes".

    A table and no search at run time: the same on every machine of a kind. Its sizes are the
    largest that the compiler fits into registers, by its own count; no measurement on a GPU stands
    behind them yet. What is not 8.0, 9.0 or 10.x has 99 KiB of shared memory for a block and takes
    small ones.
    """
    if kernel == "bwd_nodes":
        return 8 if head_dim > 128 else 16, 1, 4, 2
    if dtype == torch.float32:
        # no tensor cores: for tests
        return (32, 32, 8, 1) if head_dim <= 128 else (16, 16, 8, 1)
    size = 0 if head_dim <= 64 else 1 if head_dim <= 128 else 2
    if capability in ((8, 0), (9, 0)) or capability[0] == 10:
        return _BLOCKS[capability[0]][kernel][size]
    return _SMALL[size]


def constants(kernel, like: Tensor, capability: tuple[int, int] | None = None) -> tuple[dict, dict]:
    """(constexprs but G, options) for tensors like [.., D]."""
    if capability is None:
        capability = torch.cuda.get_device_capability(like.device) if like.is_cuda else (9, 0)
    name = kernel.__name__.removeprefix("tree_attention_").removesuffix("_kernel")
    head_dim = like.shape[-1]
    rows, keys, warps, stages = blocks(name, head_dim, like.dtype, capability)
    padded = max(16, triton.next_power_of_2(head_dim))
    constexprs = {"D": head_dim, "BLOCK_D": padded, "BLOCK_M": rows, "BLOCK_N": keys}
    # fused multiply-adds are Triton's default, which it changes: said here, it is the same for all
    # versions
    return constexprs, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def arguments(
    kernel, scale: float, tensors: dict[str, Tensor], capability=None
) -> tuple[dict, dict, dict]:
    """(arguments, constexprs, options) of a launch over `tensors`, of which a kernel takes those
    that it names.
    """
    q, context_k, node_k = tensors["q"], tensors["context_k"], tensors["node_k"]
    ancestors = tensors.get("ancestors")
    sizes = {"queries": len(q), "positions": len(context_k), "nodes": len(node_k),
    "kv_heads": context_k.shape[1],
             "width": 0 if ancestors is None else ancestors.shape[1],
             "scale": float(scale), "qk_scale": scale * math.log2(math.e)}  # fmt: skip
    constexprs, options = constants(kernel, q, capability)
    constexprs["G"] = q.shape[1] // context_k.shape[1]
    named = kernel.arg_names
    given = {name: value for name, value in (tensors | sizes).items() if name in named}
    return given, {name: value for name, value in constexprs.items() if name in named}, options


def launch(kernel, scale: float, **tensors: Tensor) -> None:
    given, constexprs, options = arguments(kernel, scale, tensors)
    if "ranges" in tensors:
        blocks_of_heads = len(tensors["ranges"])
    elif "first" in tensors:
        blocks_of_heads = triton.cdiv(given["nodes"], constexprs["BLOCK_M"])
    else:
        blocks_of_heads = triton.cdiv(given["queries"] * constexprs["G"], constexprs["BLOCK_M"])
    grid = blocks_of_heads * given["kv_heads"]
    if grid:
        with torch.cuda.device_of(tensors["q"]):
            kernel[(grid,)](**given, **constexprs, **options)
