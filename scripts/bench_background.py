"""What writing versions and checkpoints costs the training loop: written by the loop itself, and
beside it from a snapshot, in turns of one run.

    python scripts/bench_background.py [--parameters 300] [--directory DIR] [--rounds 3]

The loop here does nothing but tick every millisecond: the longest time between two ticks is what
training and intake would have stood still for. The snapshot is part of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from aurora_sglang_plugin.disk_faults import Retry
from aurora_sglang_plugin.weights.writer import WeightsWriter
from aurora_trainer.background_writer import Background
from aurora_trainer.checkpoint import save_checkpoint
from aurora_trainer.learn.learner import copied

TICK_S = 0.001
WIDTH = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parameters", type=float, default=300, help="millions, of the draft")
    parser.add_argument("--directory", type=Path, help="where to write; a temporary one")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(dir=options.directory))
    try:
        print(json.dumps(measure(home, int(options.parameters * 1e6), options.rounds), indent=1))
    finally:
        shutil.rmtree(home)


def measure(home: Path, parameters: int, rounds: int) -> dict:
    """Seconds: the longest and the 99th percentile between two ticks, and of the whole."""
    rows = max(1, parameters // WIDTH)
    draft = torch.randn(rows, WIDTH).bfloat16()
    # a version is the draft, a checkpoint the draft with float32 masters and two moments
    state = {f"{part}.weight": torch.randn(rows, WIDTH) for part in ("master", "first", "second")}
    writer = WeightsWriter(home / "weights", keep=2)
    (home / "checkpoints").mkdir()
    held: dict[str, torch.Tensor] = {}
    found: dict[str, list[tuple[float, float, float]]] = {"by the loop": [], "beside it": []}
    for number in range(rounds):
        for how, ticks in found.items():
            draft[0] = torch.randn(WIDTH).bfloat16()
            background = Background(
                {name: Retry(name) for name in ("publish", "checkpoint")},
                waits=how == "by the loop",
            )
            where = home / "checkpoints"
            ticks.append(write(background, writer, where, draft, state, held, number))
            background.close()
    writer.close()
    return {
        "parameters": draft.numel(),
        "version_bytes": draft.nbytes,
        "checkpoint_bytes": draft.nbytes + sum(t.nbytes for t in state.values()),
        "torch": torch.__version__,
        "seconds": {
            how: dict(zip(("longest_gap", "p99_gap", "whole"), np.median(ticks, 0).round(4)))
            for how, ticks in found.items()
        },
    }


def write(
    background: Background,
    writer: WeightsWriter,
    checkpoints: Path,
    draft: torch.Tensor,
    state: dict[str, torch.Tensor],
    held: dict[str, torch.Tensor],
    step: int,
) -> tuple[float, float, float]:
    def version():
        copy = {"fc.weight": draft.clone()}
        return lambda: writer.publish(copy, {}, target="t", parent=0, optimizer_step=step)

    def checkpoint():
        copy = copied(held, (state | {"draft.weight": draft}).items())
        return lambda: save_checkpoint(checkpoints, step, copy, {}, 2)

    def nothing(*_) -> None:
        pass

    began = last = time.monotonic()
    gaps = []
    background.start("publish", version, nothing, nothing, 0.0)
    background.start("checkpoint", checkpoint, nothing, nothing, 0.0)
    while True:
        now = time.monotonic()
        gaps.append(now - last)
        last = now
        background.poll(0.0)
        if not (background.busy("publish") or background.busy("checkpoint")):
            break
        time.sleep(TICK_S)
    return max(gaps), float(np.percentile(gaps, 99)), time.monotonic() - began


if __name__ == "__main__":
    main()
