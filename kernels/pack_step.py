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

from functools import cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from aurora_kernels.dispatch import use_kernels
from aurora_kernels.limits import E4M3_MAX, MAX_NODES
from torch import Tensor

LARGEST = tl.constexpr(E4M3_MAX)


@cache
def ints_parts(nodes: int, path: int, links: bool) -> dict[str, slice]:
    """Where a request's integers lie in its row, by what they are taken from: its root's position,
    its accept length, path [P] (node ids, -1 beyond the accepted ones), next tokens [P], draft
    tokens [N]; with `links` first child [N] and next sibling [N]."""
    sizes = {"positions": 1, "accept_lens": 1, "accept_index": path, "next_tokens": path}
    sizes |= {"draft_tokens": nodes}
    sizes |= {"next_token": nodes, "next_sibling": nodes} if links else {}
    ends = accumulate(sizes.values())
    return {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends)}


def ints_width(nodes: int, path: int, links: bool) -> int:
    """Integers of a request."""
    return [*ints_parts(nodes, path, links).values()][-1].stop


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
    packed, hidden, on_path = _kept(step)
    ints.copy_(packed)
    # the accepted ones to the front, each row to its place: T stays on the device
    on_path = on_path.flatten()
    place = torch.where(on_path, on_path.cumsum(0), on_path.sum() + (~on_path).cumsum(0)) - 1
    count = torch.arange(len(place), device=place.device)
    order = torch.empty_like(place).scatter_(0, place, count)
    found, on_path = hidden.flatten(0, 1)[order], on_path[order][:, None]
    if scales is not None:
        found, found_scales = float8_ref(found, scales.shape[1])
        scales.copy_(torch.where(on_path, found_scales, scales))
    features.copy_(torch.where(on_path, found, features))


def pack_step_ref(
    step: dict[str, Tensor | None], layers: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(ints, features [T, F], scales [T, layers]) of pack_step; `layers` 0: features as they are,
    no scales. hidden, positions and next_tokens may be those of a path's nodes alone, [B * P].

    Waits for the device, to know T.
    """
    ints, hidden, on_path = _kept(step)
    features = hidden[on_path]
    return (ints, *float8_ref(features, layers)) if layers else (ints, features, None)


def _kept(step: dict[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the kept requests: ints, hidden [b, P, F], and which of its rows were accepted, bool
    [b, P]."""
    lens, index, rows = step["accept_lens"], step["accept_index"], step.get("rows")
    size, path = index.shape
    nodes = step["draft_tokens"].numel() // size

    def of_nodes(name: str) -> Tensor:
        # where not all nodes matter, they need not all be there
        columns = step[name].shape[1:] if name == "hidden" else ()
        return step[name].reshape(size, -1, *columns)

    on_path = torch.arange(path, device=lens.device) < lens[:, None]
    ints = torch.empty(
        size, ints_width(nodes, path, links := step.get("next_token") is not None),
        dtype=torch.int32, device=lens.device,
    )  # fmt: skip
    for name, part in ints_parts(nodes, path, links).items():
        if name == "accept_lens":
            ints[:, part] = lens[:, None]
        elif name == "accept_index":
            ints[:, part] = torch.where(on_path, index % nodes, -1)
        else:
            ints[:, part] = of_nodes(name)[:, : part.stop - part.start]
    hidden = of_nodes("hidden")[:, :path]
    if rows is not None:
        ints, hidden, on_path = ints[rows], hidden[rows], on_path[rows]
    return ints, hidden, on_path


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
    scales = largest / torch.full_like(largest, E4M3_MAX)
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
    links = step.get("next_token") is not None
    arguments |= _places(nodes, path, links)
    return [
        (pack_step_kernel, (len(ints) * path, layers), arguments,
         constexprs | dict(LANES=MAX_NODES, LINKS=links), options)
    ]  # fmt: skip


@cache
def _places(nodes: int, path: int, links: bool) -> dict[str, int]:
    """The kernel's arguments that are of `ints_parts`."""
    parts = ints_parts(nodes, path, links)
    places = {at: parts[name].start if name in parts else 0 for at, name in AT.items()}
    return places | {"width": ints_width(nodes, path, links)}


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


# the kernel's arguments that say where a part begins, and its name
AT = {
    "position_at": "positions", "length_at": "accept_lens", "path_at": "accept_index",
    "next_at": "next_tokens", "draft_at": "draft_tokens", "child_at": "next_token",
    "sibling_at": "next_sibling",
}  # fmt: skip
SIZES = ("nodes", "path", "width", *AT)
SMALL = (
    "accept_lens", "accept_index", "positions", "draft_tokens", "next_tokens", "next_token",
    "next_sibling", "rows", "ints", *SIZES,
)  # fmt: skip


@triton.jit(do_not_specialize=list(SIZES), do_not_specialize_on_alignment=list(SMALL))
def pack_step_kernel(
    hidden, accept_lens, accept_index, positions, draft_tokens, next_tokens, next_token,
    next_sibling, rows, ints, features, scales, nodes, path, width,
    position_at, length_at, path_at, next_at, draft_at, child_at, sibling_at,
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
        out = ints + request.to(tl.int64) * width
        tl.store(out + position_at, tl.load(positions + source * nodes).to(tl.int32))
        tl.store(out + length_at, length)
        index = tl.load(accept_index + source * path + lane, mask=lane < path, other=0)
        node = tl.where(lane < length, index.to(tl.int32) % nodes, -1)
        tl.store(out + path_at + lane, node, mask=lane < path)
        at = source * nodes + lane
        following = tl.load(next_tokens + at, mask=lane < path, other=0).to(tl.int32)
        tl.store(out + next_at + lane, following, mask=lane < path)
        is_node = lane < nodes
        token = tl.load(draft_tokens + at, mask=is_node, other=0).to(tl.int32)
        tl.store(out + draft_at + lane, token, mask=is_node)
        if LINKS:
            child = tl.load(next_token + at, mask=is_node, other=0).to(tl.int32)
            tl.store(out + child_at + lane, child, mask=is_node)
            sibling = tl.load(next_sibling + at, mask=is_node, other=0).to(tl.int32)
            tl.store(out + sibling_at + lane, sibling, mask=is_node)
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
        scale = tl.div_rn(tl.where(unknown, float("nan"), largest), LARGEST)
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
