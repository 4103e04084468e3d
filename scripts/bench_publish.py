"""What a captured verify step costs the publisher's thread and the scheduler's `offer`, with a
trainer that receives.

    python scripts/bench_publish.py [--running 1 8 32] [--out FILE]

Counted is processor time of the thread, most of it under the interpreter's lock, which it shares
with the scheduler (copies of features and maxima over them are not). Steps come every 6 ms, as on a
GPU, so that each finds cold caches. Chains of 3 draft steps with one token accepted, features of
3 x 4096 in bfloat16, packed as transfer.PinnedBuffers does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from aurora_sglang_plugin.config import LinkConfig, PublishConfig
from aurora_sglang_plugin.link.publisher import Publisher
from aurora_sglang_plugin.serve.accepted_counts import Acceptance
from aurora_sglang_plugin.serve.snapshot import Verify
from aurora_sglang_plugin.serve.transfer import Pinned, pack

STEPS, KEPT, FEATURES = 3, 32, 3 * 4096
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


def staged(running: int) -> dict[str, torch.Tensor]:
    """What capture.Capture.verify stages."""
    generator = torch.Generator().manual_seed(0)
    nodes, rows = STEPS + 1, torch.arange(running)
    logits = torch.randn(running * nodes, KEPT, generator=generator).sort(-1, True).values
    path = torch.full((running, nodes), -1, dtype=torch.int32)
    path[:, 0] = rows * nodes
    return {
        "topk_ids": torch.randint(1000, (running * nodes, KEPT), dtype=torch.int32),
        "topk_logits": logits,
        "logsumexp": logits.logsumexp(-1) + 0.5,
        "hidden": torch.randn(running, nodes, FEATURES, generator=generator).bfloat16(),
        "draft_tokens": torch.randint(1000, (running, nodes)),
        "positions": rows + 100,
        "accept_index": path,
        "accept_lens": torch.ones(running, dtype=torch.int32),
        "next_tokens": torch.randint(1000, (running, nodes), dtype=torch.int32),
    }


def measure(running: int, messages: int, home: Path) -> dict:
    """Medians in microseconds."""
    packed, layout = pack(staged(running))
    acceptance = Acceptance(STEPS)
    fields = dict(
        requests=[f"{row:032x}" for row in range(running)], flags=[0] * running, draft_version=1,
        extend_version=1, num_steps=STEPS, topk=1,
    )  # fmt: skip
    endpoint = f"ipc://{home}/{running}"
    command = [sys.executable, "-c", RECEIVE, endpoint, str(home / f"{running}.json")]
    receiver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        receiver.stdout.readline()
        publisher = Timed(LinkConfig(endpoint=endpoint), PublishConfig(), "target")
        time.sleep(1)
        offer = []
        for _ in range(messages + WARM_UP):
            pinned = Pinned(packed.numpy(), layout, packed.nbytes, None, None)
            snapshot = Verify(pinned, KEPT, 0, acceptance)
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
        for running in options.running:
            results.append(measure(running, options.messages, Path(home)))
            print(json.dumps(results[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
