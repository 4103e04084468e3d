"""A real server and the trainer's receiving half beside it, as the loop's tests use them.

server (AURORA) -> ZeroMQ -> Receiver -> messages, Assembler -> samples by request
drafts -> WeightsWriter -> weights directory -> server
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve import Server, free_port

from aurora_sglang_plugin.config import LinkConfig
from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.link.keys import make_keys
from aurora_sglang_plugin.link.receiver import ReceiveConfig, Receiver
from aurora_sglang_plugin.weights.manifest import target_fingerprint, version_name
from aurora_sglang_plugin.weights.writer import WeightsWriter
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.target import open_target
from aurora_trainer.intake.assemble import AssembleConfig, Assembler
from aurora_trainer.intake.sample import Sample

RECEIVE = """
import sys, time
from pathlib import Path
from aurora_sglang_plugin.config import LinkConfig
from aurora_sglang_plugin.link.receiver import ReceiveConfig, Receiver
receiver = Receiver(LinkConfig.model_validate_json(sys.argv[1]), ReceiveConfig(), Path(sys.argv[2]))
print("ready", flush=True)
while True:
    receiver.get(0.1)
"""

# a busy machine takes minutes over the imports
START_S = 600
FINAL = ("stop", "length", "abort")


class Loop:
    """One AURORA server, its weights directory and a receiver that can come and go.

    `settings` are AURORA_SET's; `versions` are published before the server starts; `encrypted`: the
    link has keys; `shape` is the trees'.
    """

    def __init__(
        self,
        folder: Path,
        target: Path,
        draft: Path,
        *,
        settings: Sequence[str] = (),
        listening: bool = True,
        versions: Sequence[Draft] = (),
        args: Sequence[str] = (),
        env: dict[str, str] | None = None,
        encrypted: bool = False,
        **shape: int,
    ):
        self.folder, self.target, self.initial_draft = folder, target, draft
        keys = (
            {f"{side}_keys": folder / "keys" / side for side in ("trainer", "server")}
            if encrypted
            else {}
        )
        if keys:
            make_keys(folder / "keys", ["server"])
        self.link = LinkConfig(endpoint=f"tcp://127.0.0.1:{free_port()}", **keys)
        self.weights = folder / "weights"
        self.writer = WeightsWriter(self.weights, keep=1000)
        self.embed = open_target(target).embedding()
        self.fingerprint = target_fingerprint(str(target))
        self.receiver: Receiver | None = None
        self.assembler = Assembler(AssembleConfig(part_positions=1 << 16, context_positions=0))
        self.messages: list[wire.Message] = []
        self.samples: dict[str, list[Sample]] = defaultdict(list)
        self._final: set[str] = set()
        # the newest version that `publish` made
        self.published = 0
        if listening:
            self.listen()
        for version in versions:
            self.publish(version)
        set_ = [
            f"link.endpoint={self.link.endpoint}",
            f"weights.directory={self.weights}",
            # drafting costs a tiny target more than it brings, and tests publish bad drafts
            "plugin.speculation.adaptive=false",
            "plugin.canary.enabled=false",
            *settings,
        ]
        set_ += [f"link.{name}={path}" for name, path in keys.items()]
        self._start = dict(
            draft=draft,
            algorithm="AURORA",
            args=["--enable-metrics", *args],
            env={"AURORA_SET": " ".join(set_), **(env or {})},
            log=folder / "server.log",
            **shape,
        )
        self.start()

    def start(self) -> None:
        self.server = Server(self.target, timeout_s=START_S, **self._start)

    def listen(self) -> None:
        """A receiver like the trainer's, with a ledger that survives it."""
        self.receiver = Receiver(self.link, ReceiveConfig(), self.folder / "ledger.json")

    def deafen(self) -> None:
        """The receiver goes; the endpoint is absent until the next listen()."""
        self.receiver.close()
        self.drain()
        self.receiver = None

    def stop(self) -> None:
        self.server.stop()
        if self.receiver is not None:
            self.deafen()
        self.writer.close()

    # ---- traffic

    def generate(
        self, prompts: list[list[int]], params: dict | list[dict], rids: list[str] | None = None
    ) -> list:
        """Answers to concurrent requests, each with its `rid`; output token ids are in
        `output_ids`.
        """
        return generate(self.server, prompts, params, rids)

    @contextmanager
    def load(self, prompts: list[list[int]], params: dict) -> Iterator[list[list[dict]]]:
        """Keep the server busy with rounds of these requests; the answers of each round are
        appended to the value.
        """
        rounds: list[list[dict]] = []
        stop = threading.Event()

        def run() -> None:
            while not stop.is_set():
                rounds.append(self.generate(prompts, params))

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(run)
            try:
                yield rounds
            finally:
                stop.set()
                running.result()

    # ---- what was received

    def drain(self) -> None:
        while self.receiver is not None and (message := self.receiver.get()) is not None:
            self.messages.append(message)
            for sample in self.assembler.add(message):
                self.samples[sample.request].append(sample)
            if message.header.kind == "end":
                final = [
                    r
                    for r, why in zip(message.header.requests, message.header.reasons)
                    if why in FINAL
                ]
                self._final.update(final)

    def taken(self, rids: Sequence[str], timeout_s: float = 20) -> dict[str, list[Sample]]:
        """The samples of requests that were answered, once the `end` of each has arrived."""

        def ended() -> bool:
            self.drain()
            return self._final.issuperset(rids)

        wait_until(ended, f"the ends of {rids}", timeout_s)
        return {rid: self.samples[rid] for rid in rids}

    def forget(self, rid: str) -> None:
        """Before an id is used again: what ended so far was the earlier request."""
        self._final.discard(rid)

    def quiet(self, timeout_s: float = 20) -> dict:
        """Wait until the newest session's ledger is complete, adds up, and says what /metrics says;
        returns them.
        """

        def balanced() -> bool:
            self.drain()
            ledger = self.receiver.ledger()["sessions"]
            self.session = max(ledger, key=lambda name: ledger[name]["last_unix_s"], default="")
            if self.receiver.balanced(self.session) is not True or ledger[self.session]["queued"]:
                return False
            return self.metrics()["aurora_captured_messages"] == ledger[self.session]["captured"]

        self.session = ""
        wait_until(
            balanced, lambda: f"balanced ledger, {self.receiver.balanced(self.session)}", timeout_s
        )
        return self.receiver.ledger()["sessions"][self.session]

    # ---- weights

    def publish(self, draft: Draft, gate: dict | None = None) -> int:
        """`gate`: what the trainer's would have said of it."""
        self.published = self.writer.publish(
            draft.checkpoint(),
            draft.config.to_json(),
            target=self.fingerprint,
            parent=0,
            optimizer_step=0,
            gate=gate,
        )
        return self.published

    def draft(self, version: int) -> Draft:
        """The draft of a version as the trainer's own code reads it; 0 is the one that the server
        was given.
        """
        return Draft.load(
            self.weights / version_name(version) if version else self.initial_draft, self.embed
        )

    def wait_for_version(self, version: int, timeout_s: float = 30) -> None:
        """Until the server drafts with it.

        An idle server swaps when it next works, so this makes it work.
        """

        def serving() -> bool:
            self.generate([[5, 6, 7]], {"max_new_tokens": 4})
            return self.version() == version

        wait_until(serving, f"version {version}", timeout_s, every_s=0.3)

    def version(self) -> int:
        return int(self.metrics()["aurora_draft_version"])

    def settled_version(self) -> int:
        """What drafts requests from now on: an earlier test may have left a version on its way."""
        if self.published:
            self.wait_for_version(self.published)
        return self.version()

    def metrics(self) -> dict[str, float]:
        return metrics(self.server)


