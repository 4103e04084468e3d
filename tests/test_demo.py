"""The demo itself: Ctrl-C, at any moment, leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def quick_target() -> None:
    """The target of the loop's tests; made here where those did not run."""
    command = [sys.executable, ROOT / "scripts" / "make_target.py", "--quick", "--out", ROOT / ".cache/target-quick"]
    subprocess.run(command, check=True, cwd=ROOT)


@pytest.mark.parametrize("seconds", [4, 14, 40])  # the trainer starts, the server starts, traffic runs
def test_ctrl_c_leaves_nothing(quick_target, tmp_path, seconds):
    (tmp_path / "target-quick").symlink_to(ROOT / ".cache/target-quick")
    command = [sys.executable, ROOT / "scripts" / "demo.py", "--quick", "--minutes", "3", "--home", tmp_path]
    # A group of its own, which a terminal's Ctrl-C would signal as a whole.
    demo = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    time.sleep(seconds)
    started = psutil.Process(demo.pid).children(recursive=True)
    os.killpg(demo.pid, signal.SIGINT)
    output = demo.communicate(timeout=60)[0].decode()
    assert demo.returncode != 0 and "interrupted" in output, output
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive, (alive, output)
    assert "Traceback" not in output, output
