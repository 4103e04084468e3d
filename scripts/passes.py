"""A demo's passes over its traffic: live, with the frozen initial draft, without speculation.

Each has a server of its own, so that the figures of all three stand side by side.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from children import Trainer
from clients import CLIENTS, Reply, tokens_per_s
from serve import Server, free_port, has_gpu

from aurora_sglang_plugin.weights.manifest import version_name
from aurora_sglang_plugin.weights.writer import served_version

# requests in a mean
WINDOW = 40
STATUS, SUMMARY, PICTURE = "status.json", "summary.json", "accept_length.png"
# What a draft is worth shows only while it drafts: a server that chose would rest.
ALWAYS_DRAFT = "plugin.speculation.adaptive=false"
FROZEN_SET = f"plugin.capture.enabled=false plugin.swap.enabled=false {ALWAYS_DRAFT}"
SWAP = re.compile(r"draft swapped version=(\d+)")

CONFIG = """\
[link]
endpoint = "tcp://127.0.0.1:{port}"
[weights]
directory = "{home}/weights"
[plugin.speculation]
adaptive = {adaptive}
[trainer.model]
target = "{target}"
{draft}
device = "{device}"
{learning}\
[trainer.checkpoint]
directory = "{home}/checkpoints"
[trainer.metrics]
status_file = "{home}/{status}"
every_s = 1.0
"""


def write_config(home: Path, target: Path, draft: Path | None, learning: str) -> Path:
    """Write home/aurora.toml, the file of server and trainer. Without a draft the trainer makes
    one, and the server chooses when to draft. `learning`: more of [trainer.*]; its first lines
    belong to [trainer.model]."""
    path = home / "aurora.toml"
    path.write_text(
        CONFIG.format(
            port=free_port(),
            home=home,
            target=target,
            draft=f'draft = "{draft}"' if draft else "",
            adaptive="false" if draft else "true",
            device="cuda" if has_gpu() else "cpu",
            learning=learning,
            status=STATUS,
        )
    )
    return path


@dataclass
class Site:
    """What all passes have in common. `args` and `env` are those of `serve.Server`."""

    # what the target is called
    model: str
    home: Path
    target: Path
    # None: the server starts without
    draft: Path | None
    config: Path
    num_steps: int
    args: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    clients: int = CLIENTS

    def live(self, traffic: Callable[[Server], Iterable[Reply]], of: str) -> Pass:
        """AURORA with the trainer. `of`: how much traffic there will be, in words."""
        with (
            Trainer(self.config, self.home / "trainer.log") as trainer,
            self._server("live", {"AURORA_CONFIG": str(self.config)}) as server,
        ):
            replies = _while_alive(trainer, traffic(server))
            return Pass(server.log, of, self.clients, self.home / STATUS).follow(replies)

    def frozen(self, traffic: Callable[[Server], Iterable[Reply]], of: str) -> Pass:
        """AURORA with the initial draft, which captures and swaps nothing."""
        with self._server("frozen", {"AURORA_SET": FROZEN_SET}) as server:
            return Pass(server.log, of, self.clients).follow(traffic(server))

    @property
    def last(self) -> Path | None:
        """The last published version, else the initial draft, if there is one."""
        weights = self.home / "weights"
        version = served_version(weights)
        return weights / version_name(version) if version else self.draft

    def learned(self, traffic: Callable[[Server], Iterable[Reply]], of: str) -> Pass:
        """AURORA with the last published version, which captures nothing; no trainer."""
        self.draft = self.last
        settings = f"plugin.capture.enabled=false plugin.swap.enabled=false {ALWAYS_DRAFT}"
        with self._server("learned", {"AURORA_SET": settings}) as server:
            return Pass(server.log, of, self.clients).follow(traffic(server))

    def plain(self, traffic: Callable[[Server], Iterable[Reply]], of: str) -> Pass:
        """The target without speculation."""
        with self._server("plain", None) as server:
            return Pass(server.log, of, self.clients).follow(traffic(server))

    def _server(self, name: str, aurora: dict[str, str] | None) -> Server:
        drafts = (
            {}
            if aurora is None
            else dict(draft=self.draft, algorithm="AURORA", num_steps=self.num_steps)
        )
        env = self.env | (aurora or {})
        return Server(
            self.target,
            **drafts,
            args=self.args,
            env=env,
            log=self.home / f"{name}.log",
            timeout_s=600,
        )


class Pass:
    """The replies of a pass, the swaps between them (from the server's log), a line of progress."""

    def __init__(self, server_log: Path, of: str, clients: int, status_file: Path | None = None):
        self.replies: list[Reply] = []
        # requests done at each
        self.swaps: list[int] = []
        self.version = self.tokens = 0
        self._log, self._read = server_log, 0
        self._of, self._clients, self._status_file = of, clients, status_file
        self._began = self._shown = time.monotonic()

    def follow(self, replies: Iterable[Reply]) -> Pass:
        """Take the replies as they come, and show how it goes."""
        for reply in replies:
            self.replies.append(reply)
            self.tokens += len(reply.tokens)
            self._notice_swaps()
            now = time.monotonic()
            if now - self._shown > 2:
                self._shown = now
                print(self._line(now), end="\r" if sys.stdout.isatty() else "\n", flush=True)
        return self

    @property
    def lengths(self) -> list[float]:
        """Accept length of every request."""
        return [reply.accept_length for reply in self.replies]

    def figures(self, last: int | None = None) -> dict[str, Any]:
        """Figures of all requests, or of the `last` ones: how many, their tokens, tokens a second
        with every client busy, and the mean of their accept lengths."""
        replies = self.replies[-last:] if last else self.replies
        return {
            "requests": len(replies),
            "tokens": sum(len(reply.tokens) for reply in replies),
            "tokens_per_s": tokens_per_s(self.replies, self._clients, last),
            "accept_length": mean([reply.accept_length for reply in replies]),
        }

    def _line(self, now: float) -> str:
        status = self.status()
        recent, seconds = self.lengths[-WINDOW:], now - self._began
        return (
            f"  {seconds:4.0f} s  {len(self.replies):4} requests of {self._of}  "
            f"{self.replies[-1].domain:9}  {self.tokens / seconds:5.1f} tokens/s  "
            f"accept length {mean(recent):.2f}  draft v{self.version}  "
            + (
                f"optimizer step {status['optimizer_step']}  "
                f"dropped {sum(status['dropped'].values())}  lost {status['lost']}   "
                if status
                else ""
            )
        )

    def status(self) -> dict[str, Any]:
        """The trainer's, as it last wrote it; nothing without a trainer."""
        if self._status_file is None or not self._status_file.exists():
            return {}
        return json.loads(self._status_file.read_text())

    def _notice_swaps(self) -> None:
        with open(self._log, errors="replace") as file:
            file.seek(self._read)
            lines = file.read()
            self._read = file.tell()
        for version in SWAP.findall(lines):
            self.version = int(version)
            self.swaps.append(len(self.replies))


def mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def _while_alive(trainer: Trainer, replies: Iterable[Reply]) -> Iterator[Reply]:
    for reply in replies:
        trainer.check()
        yield reply
