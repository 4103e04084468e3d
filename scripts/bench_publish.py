"""What a captured verify step costs the publisher's thread and the scheduler's `offer`, with a
trainer that receives.

    python scripts/bench_publish.py [--running 1 8 32] [--out FILE]

Counted is processor time of the thread, most of it under the interpreter's lock, which it shares
with the scheduler (copies of features and maxima over them are not). Steps come every 6 ms, as on a
GPU, so that each finds cold caches. Chains of 3 draft steps with one token accepted, features of
3 x 4096 in bfloat16 and in float8, packed as on a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from aurora_kernels.pack_step import pack_step

from aurora_sglang_plugin.config import LinkConfig, PublishConfig
from aurora_sglang_plugin.link.publisher import Publisher
from aurora_sglang_plugin.serve.accepted_counts import Acceptance
from aurora_sglang_plugin.serve.snapshot import Verify
from aurora_sglang_plugin.serve.step_buffer import StepShape
from aurora_sglang_plugin.serve.transfer import Pinned

STEPS, KEPT, LAYERS = 3, 32, 3
FEATURES = LAYERS * 4096
STEP_S = 0.006
WARM_UP = 50
RECEIVE = """
import sys
from pathlib import Path
from aurora_sglang_plugin.config import LinkConfig
from aurora_sglang_plugin.link.receiver import ReceiveConfig, Receiver
receiver = Receiver(LinkConfig(endpoint=sys.argv[1]), ReceiveConfig(), Path(sys.argv[2]))
print("ready", flush=True)
while True:
    receiver.get(0.1)
"""


class Timed(Publisher):
    """Keeps the processor time that its thread takes for each message."""

    def _send_next(self) -> bool:
        start = time.thread_time()
        sent = super()._send_next()
        self.__dict__.setdefault("seconds", []).append(time.thread_time() - start)
        return sent


def staged(running: int, layers: int) -> tuple[torch.Tensor, StepShape]:
    """What capture.Capture.verify stages on CUDA."""
    generator = torch.Generator().manual_seed(0)
    nodes, rows = STEPS + 1, torch.arange(running)
    logits = torch.randn(running * nodes, KEPT, generator=generator).sort(-1, True).values
    path = torch.full((running, nodes), -1, dtype=torch.int32)
    path[:, 0] = rows * nodes
    shape = StepShape(
        running, nodes, nodes, False, KEPT, torch.float32, FEATURES, layers, torch.bfloat16
    )
    buffer = torch.zeros(shape.nbytes, dtype=torch.uint8)
    views = shape.views(buffer)
    views["topk_ids"].random_(1000, generator=generator)
    views["topk_logits"].copy_(logits)
    views["logsumexp"].copy_(logits.logsumexp(-1) + 0.5)
    step = {
        "hidden": torch.randn(running * nodes, FEATURES, generator=generator).bfloat16(),
        "accept_lens": torch.ones(running, dtype=torch.int32),
        "accept_index": path,
        "positions": (rows + 100).repeat_interleave(nodes),
        "draft_tokens": torch.randint(1000, (running * nodes,)),
        "next_tokens": torch.randint(1000, (running * nodes,), dtype=torch.int32),
    }
    pack_step(step, views["ints"], views["features"], views.get("scales"))
    return buffer, shape


def measure(running: int, layers: int, messages: int, home: Path) -> dict:
    """Medians in microseconds."""
    packed, shape = staged(running, layers)
    acceptance = Acceptance(STEPS)
    fields = dict(
        requests=[f"{row:032x}" for row in range(running)], flags=[0] * running, draft_version=1,
        extend_version=1, num_steps=STEPS, topk=1,
    )  # fmt: skip
    endpoint = f"ipc://{home}/{running}-{layers}"
    command = [sys.executable, "-c", RECEIVE, endpoint, str(home / f"{running}-{layers}.json")]
    receiver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        receiver.stdout.readline()
        publisher = Timed(LinkConfig(endpoint=endpoint), PublishConfig(), "target")
        time.sleep(1)
        offer = []
        for _ in range(messages + WARM_UP):
            pinned = Pinned(packed.numpy(), shape.layout, packed.nbytes, None, None)
            snapshot = Verify(pinned, KEPT, 0, acceptance, layers, (STEPS + 1, STEPS + 1))
            start = time.thread_time()
            publisher.offer("verify", snapshot, **fields)
            offer.append(time.thread_time() - start)
            time.sleep(STEP_S)
        publisher.close()
        counters = publisher.counters()
    finally:
        receiver.kill()
    assert counters["sent"] == messages + WARM_UP and not counters["excluded"], counters
    medians = {
        name: round(1e6 * float(np.median(seconds[WARM_UP:])))
        for name, seconds in (("publisher_us", publisher.seconds), ("offer_us", offer))
    }
    return {
        "running": running,
        "features": "float8" if layers else "bfloat16",
        "message_bytes": counters["bytes_sent"] // counters["sent"],
        **medians,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--running", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--messages", type=int, default=500)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as home:
        for running, layers in product(options.running, (0, LAYERS)):
            results.append(measure(running, layers, options.messages, Path(home)))
            print(json.dumps(results[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
