"""A trainer with small settings, in this process or in one of its own, and a server that sends it
traffic.
"""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import zmq
from traffic import HIDDEN, VOCAB, messages

from aurora_sglang_plugin.weights.manifest import target_fingerprint
from aurora_trainer.config import load_trainer_config


def overrides(models, site: Path, **more) -> list[str]:
    settings = {
        "link.endpoint": f"ipc://{site}/link",
        "weights.directory": site / "weights",
        "trainer.model.target": models / "target",
        "trainer.model.draft": models / "draft",
        "trainer.checkpoint.directory": site / "checkpoints",
        "trainer.checkpoint.every_s": 0,
        "trainer.checkpoint.every_steps": 7,
        "trainer.metrics.status_file": site / "status.json",
        "trainer.metrics.every_s": 0.2,
        "trainer.publish.every_s": 0,
        "trainer.publish.every_steps": 10,
        "trainer.pace.new_positions_per_step": 20,
        "trainer.pace.nice": 0,
        "trainer.batch.max_positions": 256,
        "trainer.optimizer.lr": 4e-3,
        "trainer.gate.requests": 6,
        "trainer.gate.min_requests": 3,
        "trainer.assemble.eos_token_ids": [VOCAB - 1],
    } | {k.replace("__", "."): v for k, v in more.items()}
    return [f"{k}={v}" for k, v in settings.items()]


def command(models, site: Path, name: str, *arguments: str, **more) -> list[str]:
    sets = [a for o in overrides(models, site, **more) for a in ("--set", o)]
    return [sys.executable, "-m", "aurora_trainer", name, *sets, *arguments]


def config(models, site: Path, **more):
    return load_trainer_config(None, overrides(models, site, **more))


class Server:
    """The sending end of a live link."""

    def __init__(self, site: Path):
        self.socket = zmq.Context.instance().socket(zmq.PUSH)
        self.socket.linger = 0
        self.socket.connect(f"ipc://{site}/link")

    def send(self, parts_of_all) -> int:
        count = 0
        for parts in parts_of_all:
            assert self.socket.poll(10_000, zmq.POLLOUT), "the trainer stopped taking messages"
            self.socket.send_multipart(parts)
            count += 1
        return count


@contextlib.contextmanager
def live(models, site: Path, *arguments: str, **more):
    process = subprocess.Popen(
        command(models, site, "run", *arguments, **more), stderr=subprocess.PIPE, text=True
    )
    server = Server(site)
    try:
        yield process, server
    finally:
        process.kill()
        process.wait()
        server.socket.close()


def status_when(site: Path, condition, timeout_s: float = 60.0) -> dict:
    deadline, status = time.monotonic() + timeout_s, {}
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            status = json.loads((site / "status.json").read_text())
            if condition(status):
                return status
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s} s: {status}")


def traffic(models, requests: int, session: str):
    target = target_fingerprint(models / "target")
    return messages(
        target=target, vocab=VOCAB, features=3 * HIDDEN, requests=requests, session=session
    )
