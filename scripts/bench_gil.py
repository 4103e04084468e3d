"""What the watcher's thread costs the scheduler's: a thread ticks every millisecond while a
published version is read, checked and staged.

    python scripts/bench_gil.py [--megabytes 1024] [--out FILE]

A thread that keeps the interpreter's lock stops every other one of its process. A process of its
own ticks beside it: what it misses is the machine's doing, not the lock's. The version is one
matrix of bfloat16, copied to a staging parameter.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from aurora_sglang_plugin.weights.reader import Expected, read_weights
from aurora_sglang_plugin.weights.writer import WeightsWriter

TICK_S = 0.001
WIDTH = 4096


class Ticks:
    """The times between two ticks, of this thread or process."""

    def __init__(self):
        self.gaps: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        last = time.perf_counter()
        while not self._over.is_set():
            time.sleep(TICK_S)
            now = time.perf_counter()
            self.gaps.append(now - last)
            last = now

    def stop(self) -> list[float]:
        self._over.set()
        self._thread.join()
        return self.gaps


def beside(over, gaps) -> None:
    """Ticks of a process that shares no lock with this one, until `over`."""
    ticks = Ticks()
    over.wait()
    gaps.put(ticks.stop())


def stage(version: Path, expected: Expected, staging: nn.Parameter) -> None:
    """As the watcher's thread: read, check, load."""
    found = read_weights(version, expected)
    _, array = found.tensors["fc.weight"]
    with torch.no_grad():
        staging.copy_(torch.from_numpy(array).view(torch.bfloat16))


def measure(megabytes: int) -> dict:
    """Gaps in milliseconds: of a thread beside the watcher's work, and of a process meanwhile."""
    home = Path(tempfile.mkdtemp())
    spawn = multiprocessing.get_context("spawn")
    over, gaps = spawn.Event(), spawn.Queue()
    try:
        rows = (megabytes << 20) // (2 * WIDTH)
        weights = {"fc.weight": torch.randn(rows, WIDTH).bfloat16()}
        writer = WeightsWriter(home)
        version = writer.publish(weights, {}, target="t", parent=0, optimizer_step=1)
        writer.close()
        expected = Expected("t", {"fc.weight": (rows, WIDTH)}, 1, {})
        staging = nn.Parameter(torch.empty(rows, WIDTH, dtype=torch.bfloat16))
        process = spawn.Process(target=beside, args=(over, gaps), daemon=True)
        process.start()
        time.sleep(1.0)
        ticks, began = Ticks(), time.monotonic()
        worker = threading.Thread(target=stage, args=(home / f"v{version:06d}", expected, staging))
        worker.start()
        worker.join()
        seconds, inside = time.monotonic() - began, ticks.stop()
        over.set()
        outside = gaps.get(timeout=60)
        process.join(60)
        assert torch.equal(staging.data, weights["fc.weight"])
    finally:
        shutil.rmtree(home)
    return {
        "megabytes": megabytes,
        "seconds": round(seconds, 3),
        "longest_gap_ms": round(1e3 * max(inside), 2),
        "p99_gap_ms": round(1e3 * float(np.percentile(inside, 99)), 2),
        "longest_gap_of_another_process_ms": round(1e3 * max(outside), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--megabytes", type=int, default=1024, help="of the version")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    text = json.dumps(measure(options.megabytes) | {"torch": torch.__version__}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
