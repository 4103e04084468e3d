"""The draft's rotary embedding, computed as SGLang 0.5.23 does (srt/layers/rotary_embedding:
base.py, yarn.py and rope_variant.py); tests/plugin/drafts/test_eagle3_check.py compares with
SGLang's own tables.

Dimensions: D head, R rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from aurora_sglang_plugin.drafts.eagle3_config import DraftConfig
from aurora_sglang_plugin.drafts.eagle3_rope import ORIGINAL


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding in neox style of x [R, heads, D] by rope [R, D] = cat(cos, sin)."""
    cos, sin = rope[:, None].to(x.dtype).chunk(2, -1)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def inverse_frequencies(config: DraftConfig) -> Tensor:
    """float32 [D / 2]."""
    d, scaling = config.head_dim, config.rope_scaling
    powers = config.rope_theta ** (torch.arange(0, d, 2, dtype=torch.float) / d)
    if scaling is None:
        return 1.0 / powers
    computed = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}[scaling["rope_type"]]
    return computed(powers, scaling, config)


def magnitude(config: DraftConfig) -> float:
    """What cosines and sines are multiplied by: yarn's attention factor, else 1."""
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] != "yarn":
        return 1.0
    factor = scaling["factor"]

    def of(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    both = scaling.get("mscale") is not None and scaling.get("mscale_all_dim") is not None
    size = of(scaling["mscale"]) / of(scaling["mscale_all_dim"]) if both else of(1.0)
    return size * scaling["attn_factor"]


def _linear(powers: Tensor, scaling: dict[str, Any], config: DraftConfig) -> Tensor:
    return 1.0 / powers / scaling["factor"]


def _llama3(powers: Tensor, scaling: dict[str, Any], config: DraftConfig) -> Tensor:
    freqs = 1.0 / powers
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original, factor = scaling[ORIGINAL], scaling["factor"]
    wavelength = 2 * math.pi / freqs
    smooth = (original / wavelength - low) / (high - low) if low != high else 0
    between = (1 - smooth) * freqs / factor + smooth * freqs
    long = torch.where(wavelength > original / low, freqs / factor, between)
    return torch.where(wavelength < original / high, freqs, long)


def _yarn(powers: Tensor, scaling: dict[str, Any], config: DraftConfig) -> Tensor:
    """Frequencies that turn often within the original length stay, slow ones are stretched, with a
    ramp between."""
    d, theta = config.head_dim, config.rope_theta

    def dimension(turns: float) -> float:
        """Where a frequency turns so often within the original length."""
        return d * math.log(scaling[ORIGINAL] / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling["beta_fast"]), dimension(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(d // 2, dtype=torch.float) - low) / (high - low)).clamp(0, 1)
    kept = (1 - ramp) * scaling["extrapolation_factor"]
    return 1.0 / (scaling["factor"] * powers) * (1 - kept) + 1.0 / powers * kept
