"""Tests named test_*_kernels.py run Triton kernels: on a GPU (`make test-gpu`), else in Triton's
interpreter.

The interpreter is chosen when triton is first imported and holds for the whole process, so in `make
test` test_interpreter.py runs those files in processes of their own; elsewhere they are not
collected. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/test_tree_attention_kernels.py
"""

import pytest
import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret
if not (INTERPRETED or torch.cuda.is_available()):
    collect_ignore_glob = ["test_*_kernels.py"]


@pytest.fixture
def device() -> str:
    """Where kernels run: "cpu" in the interpreter, "cuda" otherwise."""
    if INTERPRETED:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    pytest.skip("needs a GPU or TRITON_INTERPRET=1")


@pytest.fixture
def gpu(device) -> str:
    """For tests of full size only: "cuda", or the test is skipped."""
    if device != "cuda":
        pytest.skip("needs a GPU")
    return device


@pytest.fixture
def poison(monkeypatch):
    """Every floating point tensor from torch.empty and its kin is full of NaN from now on, integers
    of a huge value: what a kernel forgets to write, or reads before it is written, shows."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            out = make(*args, **kwargs)
            if isinstance(out, torch.Tensor):
                out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)
            return out

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
