"""When an operation runs its Triton kernels, and when its PyTorch reference."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def use_kernels(x: Tensor) -> bool:
    """True for float32, bfloat16 and float16 tensors on an NVIDIA GPU from sm_80 on, and anywhere
    in Triton's interpreter (TRITON_INTERPRET=1, set before this package is imported: slow, for
    tests). float64 is the references' alone."""
    if x.dtype not in DTYPES:
        return False
    return triton.knobs.runtime.interpret or kernels_run_on(x.device)


def kernels_run_on(device: torch.device) -> bool:
    """True for an NVIDIA GPU from sm_80 on."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
