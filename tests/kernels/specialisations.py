"""What is compiled without a GPU: every kernel with the arguments of its launcher, file by file.

A function of SPECIALISATIONS takes a device's capability ((8, 0), (9, 0) or (10, 0)) and yields
(name, kernel, arguments, constexprs, options) of each specialisation, out of the same functions and
tables that the launcher uses, so that what is compiled here is what would run there:

- name: short and unique in the file, such as "bwd bf16 D=128"; it is a row of the table;
- arguments: parameter -> what the launcher passes, for every parameter that is not a constexpr: a
  tensor (on the meta device it costs nothing), an int, a float, a bool or None. They are
  specialised as Triton does it: an int divisible by 16 is known to be so, 1 and None become
  constants, pointers are aligned to 16 bytes. A Triton type ("*bf16", "i32", "i64", "fp32"; with
  ":16" if an int is divisible by 16) says the same without a value;
- constexprs: parameter -> value, for the others;
- options: num_warps, num_stages, maxnreg.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from aurora_kernels import tree_loss_kernels
from aurora_kernels.dispatch import DTYPES
from aurora_kernels.pack_step import _launches as pack_step_launches
from aurora_kernels.pack_step import float8_kernel
from aurora_kernels.topk_logprobs import _launches
from aurora_kernels.tree_attention_bwd_kernels import (
    tree_attention_bwd_nodes_kernel,
    tree_attention_bwd_positions_kernel,
    tree_attention_bwd_q_kernel,
)
from aurora_kernels.tree_attention_kernels import tree_attention_fwd_kernel
from aurora_kernels.tree_attention_launch import arguments
from aurora_kernels.tree_loss_kernels import blocks
from triton.runtime.jit import JITFunction


def topk_logprobs(capability: tuple[int, int]) -> Iterator[tuple]:
    """Two vocabularies of each kind, and one kept logit."""
    for dtype, vocab, k in (
        (torch.bfloat16, 151_936, 32),
        (torch.bfloat16, 200_064, 128),
        (torch.float16, 32_000, 1),
        (torch.float32, 151_937, 32),
    ):

        def meta(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        rows = None if k == 1 else meta(4, dtype=torch.int64)
        out = meta(4, k, dtype=torch.int32), meta(4, k), meta(4, dtype=torch.float32)
        for kernel, _, given, constexprs, options in _launches(meta(4, vocab), rows, *out):
            name = f"{kernel.__name__.split('_')[1]} {str(dtype)[6:]} V={vocab} K={k}"
            yield name, kernel, given, constexprs, options


def tree_attention(
    kernels: Sequence[JITFunction], capability: tuple[int, int]
) -> Iterator[tuple[str, JITFunction, dict, dict, dict]]:
    """(name, kernel, arguments, constexprs, options) of what is launched of `kernels` on a device
    of `capability`, to compile it without one: four query heads for each key head, head sizes 64,
    96, 128, 256. 16 bits compile alike, whichever."""
    head_dims = {
        torch.bfloat16: (64, 96, 128, 256),
        torch.float16: (128,),
        torch.float32: (64, 128, 256),
    }
    for dtype in DTYPES:
        for head_dim in head_dims[dtype]:
            rows, index = (torch.empty(shape, dtype=kind, device="meta") for shape, kind in
                           (((8, 4, head_dim), dtype), ((8, 1), torch.int64)))  # fmt: skip
            floats = dict.fromkeys(("q", "o", "do", "dq"), rows)
            floats |= dict.fromkeys([d + x for d in ("", "d") for x in ("context_k", "context_v",
            "node_k", "node_v")],
                                    rows[:, :1])  # fmt: skip
            floats |= dict.fromkeys(("lse", "delta"), rows.float())
            indices = dict.fromkeys(
                ("key", "order", "ancestors", "ranges", "first", "query"), index
            )
            for kernel in kernels:
                name = kernel.__name__.removeprefix("tree_attention_").removesuffix("_kernel")
                yield (f"{name} {str(dtype).removeprefix('torch.')} D={head_dim}", kernel,
                       *arguments(kernel, 1.0, floats | indices, capability))  # fmt: skip


def tree_loss(
    capability: tuple[int, int],
) -> Iterator[tuple[str, JITFunction, dict, dict, dict]]:
    """Norms, kept targets and exact ones, with and without gradients."""

    def of(name: str, kernel: JITFunction, arguments: dict, **constexprs):
        sizes = blocks(kernel, capability)
        options = {"num_warps": sizes.pop("num_warps")}
        return name, kernel, arguments, constexprs | sizes, options

    for dtype in ("bf16", "fp16", "fp32"):
        norm = {"x": f"*{dtype}", "g": f"*{dtype}", "scale": "*fp32", "H": "i32:16"}
        yield of(
            f"norm fwd {dtype}",
            tree_loss_kernels.norm_fwd_kernel,
            norm | {"y": f"*{dtype}", "eps": "fp32"},
        )
        yield of(f"norm bwd {dtype}", tree_loss_kernels.norm_bwd_kernel, norm | {"dy": "*fp32"})
        del norm["g"]
        rows = {"dy": "*fp32", "dg": "*fp32", "R": "i32", "rows_each": "i32"}
        yield of(f"norm weight bwd {dtype}", tree_loss_kernels.norm_weight_bwd_kernel, norm | rows)
        outputs = {
            "loss_out": "*fp32",
            "acceptance_out": "*fp32",
            "argmax_out": "*i64",
            "weight": "*fp32",
        }
        logits = outputs | {
            "z": "*fp32",
            "dz": f"*{dtype}",
            "z_stride": "i32:16",
            "dz_stride": "i32:16",
        }
        # as of real vocabularies, and of odd ones
        logits["VD"] = "i32:16" if dtype == "bf16" else "i32"
        logits |= dict.fromkeys(("forward_kl", "reverse_kl", "tv", "greedy"), "fp32")
        kept = {"topk_ids": "*i64", "topk_logits": "*fp32", "logsumexp": "*fp32", "K": "i32"}
        for k in (16, 32, 64, 128) if dtype == "bf16" else (32,):
            yield of(
                f"topk {dtype} KP={k}",
                tree_loss_kernels.topk_loss_kernel,
                logits | kept,
                GRADS=True,
                KP=k,
            )
        exact = {"t": "*fp32", "label_out": "*i64", "V": "i32", "t_stride": "i32:16"}
        exact |= {"target_ids": None, "draft_ids": None}
        for reduced, sums in ((0, 0), (0, 1), (1, 0), (1, 1)) if dtype == "bf16" else ((1, 1),):
            ids = dict.fromkeys(("target_ids", "draft_ids"), "*i32") if reduced else {}
            name = f"exact {dtype}{' reduced' * reduced}{' sums' * sums}"
            flags = {"REDUCED": bool(reduced), "SUMS": bool(sums), "GRADS": True}
            yield of(name, tree_loss_kernels.exact_loss_kernel, logits | exact | ids, **flags)
    yield of(
        "topk no gradients", tree_loss_kernels.topk_loss_kernel, logits | kept, GRADS=False, KP=32
    )
    yield of(
        "exact no gradients",
        tree_loss_kernels.exact_loss_kernel,
        logits | exact,
        REDUCED=False,
        SUMS=True,
        GRADS=False,
    )


def pack_step(
    capability: tuple[int, int],
) -> Iterator[tuple[str, JITFunction, dict, dict, dict]]:
    """Chains and trees, all requests and some, as they are and as float8, odd widths."""
    for dtype, width, layers, links, rows in (
        (torch.bfloat16, 4096, 3, False, False),
        (torch.bfloat16, 7168, 3, True, True),
        (torch.float16, 2049, 5, False, True),
        (torch.float32, 16384, 1, True, False),
        (torch.bfloat16, 4096, 0, False, True),
        (torch.float32, 5003, 0, True, False),
    ):

        def meta(*shape, dtype=torch.int64):
            return torch.empty(shape, dtype=dtype, device="meta")

        columns = width * max(layers, 1)
        step = dict.fromkeys(("positions", "draft_tokens"), meta(4 * 5))
        step |= {"accept_lens": meta(4, dtype=torch.int32), "rows": meta(2) if rows else None}
        step |= dict.fromkeys(("next_token", "next_sibling"), meta(4 * 5) if links else None)
        step |= {
            "accept_index": meta(4, 3, dtype=torch.int32),
            "next_tokens": meta(4 * 5, dtype=torch.int32),
            "hidden": meta(4 * 5, columns, dtype=dtype),
        }
        out = meta(6, columns, dtype=torch.uint8 if layers else dtype)
        scales = meta(6, layers, dtype=torch.float32) if layers else None
        name = (
            f"{str(dtype)[6:]} H={width}{' tree' * links}{' rows' * rows}{' float8' * (layers > 0)}"
        )
        ((kernel, _, given, constexprs, options),) = pack_step_launches(
            step, meta(4, 99, dtype=torch.int32), out, scales
        )
        yield f"step {name}", kernel, given, constexprs, options
        if layers:
            given = dict(hidden=step["hidden"], features=out, scales=scales)
            constexprs = {k: constexprs[k] for k in ("WIDTH", "BLOCK", "SOURCE", "TARGET")}
            yield f"rows {name}", float8_kernel, given, constexprs, options


SPECIALISATIONS = {
    "pack_step": pack_step,
    "topk_logprobs": topk_logprobs,
    "tree_attention_bwd_kernels": partial(
        tree_attention,
        (
            tree_attention_bwd_q_kernel,
            tree_attention_bwd_positions_kernel,
            tree_attention_bwd_nodes_kernel,
        ),
    ),
    "tree_attention_kernels": partial(tree_attention, (tree_attention_fwd_kernel,)),
    "tree_loss_kernels": tree_loss,
}
