"""The demo itself: Ctrl-C at any moment leaves neither a process nor a traceback behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
# a busy machine takes minutes over the imports
WAIT_S = 300


@pytest.fixture(scope="module")
def quick_target() -> Path:
    """The target of the loop's tests; made here if those did not run."""
    directory = ROOT / ".cache/target-quick"
    command = [sys.executable, ROOT / "scripts" / "make_target.py", "--quick", "--out", directory]
    subprocess.run(command, check=True, cwd=ROOT)
    return directory


def imports_torch(demo: psutil.Process, output: str) -> bool:
    return any("libtorch" in place.path for place in demo.memory_maps())


def makes_the_draft(demo: psutil.Process, output: str) -> bool:
    return any("init-draft" in child.cmdline() for child in demo.children())


def starts_the_server(demo: psutil.Process, output: str) -> bool:
    return len(demo.children(recursive=True)) > 3


def serves(demo: psutil.Process, output: str) -> bool:
    return "tokens/s" in output


@pytest.mark.parametrize(
    ("moment", "number", "ignored"),
    [
        (imports_torch, signal.SIGINT, False),
        # Ignored from the start, as in a job that a script starts in the background.
        (makes_the_draft, signal.SIGINT, True),
        (starts_the_server, signal.SIGTERM, False),
        (serves, signal.SIGINT, False),
    ],
)
def test_an_interrupt_leaves_nothing(quick_target, tmp_path, moment, number, ignored):
    command = [
        sys.executable,
        ROOT / "scripts" / "demo.py",
        "--target",
        quick_target,
        "--minutes",
        "3",
        "--home",
        tmp_path,
    ]
    started, status, output = interrupt(command, tmp_path / "output", moment, number, ignored)
    assert status != 0 and "interrupted" in output, output
    assert ("its logs are in" in output) == (tmp_path / "demo-random").exists(), output
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive, (alive, output)
    assert "Traceback" not in output, output


def interrupt(
    command: list,
    file: Path,
    moment: Callable[[psutil.Process, str], bool],
    number: int,
    ignored: bool,
) -> tuple[list[psutil.Process], int, str]:
    """(what it had started, its status, its output) of a command that gets a signal at a moment."""

    def before() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.SIG_DFL)

    with open(file, "wb") as out:
        # A group of its own, which a terminal's Ctrl-C would signal as a whole.
        demo = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True, preexec_fn=before
        )
    try:
        process, deadline = psutil.Process(demo.pid), time.monotonic() + WAIT_S
        while not moment(process, file.read_text()):
            assert demo.poll() is None and time.monotonic() < deadline, file.read_text()
            time.sleep(0.1)
        started = process.children(recursive=True)
        os.killpg(demo.pid, number)
        return started, demo.wait(60), file.read_text()
    finally:
        demo.kill()
