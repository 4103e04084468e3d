"""Packed weights on the CPU: the same products, never those of a weight that was written since."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from aurora_sglang_plugin.cpu_engine import packed


@pytest.fixture
def weight() -> torch.nn.Parameter:
    torch.manual_seed(0)
    return torch.nn.Parameter(torch.randn(96, 64).bfloat16() / 8, requires_grad=False)


def unpacked(*args, **kwargs):
    return "original"


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 8, 300])
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_is_the_linear_layers(weight, rows, biased):
    x, bias = torch.randn(rows, 64).bfloat16(), torch.randn(96).bfloat16() if biased else None
    found = packed._linear(unpacked, None, SimpleNamespace(weight=weight), x, bias)
    exact = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    torch.testing.assert_close(found.float(), exact, rtol=2**-7, atol=2**-7)
    assert found.dtype == torch.bfloat16 and found.shape == (rows, 96)


@torch.inference_mode()
def test_what_it_does_not_compute_is_sglangs(weight):
    x = torch.randn(8, 64).bfloat16()
    cases = [
        (x.float(), weight.float()),
        (x, weight.float()),
        (x[:0], weight),
        (x, torch.randn(64, 96).bfloat16().T),
        (x, None),
    ]
    for some, of in cases:
        assert packed._linear(unpacked, None, SimpleNamespace(weight=of), some) == "original"
    plain = SimpleNamespace(use_fp32_lm_head=False)
    assert torch.is_tensor(packed._head(unpacked, plain, x, SimpleNamespace(weight=weight)))
    assert (
        packed._head(unpacked, plain, x, SimpleNamespace(weight=weight, apply_lora=print))
        == "original"
    )
    exact = SimpleNamespace(use_fp32_lm_head=True)
    assert packed._head(unpacked, exact, x, SimpleNamespace(weight=weight)) == "original"


@torch.inference_mode()
def test_a_written_weight_is_packed_again(weight):
    x = torch.eye(64).bfloat16()

    def stale() -> bool:
        return not torch.equal(packed.product(x, weight, None), weight.T)

    assert not stale()
    weight.mul_(2)
    assert not stale()
    # as SGLang's loaders write: nothing counts it, so whoever calls them does
    weight.data.mul_(2)
    assert stale()
    packed._write(lambda: None)
    assert not stale()
    weight.data.mul_(2)
    # as Aurora's swap does
    torch.autograd.graph.increment_version([weight])
    assert not stale()

    def fails():
        weight.data.mul_(2)
        raise RuntimeError("half of it was loaded")

    with pytest.raises(RuntimeError, match="half"):
        packed._write(fails)
    assert not stale()


def test_sglang_has_what_is_hooked():
    code = (
        "from aurora_sglang_plugin import cpu_engine; cpu_engine.install()\n"
        "from pkgutil import resolve_name; from aurora_sglang_plugin.cpu_engine.packed import *\n"
        "for name in (LINEAR, HEAD, *WRITERS): assert callable(resolve_name(name)), name"
    )
    env = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
