"""What encryption costs: publisher to receiver in one process, plain and with keys in turns,
messages of a megabyte.

    python scripts/bench_link.py [MESSAGES] [ROUNDS]

Every figure is the median of the rounds. `offer` is what the scheduler's thread does; encryption is
the I/O thread's.
"""

import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from aurora_sglang_plugin.config import LinkConfig, PublishConfig
from aurora_sglang_plugin.link.keys import make_keys
from aurora_sglang_plugin.link.publisher import Publisher
from aurora_sglang_plugin.link.receiver import ReceiveConfig, Receiver

# of float32: 1 MiB
TOKENS, FEATURES = 64, 4096


class Chunk:
    """A prefill chunk as the publisher takes it."""

    nbytes = TOKENS * FEATURES * 4

    def __init__(self):
        one = {"positions": 0, "extend_lens": TOKENS, "feature_lens": TOKENS, "prompt_lens": TOKENS}
        self.arrays = {name: ("int32", np.full(1, value, np.int32)) for name, value in one.items()}
        self.arrays["input_ids"] = ("int32", np.zeros(TOKENS, np.int32))
        self.arrays["next_tokens"] = ("int32", np.zeros(1, np.int32))
        self.arrays["aux_hidden_states"] = ("float32", np.zeros((TOKENS, FEATURES), np.float32))

    def unload(self):
        pass

    def build(self):
        return self.arrays


def measure(link: LinkConfig, messages: int) -> dict[str, float]:
    receiver, publisher = (
        Receiver(link, ReceiveConfig(), None),
        Publisher(link, PublishConfig(queue_bytes=8 << 30), ""),
    )
    # the first heartbeat: connected
    while not receiver.ledger()["sessions"]:
        time.sleep(0.01)
    chunk, offers = Chunk(), []
    began, processor = time.perf_counter(), time.process_time()
    for _ in range(messages):
        start = time.perf_counter()
        publisher.offer("prefill", chunk, requests=["r"])
        offers.append(time.perf_counter() - start)
    for _ in range(messages):
        assert receiver.get(30.0) is not None
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    publisher.close()
    receiver.close()
    megabytes = messages * Chunk.nbytes / 1e6
    return {
        "MB/s": megabytes / seconds,
        "CPU ms per MB": processor / megabytes * 1e3,
        "offer us, median": statistics.median(offers) * 1e6,
        "offer us, 99.9%": float(np.quantile(offers, 0.999)) * 1e6,
    }


def endpoint(scheme: str, folder: Path) -> str:
    if scheme == "ipc":
        return f"ipc://{folder}/{time.monotonic_ns()}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def main(messages: int = 400, rounds: int = 5) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_keys(folder / "keys", ["server"])
        keys = {"trainer_keys": folder / "keys/trainer", "server_keys": folder / "keys/server"}
        for scheme in ("tcp", "ipc"):
            turns: dict[str, list[dict[str, float]]] = {"plain": [], "curve": []}
            for _ in range(rounds):
                turns["plain"].append(
                    measure(LinkConfig(endpoint=endpoint(scheme, folder)), messages)
                )
                turns["curve"].append(
                    measure(LinkConfig(endpoint=endpoint(scheme, folder), **keys), messages)
                )
            for kind, found in turns.items():
                figures = {
                    name: statistics.median(turn[name] for turn in found) for name in found[0]
                }
                print(
                    f"{scheme} {kind}: "
                    + ", ".join(f"{value:.2f} {name}" for name, value in figures.items())
                )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
