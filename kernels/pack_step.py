"""What is kept of a verify step, packed into one buffer, and features in a byte each.

Dimensions: B requests of the step, b those that are kept, N tree nodes, P path columns, F features
of A layers of H each, T = sum of the kept requests' accept lengths.

One kernel, one read of the features: a program takes one layer of one path node to its place among
the T rows, which it finds by adding up the accept lengths before it; the first program of a request
also takes its integers along. Shapes depend on b, N, P and F alone and nothing waits for the host,
so rows from T on are left as they are.

float8 is e4m3 (4 bits of exponent, 3 of fraction, up to 448, no infinity) with a scale for each row
and layer, float32:

    scale = max(|x|, 1e-12) / 448        x ~ scale * e4m3(x / scale), rounded to even

The conversion is written in integers: sm_80 has none, and so every device, Triton's interpreter and
the reference agree to the bit. A row that is not finite shows in its scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from aurora_kernels.dispatch import use_kernels
from torch import Tensor

LARGEST = 448.0
# integers of a request before those of its path: position, accept length
AHEAD = 2
# most nodes and path columns of the kernel; the reference has no limit
MAX_NODES = 64


def ints_width(nodes: int, path: int, links: bool) -> int:
    """Integers of a request: position, accept length, path [P] (node ids, -1 beyond the accepted
    ones), next tokens [P], draft tokens [N]; with `links` first child [N] and next sibling [N]."""
    return AHEAD + 2 * path + (3 if links else 1) * nodes


def pack_step(step: dict[str, Tensor | None], ints: Tensor, features: Tensor,
              scales: Tensor | None) -> None:  # fmt: skip
    """Fill ints int32 [b, ints_width] and the first T rows of features [b * P, F], in the order of
    the requests and of their paths.

    scales float32 [b * P, A]: features are float8, uint8, with these; None: they are in the dtype
    of what they are copied from.

    step: hidden [B * N, F], accepted nodes in front of each request's; accept_lens [B];
    accept_index [B, P], row * N + node; positions, draft_tokens, next_tokens [B * N]; next_token
    and next_sibling [B * N], None or left out where trees are chains; rows int64 [b], the kept
    requests, or None for all. Integers of any width; hidden's rows may lie apart.
    """
    hidden = step["hidden"]
    if use_kernels(hidden) and len(ints):
        for kernel, grid, arguments, constexprs, options in _launches(step, ints, features, scales):
            kernel[grid](**arguments, **constexprs, **options)
        return
    packed = pack_step_ref(step, 0 if scales is None else scales.shape[1])
    ints.copy_(packed[0])
    features[: len(packed[1])] = packed[1]
    if scales is not None:
        scales[: len(packed[2])] = packed[2]


def pack_step_ref(
    step: dict[str, Tensor | None], layers: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(ints, features [T, F], scales [T, layers]) of pack_step; `layers` 0: features as they are,
    no scales. hidden, positions and next_tokens may be those of a path's nodes alone, [B * P]."""
    lens, index, rows = step["accept_lens"], step["accept_index"], step.get("rows")
    size, path = index.shape
    nodes = step["draft_tokens"].numel() // size

    def of_nodes(name: str) -> Tensor:
        # where not all nodes matter, they need not all be there
        columns = step[name].shape[1:] if name == "hidden" else ()
        return step[name].reshape(size, -1, *columns)

    on_path = torch.arange(path, device=lens.device) < lens[:, None]
    parts = [
        of_nodes("positions")[:, :1],
        lens[:, None],
        torch.where(on_path, index % nodes, -1),
        of_nodes("next_tokens")[:, :path],
        of_nodes("draft_tokens"),
    ]
    if step.get("next_token") is not None:
        parts += [of_nodes("next_token"), of_nodes("next_sibling")]
    ints, hidden = torch.cat([part.int() for part in parts], 1), of_nodes("hidden")[:, :path]
    if rows is not None:
        ints, hidden, on_path = ints[rows], hidden[rows], on_path[rows]
    features = hidden[on_path]
    return (ints, *float8_ref(features, layers)) if layers else (ints, features, None)


