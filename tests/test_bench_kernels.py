"""The kernels' bench runs from end to end at toy sizes, and gives no figure if a side is
wrong.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_timing import Bench

SCRIPT = Path(__file__).parents[1] / "scripts/bench_kernels.py"


def run_bench(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True)


def test_every_side_of_every_operation(tmp_path):
    run = run_bench("--device", "cpu", "--tiny", "--out", tmp_path / "bench.json")
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "bench.json").read_text())
    rows = {(row["op"], row["setting"], row["side"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) > 40
    for (op, _, side), row in rows.items():
        if (op, side) == ("tree_attention fwd+bwd", "flex, compiled"):
            # a side that cannot run is a row
            assert "backward on CPU" in row["note"] and row["ms"] is None
        elif row["ms"] is None and side.endswith("compiled"):
            # a machine without a compiler
            assert row["note"] and not row["note"].startswith("WRONG"), row
        else:
            assert row["ms"] is not None and row["ms"] > 0, row
    assert {"about", "rows", "aims"} == set(result) and {
        "date",
        "device",
        "torch",
        "triton",
    } <= set(result["about"])
    assert any("causal flash" in line for line in run.stdout.splitlines())
    assert all(line.startswith("aim: ") for line in result["aims"]) and result["aims"]


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_no_figure_on_a_red_check(error):
    row = Bench("cpu", 60.0).row(
        "op", "setting", "side", 1.0, lambda: None, lambda: error, limit=0.01
    )
    assert row["ms"] is row["rate"] is None and "WRONG" in row["note"]


def test_what_fails_or_comes_too_late_is_a_row():
    def fail():
        raise torch.OutOfMemoryError("no memory\nmore")

    assert (
        Bench("cpu", 60.0).row("op", "setting", "side", 1.0, fail)["note"]
        == "OutOfMemoryError: no memory"
    )
    assert "out of time" in Bench("cpu", -1.0).row("op", "setting", "side", 1.0, fail)["note"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    run = run_bench()
    assert run.returncode != 0 and "no CUDA GPU here" in run.stderr
    run = run_bench("--device", "cpu")
    assert run.returncode != 0 and "figures need a GPU" in run.stderr
