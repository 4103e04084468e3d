"""The whole loop with the real trainer: the accept length climbs, and either side survives the
other's death.

One server and one weights directory for the file; tests run in order and go on from one another.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from children import TRAINER, die_with_parent
from rig import checksums, generate, metrics, wait_until
from safetensors.torch import load_file
from serve import Server, free_port, has_gpu

from aurora_sglang_plugin.weights.manifest import (
    current_version,
    read_manifest,
    sha256_file,
    version_name,
)
from aurora_trainer.drafts.eagle3_init import init_draft

TOKENS = 48
CONFIG = """\
[link]
endpoint = "tcp://127.0.0.1:{port}"
[weights]
directory = "{home}/weights"
[plugin.speculation]
adaptive = false
[trainer.model]
target = "{target}"
draft = "{home}/draft"
[trainer.pace]
nice = 0
[trainer.publish]
every_s = 1.0
[trainer.checkpoint]
directory = "{home}/checkpoints"
every_s = 1.5
[trainer.metrics]
status_file = "{home}/status.json"
every_s = 0.5
"""


class Flywheel:
    """The server, and a trainer that is started and killed beside it."""

    def __init__(self, home: Path, target: Path, stream: list[int]):
        self.home, self.target, self.stream = home, target, stream
        self.config = home / "aurora.toml"
        self.config.write_text(CONFIG.format(port=free_port(), home=home, target=target))
        init_draft(target, home / "draft", "random")
        self.weights = home / "weights"
        self.places = itertools.count(3000, 97)
        self.trainer: subprocess.Popen | None = None
        self.start_server()

    def start_server(self) -> None:
        self.server = Server(
            self.target, draft=self.home / "draft", algorithm="AURORA", num_steps=4,
            args=["--enable-metrics"],
            env={"AURORA_CONFIG": str(self.config)}, log=self.home / f"server-{time.time_ns()}.log",
        )  # fmt: skip

    def start_trainer(self) -> None:
        with open(self.home / "trainer.log", "ab") as log:
            command = [*TRAINER, "run", "--config", self.config]
            self.trainer = subprocess.Popen(
                command, stdout=log, stderr=log, preexec_fn=die_with_parent
            )

    def kill_trainer(self) -> None:
        self.trainer.send_signal(signal.SIGKILL)
        self.trainer.wait()

    def prompts(self, count: int) -> list[list[int]]:
        places = [next(self.places) % (len(self.stream) - 40) for _ in range(count)]
        return [self.stream[at : at + 32] for at in places]

    def accept_length(self, answers: list[dict]) -> float:
        metas = [a["meta_info"] for a in answers]
        steps = sum(m["spec_verify_ct"] for m in metas)
        return 1 + sum(m["spec_num_correct_drafts"] for m in metas) / steps

    def send(self, count: int) -> list[dict]:
        return generate(self.server, self.prompts(count), {"max_new_tokens": TOKENS}, None)

    def outputs(self, prompts: list[list[int]]) -> list[list[int]]:
        return [
            a["output_ids"] for a in generate(self.server, prompts, {"max_new_tokens": 64}, None)
        ]

    def check_outputs(self) -> None:
        """They are what they were. In 16 bits another draft's trees round otherwise, and near ties
        are decided otherwise."""
        prompts, expected = self.reference
        assert self.outputs(prompts) == expected or has_gpu()

    @contextmanager
    def load(self):
        """Requests all the time; the first failure of any is raised at the end."""
        stop, failures = threading.Event(), []

        def run() -> None:
            while not stop.is_set():
                try:
                    self.send(4)
                except Exception as error:
                    failures.append(error)
                    return

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        assert not failures, failures

    def status(self) -> dict:
        try:
            return json.loads((self.home / "status.json").read_text())
        except FileNotFoundError:
            return {}

    def log(self) -> str:
        return (self.home / "trainer.log").read_text()

    def check_weights(self) -> int | None:
        """What CURRENT names is complete and hashes as its manifest says."""
        version = current_version(self.weights)
        if version is not None:
            directory = self.weights / version_name(version)
            manifest = read_manifest(directory)
            for name, file in manifest.files.items():
                assert sha256_file(directory / name) == file.sha256, (version, name)
            for name, tensor in load_file(directory / "model.safetensors").items():
                own = hashlib.sha256(tensor.contiguous().view(-1).numpy().tobytes()).hexdigest()
                assert own == manifest.tensors[name].sha256, (version, name)
        return version


@pytest.fixture(scope="module")
def flywheel(target, stream, tmp_path_factory):
    flywheel = Flywheel(tmp_path_factory.mktemp("flywheel"), target, stream)
    yield flywheel
    if flywheel.trainer is not None and flywheel.trainer.poll() is None:
        flywheel.trainer.terminate()
        flywheel.trainer.wait(20)
    flywheel.server.stop()


def test_it_learns(flywheel):
    reference = [flywheel.stream[at : at + 32] for at in (100, 900, 1700, 2500)]
    flywheel.reference = reference, flywheel.outputs(reference)
    flywheel.target_sums = checksums(flywheel.server, "target")
    first = flywheel.accept_length(flywheel.send(16))
    # a random draft
    assert first < 1.15
    flywheel.start_trainer()
    wait_until(lambda: "trainer ready" in flywheel.log(), "the trainer", 90)
    best, deadline = first, time.monotonic() + 150
    while best < first + 0.5 and time.monotonic() < deadline:
        best = flywheel.accept_length(flywheel.send(16))
    assert best >= first + 0.5, (first, best, flywheel.status())
    assert metrics(flywheel.server)["aurora_swaps"] >= 2
    print(f"accept length {first:.2f} -> {best:.2f}, {flywheel.status()['draft_version']} versions")


def test_it_survives_a_killed_trainer(flywheel):
    """SIGKILL at random instants, also while it publishes and saves; the server carries on,
    training resumes.
    """
    seed = random.randrange(1 << 30)
    print("seed", seed)
    pauses = random.Random(seed)
    steps = flywheel.status()["optimizer_step"]
    with flywheel.load():
        for _ in range(5):
            time.sleep(pauses.uniform(0.5, 3.0))
            flywheel.kill_trainer()
            flywheel.check_weights()
            ready = flywheel.log().count("trainer ready")
            flywheel.start_trainer()
            wait_until(
                lambda ready=ready: flywheel.log().count("trainer ready") > ready,
                "a resumed trainer",
                90,
            )
    assert flywheel.log().count("resumed step=") == 5
    wait_until(
        lambda: flywheel.send(4) and flywheel.status()["optimizer_step"] > steps,
        "training goes on",
        60,
    )
    # not of the link: a trainer that is killed within a handshake has refused it
    failures = {
        k: v
        for k, v in metrics(flywheel.server).items()
        if "failure" in k or "weights_refused" in k
    }
    assert not any(failures.values()), failures
    assert checksums(flywheel.server, "target") == flywheel.target_sums
    flywheel.check_outputs()


def test_it_survives_a_killed_server(flywheel):
    """The trainer carries on; the server that comes back serves the newest version, not its initial
    draft.
    """
    with flywheel.load():
        time.sleep(1)
    flywheel.server.kill()
    assert flywheel.trainer.poll() is None
    served = flywheel.check_weights()
    flywheel.start_server()
    assert flywheel.trainer.poll() is None
    attached = re.search(r"aurora attached .*draft_version=(\d+)", flywheel.server.log.read_text())
    assert int(attached[1]) >= served > 0
    assert flywheel.accept_length(flywheel.send(8)) > 1.2
    flywheel.check_outputs()


def test_the_ledger_adds_up_after_all_that(flywheel):
    """Every session of the trainer's ledger: sent = received + lost + rejected, and what the
    publisher counted itself.
    """

    def balanced() -> bool:
        ledger = flywheel.status()["ledger"]
        newest = max(ledger.values(), key=lambda e: e["last_unix_s"])
        captured = (
            newest["sent_seq"]
            - newest["heartbeats"]
            + sum(newest["dropped"].values())
            + newest["queued"]
        )
        return newest["queued"] == 0 and newest["captured"] == captured

    wait_until(balanced, lambda: json.dumps(flywheel.status()["ledger"]), 30)
    for session in flywheel.status()["ledger"].values():
        assert session["sent_seq"] == session["received"] + session["lost"] + session["rejected"], (
            session
        )
    # two lives of the server
    assert len(flywheel.status()["ledger"]) == 2
