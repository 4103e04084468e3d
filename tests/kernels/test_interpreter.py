"""Runs every test_*_kernels.py of this folder in Triton's interpreter, each in its own process (see
conftest.py).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("test_*_kernels.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_kernels_in_the_interpreter(path):
    command = [sys.executable, "-m", "pytest", str(path), "--no-header", "-p", "no:cacheprovider"]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    # shown if this test fails, and with -s
    print(run.stdout)
    assert run.returncode == 0, f"{path.name} fails in the interpreter, see the output above"
    assert re.search(r"\b[1-9]\d* passed", run.stdout), "nothing was run"
