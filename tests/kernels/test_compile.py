"""Every kernel compiles for the GPUs that it is meant for, without one, and stays within their
registers and memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from compile_cuda import COLUMNS, kernels_of, modules

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="the interpreter does not compile"
)
SCRIPT = Path(__file__).with_name("compile_cuda.py")
# most that one block can have
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# of those that may spill
STACK_BYTES = {
    # with 16 bits before and after their loops, at most 88; more in float32, which has no tensor
    # cores and is for tests
    "tree_attention_fwd_kernel": 160,
    "tree_attention_bwd_q_kernel": 384,
    # the call of a division on sm_80
    "pack_step_kernel": 8,
    "float8_kernel": 8,
    # by Triton 3.6 in float32, 3.9 spills nothing
    "tree_attention_bwd_nodes_kernel": 32,
    # heads of 256 on sm_90, else at most 48: two sums of 64 x 256 in registers
    "tree_attention_bwd_positions_kernel": 224,
}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, SCRIPT, "--json"], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    for row in rows:
        print(*(f"{row[column]:>12}" for column in COLUMNS))
    print(len(rows), "specialisations")
    return rows


def test_every_kernel_is_compiled_for_every_gpu(rows):
    named = {(row["file"], row["kernel"], row["capability"]) for row in rows}
    expected = {
        (module.__name__.rpartition(".")[2], kernel, capability)
        for module in modules()
        for kernel in kernels_of(module)
        for capability in SHARED_BYTES
    }
    assert expected and not expected - named, "a kernel that specialisations.py never yields"


def test_registers_spills_and_shared_memory_are_bounded(rows):
    for row in rows:
        assert row["registers"] <= 255, row
        assert row["stack_bytes"] <= STACK_BYTES.get(row["kernel"], 0), row
        assert row["shared_bytes"] <= SHARED_BYTES[row["capability"]], row
