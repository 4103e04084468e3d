"""Child processes of a demo, which end with it, and what Ctrl-C does to it at any moment.

Children have a process group of their own, so that a terminal's Ctrl-C reaches the demo alone,
which then ends them.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from subprocess import Popen
from types import FrameType

PR_SET_PDEATHSIG = 1
TRAINER = [sys.executable, "-m", "aurora_trainer"]


def start(
    command: Sequence[str | Path], log: Path | None = None, env: Mapping[str, str] | None = None
) -> Popen:
    """A child in a group of its own, which dies with this process. Its output goes to `log`."""
    with open(log, "wb") if log else nullcontext() as output:
        return Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=env,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def run_to_end(command: Sequence[str | Path]) -> None:
    """Start the command and wait for it. Raises subprocess.CalledProcessError if it fails."""
    process = start(command)
    try:
        status = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if status:
        raise subprocess.CalledProcessError(status, command)


def die_with_parent() -> None:
    # With the thread that starts the child, to be exact. SGLang's children die with their parent in
    # the same way.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Trainer:
    """`aurora-trainer run` in a process that ends with the `with` block, or with this one."""

    def __init__(self, config: Path, log: Path, *arguments: str):
        self.log = log
        self.process = start([*TRAINER, "run", "--config", config, *arguments], log)

    def check(self) -> None:
        """Raises RuntimeError if it has ended by itself."""
        if self.process.poll() is not None:
            raise RuntimeError(f"the trainer ended with {self.process.returncode}; see {self.log}")

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except BaseException as error:
            self.process.kill()
            self.process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise


def until_interrupted(main: Callable[[], None], logs: Path) -> None:
    """Call `main`; Ctrl-C and SIGTERM end it with one line, which names the folder `logs`.

    Also if SIGINT was ignored, as in a job that a script started in the background: whoever
    sends it means it.
    """
    caught: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        main()
    # Libraries that are being imported turn the interrupt into errors of their own.
    except BaseException:
        if not caught:
            raise
        sys.exit("\ninterrupted" + (f"; its logs are in {logs}" if logs.exists() else ""))