def generate(
    server: Server, prompts: list[list[int]], params: dict | list[dict], rids: list[str] | None
) -> list[dict]:
    rids = rids or [uuid.uuid4().hex for _ in prompts]
    params = params if isinstance(params, list) else [params] * len(prompts)
    params = [{"temperature": 0, "ignore_eos": True, **p} for p in params]
    answers = server.post(
        "/generate", {"input_ids": prompts, "sampling_params": params, "rid": rids}
    )
    return [answer | {"rid": answer["meta_info"]["id"]} for answer in answers]


def metrics(server: Server) -> dict[str, float]:
    """Aurora's families of /metrics: "name" or "name{cause}" to value, without _total."""
    found = {}
    for line in server.get("/metrics").splitlines():
        match = re.match(r"(aurora_\w+?)(?:_total)?(?:\{(.*?)\})? (\S+)$", line)
        if match:
            cause = re.search(r'cause="(\w+)"', match[2] or "")
            found[match[1] + (f"{{{cause[1]}}}" if cause else "")] = float(match[3])
    return found


def by_label(server: Server, name: str, label: str) -> dict[str, float]:
    """A counter of /metrics by the values of a label."""
    lines = re.findall(
        rf'^{name}_total\{{.*?{label}="(\w+)".*?\}} (\S+)$', server.get("/metrics"), re.M
    )
    return {value: float(count) for value, count in lines}


def checksums(server: Server, which: str) -> dict[str, Any]:
    """SGLang's own checksums of every parameter of the `target` or the `draft`, by name."""
    answer = server.post("/weights_checker", {"action": "checksum", "selector": which})
    assert answer["success"], answer
    return {
        name: checksum for rank in answer["ranks"] for name, checksum in rank["checksums"].items()
    }


def receiver_process(loop: Loop) -> subprocess.Popen:
    """A receiver that can be stopped and killed, with the loop's ledger."""
    command = [
        sys.executable,
        "-c",
        RECEIVE,
        loop.link.model_dump_json(),
        str(loop.folder / "ledger.json"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def wait_until(
    true: Callable[[], Any],
    what: str | Callable[[], str],
    timeout_s: float = 20,
    every_s: float = 0.05,
) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(
                f"not within {timeout_s} s: {what if isinstance(what, str) else what()}"
            )
        time.sleep(every_s)
