"""SGLang's CPU path on a processor for which no `sgl_kernel` is built: pure-torch stand-ins, for
tests and the demo.

SGLang imports `sgl_kernel` and `torchvision` by name, in every process and before general plugins
load, but after it asked the `sglang.srt.platforms` entry points what machine this is. `activate` is
such an entry point: it claims no platform, it only puts the stand-ins into place, and does so when
all of this holds:
    SGLANG_USE_CPU_ENGINE=1, CUDA is not available, and the real package is not installed.
A real package is never shadowed, and a GPU server never sees this code.

What verifies sampled requests stands in for CUDA kernels, in modules of SGLang itself: the general
plugin puts it there (`sampling.attach`), for AURORA and EAGLE3 alike.

`convert_weight_packed` is left undefined on purpose: its presence is SGLang's test for the AMX
build.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def activate() -> None:
    """Entry point `sglang.srt.platforms`: never a platform of its own (None), only the
    stand-ins.
    """
    install()


def install() -> bool:
    """Put the stand-ins into sys.modules if they are wanted and missing; True if `sgl_kernel` is
    ours.
    """
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        return False
    import torch

    if torch.cuda.is_available():
        return False
    if "sgl_kernel" not in sys.modules and importlib.util.find_spec("sgl_kernel") is None:
        _install_sgl_kernel(torch.ops.sgl_kernel)
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        _install_torchvision()
    return is_installed()


def is_installed() -> bool:
    return getattr(sys.modules.get("sgl_kernel"), "AURORA_STAND_IN", False)


def keeps_packed_weights() -> bool:
    """Whether products with bfloat16 weights keep a copy of each (packed.py), which takes the
    memory of the weights.
    """
    return os.environ.get("AURORA_CPU_PACK") == "1"


def _install_sgl_kernel(ops) -> None:
    from aurora_sglang_plugin.cpu_engine import attention, hashing, slots, tree

    module = _module("sgl_kernel", AURORA_STAND_IN=True)
    for source in (slots, tree):
        for name, value in vars(source).items():
            if name.endswith("_cpu"):
                setattr(module, name, value)
    # Plain attributes of the namespace: SGLang only calls them, and a dispatcher would cost more
    # than some of them do.
    ops.decode_attention_cpu = attention.decode_attention_cpu
    ops.extend_attention_cpu = attention.extend_attention_cpu
    murmur: Any = hashing.murmur_hash32_cpu
    ops.murmur_hash32_cpu = murmur
    murmur.default = murmur


def _install_torchvision() -> None:
    """Names that SGLang's multimodal configs import eagerly; using one of them fails on the missing
    attribute.
    """
    from transformers.utils.import_utils import is_torchvision_available

    # answered once and remembered: transformers must not take the stand-in for the package
    is_torchvision_available()
    interpolation = type("InterpolationMode", (), {"BICUBIC": "bicubic", "BILINEAR": "bilinear"})
    functional = _module("torchvision.transforms.functional", InterpolationMode=interpolation)
    transforms = _module(
        "torchvision.transforms", InterpolationMode=interpolation, functional=functional
    )
    _module("torchvision", transforms=transforms)


def _module(name: str, **members) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(members)
    sys.modules[name] = module
    return module
