"""The kernels that pack a step, in Triton's interpreter or on a GPU (conftest.py says how), against
their references: equal to the bit.
"""

import pytest
import torch
from aurora_kernels import pack_step as module
from aurora_kernels.pack_step import float8, float8_ref, ints_width, pack_step, pack_step_ref
from step_inputs import make_step

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def where() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def same(found, expected):
    """To the bit, but that a NaN is a NaN."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if found.is_floating_point():
        assert torch.equal(found.isnan(), expected.isnan())
        found, expected = found.nan_to_num(7.0), expected.nan_to_num(7.0)
    assert torch.equal(found, expected)


def check(step, layers):
    before = {name: t if t is None else t.clone() for name, t in step.items()}
    ints, features, scales = pack_step_ref(step, layers)
    kept = len(ints) * step["accept_index"].shape[1]
    where, columns = step["hidden"].device, step["hidden"].shape[1]
    out = torch.full((kept, columns), 77, dtype=features.dtype, device=where)
    out_scales = torch.full((kept, layers), -5.0, device=where) if layers else None
    out_ints = torch.full_like(ints, -9)
    pack_step(step, out_ints, out, out_scales)
    same(out_ints, ints)
    same(out[: len(features)], features)
    # and nothing else
    assert (out[len(features) :] == 77).all()
    if layers:
        same(out_scales[: len(scales)], scales)
        assert (out_scales[len(scales) :] == -5).all()
    for name, tensor in step.items():
        assert tensor is None or torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topk", [1, 4])
def test_a_step(topk, dtype, layers, where):
    for rows in (None, [0, 2]):
        check(make_step(3, 7, 3, 3 * 33, dtype, topk, rows, where), layers)


@pytest.mark.parametrize(("size", "nodes", "path"), [(1, 1, 1), (1, 2, 2), (3, 1, 1), (2, 64, 17)])
def test_rounds_of_any_size(size, nodes, path, where):
    """Plain rounds too, whose tokens are int32."""
    step = make_step(size, nodes, path, 48, torch.bfloat16, 1, None, where)
    step["draft_tokens"] = step["draft_tokens"].int()
    check(step, 3)


def test_more_requests_than_one_load(where):
    """The place of a row is the sum of all accept lengths before it, however many."""
    kept = [n for n in range(78) if n % 7]
    assert len(kept) > module.MAX_NODES
    check(make_step(78, 2, 2, 8, torch.float32, 1, kept, where), 1)


def test_rows_that_lie_apart(where):
    step = make_step(3, 5, 3, 100, torch.bfloat16, 1, None, where)
    step["hidden"] = step["hidden"][:, 2:98]
    check(step, 3)
    check(step, 0)
    same(float8(step["hidden"], 3)[0], float8_ref(step["hidden"], 3)[0])


def test_a_row_in_several_parts(where):
    assert module._parts(3 * 4096) == 3 and module._parts(8190) == 2
    assert module._parts(7) == module._parts(5003) == 1
    check(make_step(2, 3, 2, 8190, torch.bfloat16, 1, None, where), 0)
    check(make_step(1, 3, 2, 4098, torch.bfloat16, 1, None, where), 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_of_odd_rows(dtype, where):
    x = torch.randn(9, 3 * 37, generator=torch.Generator().manual_seed(1))
    factor = torch.tensor([1.0, 1e-3, 1e3, 1e-30, 0.0, 1.0, 1.0, 1.0, 1.0])[:, None]
    x = (x * factor).to(dtype)
    x[5, 3], x[6, 50], x[7, 100] = float("nan"), float("inf"), -float("inf")
    # one huge, so that all others are below its smallest step
    x[8] *= 1e-4
    x[8, ::37] = 1e4
    codes, scales = float8(x.to(where), 3)
    expected = float8_ref(x.to(where), 3)
    same(codes, expected[0])
    same(scales, expected[1])
    assert not scales[5, 0].isfinite() and scales[5, 1:].isfinite().all()
    assert not scales[6, 1].isfinite() and not scales[7, 2].isfinite()
    assert scales[[0, 1, 2, 3, 4, 8]].isfinite().all() and (codes[4] & 0x7F == 0).all()


def test_every_code_and_every_middle_between_two(where):
    """All 253 numbers of e4m3, what lies between them, and what lies next to that."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()].sort().values
    middles = (values[1:] + values[:-1]) / 2
    infinity = torch.tensor(float("inf"))
    around = [middles, middles.nextafter(infinity), middles.nextafter(-infinity)]
    # the largest is in every row, so that each scale is 1
    row = torch.cat([values, *around])[None].to(where)
    found, scales = float8(row, 1)
    assert scales.tolist() == [[1.0]]
    same(found, float8_ref(row, 1)[0])
    same(found.view(torch.float8_e4m3fn).float()[0, : len(values)].cpu(), values)


def test_nothing_at_all(where):
    step = make_step(2, 3, 2, 12, torch.float32, 1, [], where)
    check(step, 3)
    codes, scales = float8(torch.zeros(0, 12, device=where), 3)
    assert codes.shape == (0, 12) and scales.shape == (0, 3)


@pytest.mark.parametrize("layers", [0, 3])
def test_full_size(layers, gpu):
    check(make_step(64, 5, 5, 3 * 4096, torch.bfloat16, 1, None, gpu), layers)
    check(make_step(48, 32, 6, 3 * 7168, torch.bfloat16, 4, list(range(0, 48, 3)), gpu), layers)


def test_captured_in_a_cuda_graph(gpu):
    step = make_step(8, 5, 5, 3 * 128, torch.bfloat16, 1, None, gpu)
    ints = torch.empty(8, ints_width(5, 5, False), dtype=torch.int32, device=gpu)
    features = torch.empty(40, 384, dtype=torch.uint8, device=gpu)
    scales = torch.empty(40, 3, device=gpu)
    # compiles
    pack_step(step, ints, features, scales)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pack_step(step, ints, features, scales)
    for seed in (1, 2):
        other = make_step(8, 5, 5, 3 * 128, torch.bfloat16, 1, None, gpu, seed)
        for name, tensor in other.items():
            if tensor is not None:
                step[name].copy_(tensor)
        graph.replay()
        for found, expected in zip((ints, features, scales), pack_step_ref(step, 3)):
            same(found[: len(expected)], expected)
