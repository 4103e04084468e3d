"""A message's features, in a dtype that the trainer computes with."""

from __future__ import annotations

import numpy as np
import torch

from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.link.frames import FEATURES, FLOAT8, SCALES

# rows at a time: what is computed in between stays in a core's cache
ROWS = 32


def features_of(message: wire.Message) -> tuple[str, np.ndarray]:
    """(dtype, [T, F]), bfloat16 as its bits. float8 becomes bfloat16, whose steps are 16 times
    finer.
    """
    dtype, array = message.dtype(FEATURES), message.arrays[FEATURES]
    if dtype != FLOAT8:
        return dtype, array
    scales = message.arrays[SCALES]
    bits = np.empty(array.shape, np.uint16)
    for at in range(0, len(array), ROWS):
        part = slice(at, at + ROWS)
        bits[part] = to_bfloat16(array[part], scales[part])
    return "bfloat16", bits


def to_bfloat16(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Bits uint16 [T, F] of e4m3 codes [T, F] with scales [T, A]; codes that are no numbers become
    some number.

    torch's own conversion takes each number for itself. Shifted to the left, e4m3 is float16 but
    for its exponent, which is 8 too small.
    """
    half = torch.from_numpy(codes.view(np.int8).astype(np.int16))
    half = half.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
    parts = half.float().unflatten(1, (scales.shape[1], -1))
    values = parts * torch.from_numpy(scales * 256)[:, :, None]
    return values.flatten(1).bfloat16().view(torch.uint16).numpy()