def float8(features: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """(codes uint8 [R, F], scales float32 [R, layers]) of features [R, F], whose rows may lie
    apart."""
    if not (use_kernels(features) and features.numel()):
        return float8_ref(features, layers)
    if features.stride(1) != 1:
        features = features.contiguous()
    codes = torch.empty(features.shape, dtype=torch.uint8, device=features.device)
    scales = torch.empty(len(features), layers, dtype=torch.float32, device=features.device)
    constexprs, options = _width(features, scales, codes)
    float8_kernel[(len(features), layers)](features, codes, scales, **constexprs, **options)
    return codes, scales


def float8_ref(features: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    parts = features.float().unflatten(1, (layers, -1))
    largest = parts.abs().amax(2).clamp_min(1e-12)
    # by a tensor: on CUDA a number's reciprocal would be multiplied with
    scales = largest / torch.full_like(largest, LARGEST)
    values = parts / scales[:, :, None]
    codes = values.to(torch.float8_e4m3fn).view(torch.uint8).masked_fill(values.isnan(), 0x7F)
    return codes.flatten(1), scales


def _launches(
    step: dict[str, Tensor | None], ints: Tensor, features: Tensor, scales: Tensor | None
) -> list[tuple]:
    """(kernel, grid, arguments, constexprs, options) of pack_step."""
    path, (hidden, size) = step["accept_index"].shape[1], (step["hidden"], len(step["accept_lens"]))
    nodes = step["draft_tokens"].numel() // size
    assert hidden.stride(1) == 1 and path <= nodes <= MAX_NODES
    constexprs, options = _width(hidden, scales, features)
    layers = hidden.shape[1] // constexprs["WIDTH"]
    names = ("accept_lens", "accept_index", "positions", "draft_tokens", "next_tokens")
    arguments = {"hidden": hidden} | {name: step[name].contiguous() for name in names}
    arguments |= {name: step.get(name) for name in ("next_token", "next_sibling", "rows")}
    arguments |= dict(ints=ints, features=features, scales=scales, nodes=nodes, path=path)
    return [
        (pack_step_kernel, (len(ints) * path, layers), arguments,
         constexprs | dict(LANES=MAX_NODES, LINKS=step.get("next_token") is not None), options)
    ]  # fmt: skip


def _width(source: Tensor, scales: Tensor | None, target: Tensor) -> tuple[dict, dict]:
    """(constexprs, options): a program has one layer, or as much as it can hold of a row."""
    columns = source.shape[1]
    width = columns // (scales.shape[1] if scales is not None else _parts(columns))
    block = triton.next_power_of_2(width)
    constexprs = dict(WIDTH=width, BLOCK=block, SOURCE=source.stride(0), TARGET=target.stride(0))
    return constexprs, dict(num_warps=min(8, max(1, block // 512)))


def _parts(columns: int) -> int:
    """The fewest equal parts of a row of at most 4,096 columns each, if there are such."""
    fewest = triton.cdiv(columns, 4096)
    return next((n for n in range(fewest, 4 * fewest) if columns % n == 0), 1)


SMALL = (
    "accept_lens", "accept_index", "positions", "draft_tokens", "next_tokens", "next_token",
    "next_sibling", "rows", "ints", "nodes", "path",
)  # fmt: skip


@triton.jit(do_not_specialize=["nodes", "path"], do_not_specialize_on_alignment=list(SMALL))
def pack_step_kernel(
    hidden, accept_lens, accept_index, positions, draft_tokens, next_tokens, next_token,
    next_sibling, rows, ints, features, scales, nodes, path,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SOURCE: tl.constexpr, TARGET: tl.constexpr,
    LANES: tl.constexpr, LINKS: tl.constexpr,
):  # fmt: skip
    """Program: one part of the features of one path column of a kept request."""
    cell, part = tl.program_id(0), tl.program_id(1)
    request, column = cell // path, cell % path
    source = request.to(tl.int64) if rows is None else tl.load(rows + request)
    length = tl.load(accept_lens + source).to(tl.int32)
    lane = tl.arange(0, LANES)
    if (column == 0) & (part == 0):
        out = ints + request.to(tl.int64) * (2 + 2 * path + (3 if LINKS else 1) * nodes)
        tl.store(out, tl.load(positions + source * nodes).to(tl.int32))
        tl.store(out + 1, length)
        out += 2
        index = tl.load(accept_index + source * path + lane, mask=lane < path, other=0)
        node = tl.where(lane < length, index.to(tl.int32) % nodes, -1)
        tl.store(out + lane, node, mask=lane < path)
        out += path
        at = source * nodes + lane
        tl.store(out + lane, tl.load(next_tokens + at, mask=lane < path, other=0).to(tl.int32),
                 mask=lane < path)  # fmt: skip
        out += path
        is_node = lane < nodes
        tl.store(out + lane, tl.load(draft_tokens + at, mask=is_node, other=0).to(tl.int32),
                 mask=is_node)  # fmt: skip
        if LINKS:
            out += nodes
            tl.store(out + lane, tl.load(next_token + at, mask=is_node, other=0).to(tl.int32),
                     mask=is_node)  # fmt: skip
            out += nodes
            tl.store(out + lane, tl.load(next_sibling + at, mask=is_node, other=0).to(tl.int32),
                     mask=is_node)  # fmt: skip
    if column < length:
        # rows of the requests before
        target = column
        for start in range(0, request, LANES):
            before = start + lane < request
            other = start + lane
            if rows is not None:
                other = tl.load(rows + other, mask=before, other=0)
            target += tl.sum(tl.load(accept_lens + other, mask=before, other=0).to(tl.int32))
        _copy(hidden, source * nodes + column, features, scales, target.to(tl.int64), part,
              WIDTH, BLOCK, SOURCE, TARGET)  # fmt: skip


@triton.jit
def float8_kernel(
    hidden, features, scales,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SOURCE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Program: one layer of one row."""
    row = tl.program_id(0).to(tl.int64)
    _copy(hidden, row, features, scales, row, tl.program_id(1), WIDTH, BLOCK, SOURCE, TARGET)


@triton.jit
def _copy(
    hidden, source, features, scales, target, part,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SOURCE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """One part of a row, WIDTH columns; with scales as float8."""
    column = tl.arange(0, BLOCK)
    real = column < WIDTH
    x = tl.load(hidden + source * SOURCE + part * WIDTH + column, mask=real, other=0.0)
    out = features + target * TARGET + part * WIDTH + column
    if scales is None:
        tl.store(out, x, mask=real)
    else:
        x = x.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-12)
        # a maximum ignores NaN
        unknown = tl.max((x != x).to(tl.int32), axis=0) > 0
        scale = tl.div_rn(tl.where(unknown, float("nan"), largest), 448.0)
        tl.store(scales + target * (TARGET // WIDTH) + part, scale)
        tl.store(out, _e4m3(tl.div_rn(x, tl.zeros_like(x) + scale)), mask=real)


@triton.jit
def _e4m3(x):
    """uint8 codes of float32 x, |x| <= 448 or not a number."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # to even in the 20 bits that go, and 120 exponents down
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6 a step is 2^-9, which is that of float32 at 2^14
    small = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)
    return tl.where(x != x, 0x7F, code).to(tl.uint8)
