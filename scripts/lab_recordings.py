"""The lab's recordings: a real model's answers to real prompts, as a server publishes them.

A server without a draft serves plainly and publishes every token that it generates, with features
and target distribution; `aurora-trainer record` writes them down. What a draft would have had
accepted follows from that for any draft, because a server's output does not depend on its draft.

A prompt is in one recording only: each takes its own from the shuffled file, in the order of
arms.toml.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import children
from clients import Prompt, chat
from demo_real import CPU_ARGS, CPU_ENV
from measure_target import distinct_fraction
from serve import Server, free_port, has_gpu

# what is known of a recording, written when it is complete
ABOUT = "about.json"
MESSAGES = "messages"
# for the last messages to be written
SETTLE_S = 5.0
CONFIG = """\
[link]
endpoint = "tcp://127.0.0.1:{port}"
[weights]
directory = "{home}/weights"
[trainer.model]
target = "{target}"
[trainer.record]
max_bytes = 4_000_000_000
"""


@dataclass(frozen=True)
class Traffic:
    """One recording as arms.toml describes it: `domains` are taken in turn, in stretches of
    `stretch` requests each if that is not 0."""

    name: str
    requests: int
    domains: tuple[str, ...]
    greedy: bool = True
    stretch: int = 0
    tokens: int = 128

    @classmethod
    def read(cls, name: str, given: dict[str, Any]) -> Traffic:
        return cls(name, **given | {"domains": tuple(given["domains"].split())})

    def labels(self) -> list[str]:
        """The domain of every request."""
        per = self.stretch or 1
        return [self.domains[n // per % len(self.domains)] for n in range(self.requests)]


def deal(prompts: Sequence[Prompt], traffics: Sequence[Traffic]) -> dict[str, list[Prompt]]:
    """The prompts of each recording, none of them twice. Raises ValueError if there are too few."""
    order, left = random.Random(0), dict[str, list[Prompt]]()
    for prompt in prompts:
        left.setdefault(prompt.domain, []).append(prompt)
    for own in left.values():
        order.shuffle(own)
    dealt = {}
    for traffic in traffics:
        labels = traffic.labels()
        for domain in sorted(set(labels)):
            if len(left.get(domain, ())) < labels.count(domain):
                raise ValueError(
                    f"recording {traffic.name} needs {labels.count(domain)} more prompts of domain"
                    f" {domain!r}, the file has {len(left.get(domain, ()))} left"
                )
        dealt[traffic.name] = [left[domain].pop() for domain in labels]
    return dealt


def digest(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256("\0".join(prompt.text for prompt in prompts).encode()).hexdigest()[:16]


def record(
    home: Path, target: Path, traffic: Traffic, prompts: Sequence[Prompt], clients: int
) -> dict[str, Any]:
    """Record the prompts into home/recordings/NAME, unless that is complete; returns what is known
    of it."""
    directory = home / "recordings" / traffic.name
    about, said = directory / ABOUT, digest(prompts)
    if about.exists():
        found = json.loads(about.read_text())
        if found.get("prompts", said) != said:
            raise ValueError(
                f"{directory} was recorded with other prompts than {traffic.name} has now; expected"
                " the same file and arms, or a directory that is not there"
            )
        return found
    on_cpu = {} if has_gpu() else dict(args=CPU_ARGS, env=CPU_ENV)
    replies, began = [], time.monotonic()
    with recorded(directory, target, **on_cpu) as server:
        how = dict(tokens=traffic.tokens, greedy=traffic.greedy, concurrency=clients)
        for reply in chat(server, prompts, **how):
            replies.append(reply)
            if len(replies) % 20 == 0:
                seconds = time.monotonic() - began
                print(f"  {traffic.name}: {len(replies)} of {len(prompts)} requests,"
                      f" {seconds:.0f} s", flush=True)  # fmt: skip
    tokens = [reply.tokens for reply in replies]
    figures = {
        "requests": len(replies),
        "prompts": said,
        "tokens": sum(map(len, tokens)),
        "seconds": round(time.monotonic() - began),
        "sampling": "greedy" if traffic.greedy else "the server's defaults",
        "distinct_4grams": round(distinct_fraction(tokens), 4),
        "recorder": (directory / "record.log").read_text().strip().splitlines()[-1][-400:],
    }
    about.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


@contextmanager
def recorded(
    directory: Path, target: Path, *, env: dict[str, str] | None = None, **server: Any
) -> Iterator[Server]:
    """A server without a draft; what it publishes until the end is in directory/messages, which is
    made anew. `server`: more of serve.Server."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    config = directory / "aurora.toml"
    config.write_text(CONFIG.format(port=free_port(), home=directory, target=target))
    words = [*children.TRAINER, "record", "--out", directory / MESSAGES, "--config", config]
    recorder = children.start(words, directory / "record.log")
    server |= dict(env={**(env or {}), "AURORA_CONFIG": str(config)}, timeout_s=900)
    try:
        with Server(target, algorithm="AURORA", log=directory / "server.log", **server) as running:
            yield running
            time.sleep(SETTLE_S)
    finally:
        recorder.send_signal(signal.SIGTERM)
        recorder.wait()
