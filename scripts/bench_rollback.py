"""Does a bad version go by itself, and does no good one? A real server under load, with versions
that no gate would have passed.

    python scripts/bench_rollback.py --good DRAFT [--other DRAFT] [--swaps 1000] [--out FILE]

`good` is a draft that was trained for the target on code (a published version, an export), `other`
one that was trained on another domain. Every output is compared with what the same requests give
without speculation. Three parts:

bad     each bad version in turn: requests and request-steps until it was rolled back
equal   so many swaps of drafts as good as each other, one after the other: none should go
shift   a version comes, then the traffic changes its domain and back: none should go
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clients import send
from demo import NUM_STEPS, TARGET, make_prompts
from rich.progress import track
from safetensors.torch import load_file
from serve import Server, free_port

from aurora_sglang_plugin.weights.manifest import rejected_versions, target_fingerprint
from aurora_sglang_plugin.weights.writer import WeightsWriter

# what the gate would have said, had it passed them
PRAISE = {"reason": "better", "candidate": 4.0, "served": 1.0}
# draft steps are fixed: on a CPU a server would rather not draft than judge
SETTINGS = "plugin.speculation.adaptive=false plugin.swap.poll_s=0.05 weights.directory={}"
SUSPECTED = re.compile(
    r"draft suspected accepted=([\d.]+) before=([\d.]+) reach=[\d.]+ steps=(\d+)"
)
# requests after which a useless version must be gone
AT_MOST = 400

Tensors = dict[str, torch.Tensor]


def noise(size: float) -> Callable[[Tensors], None]:
    def change(draft: Tensors) -> None:
        for tensor in matrices(draft):
            tensor += size * tensor.float().std() * torch.randn(tensor.shape)

    return change


def swapped_rows(draft: Tensors) -> None:
    """As a version would be whose rows are of another vocabulary's order."""
    for name in draft:
        if name.endswith("lm_head.weight"):
            draft[name] = draft[name].roll(1, 0)


def zero_rows(draft: Tensors) -> None:
    """Half of what the draft can propose is never proposed."""
    for name in draft:
        if name.endswith("lm_head.weight"):
            draft[name][::2] = 0


def zero_layer(draft: Tensors) -> None:
    """The features are not read."""
    for name in draft:
        if name.endswith("fc.weight"):
            draft[name].zero_()


BAD = {
    "useless: noise of 9 deviations": noise(9.0),
    "worse: noise of 1 deviation": noise(1.0),
    "rows of the head moved by one": swapped_rows,
    "every second row of the head zero": zero_rows,
    "features not read": zero_layer,
}


def matrices(draft: Tensors) -> list[torch.Tensor]:
    return [tensor for tensor in draft.values() if tensor.is_floating_point() and tensor.dim() == 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--good", type=Path, required=True, help="directory of a trained draft")
    parser.add_argument("--other", type=Path, help="one that was trained on another domain")
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--parts", nargs="+", default=["bad", "shift", "equal"])
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=9, help="between two swaps, at least")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    torch.manual_seed(0)
    prompts = {domain: found[:160] for domain, found in make_prompts(options.target, 200).items()}
    with Server(options.target) as plain:
        expected = {
            domain: {r.number: r.tokens for r in send(plain, found, tokens=options.tokens)}
            for domain, found in prompts.items()
        }
    figures: dict[str, Any] = {"clients": options.clients, "tokens": options.tokens}
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            with Site(Path(folder), options, prompts, expected) as site:
                figures[part] = globals()[part](site, options)
                figures[part]["outputs compared"] = site.answered
                figures[part]["outputs that differ"] = site.differ
        print(json.dumps(figures[part], indent=1), flush=True)
        if options.out:
            options.out.write_text(json.dumps(figures, indent=1) + "\n")


class Site:
    """A server with the good draft, a writer of versions, and clients that never stop."""

    def __init__(self, folder: Path, options: argparse.Namespace, prompts: dict, expected: dict):
        self.options, self.prompts, self.expected = options, prompts, expected
        self.answered = self.differ = 0
        self.domain = "code"
        self.writer = WeightsWriter(folder / "weights", keep=8)
        self.target = target_fingerprint(str(options.target))
        self.config = json.loads((options.good / "config.json").read_text())
        self.good = load_file(options.good / "model.safetensors")
        self.server = Server(
            options.target,
            draft=options.good,
            algorithm="AURORA",
            num_steps=NUM_STEPS,
            args=["--enable-metrics"],
            env={
                "AURORA_SET": f"link.endpoint=tcp://127.0.0.1:{free_port()} "
                + SETTINGS.format(folder / "weights")
            },
        )
        self._stop = threading.Event()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self.failed: list[Exception] = []
        self._clients = [threading.Thread(target=self._ask) for _ in range(options.clients)]

    def __enter__(self) -> Site:
        for client in self._clients:
            client.start()
        # what the version before is judged by
        self.wait(lambda: self.answered >= 64)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for client in self._clients:
            client.join()
        self.server.kill()

    def _ask(self) -> None:
        while not self._stop.is_set():
            domain, found = self.domain, self.prompts[self.domain]
            number = next(self._numbers) % len(found)
            try:
                (reply,) = send(
                    self.server, [found[number]], tokens=self.options.tokens, concurrency=1
                )
            except Exception as error:
                self.failed.append(error)
                raise
            with self._lock:
                self.answered += 1
                self.differ += reply.tokens != self.expected[domain][number]

    def publish(self, change: Callable[[Tensors], None], other: Path | None = None) -> int:
        draft = load_file(other / "model.safetensors") if other else dict(self.good)
        draft = {name: tensor.clone() for name, tensor in draft.items()}
        change(draft)
        return self.writer.publish(
            draft, self.config, target=self.target, parent=0, optimizer_step=0, gate=PRAISE
        )

    def wait(self, holds: Callable[[], bool], timeout_s: float = 300) -> None:
        until = time.monotonic() + timeout_s
        while not holds():
            assert not self.failed and time.monotonic() < until, self.server.log_tail()
            time.sleep(0.05)

    def wait_for(self, version: int) -> None:
        self.wait(lambda: self.server.metric("aurora_draft_version") == version)

    def counts(self) -> dict[str, float]:
        return {
            "suspected": self.server.metric("aurora_versions_suspected_total"),
            "rolled back": self.server.metric("aurora_versions_rejected_total"),
        }


def bad(site: Site, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    changes = [(name, change, None) for name, change in BAD.items()]
    if options.other:
        changes.append(("trained on another domain", noise(0.0), options.other))
    for name, change, other in changes:
        began = site.answered
        version = site.publish(change, other)
        rejected = lambda: version in rejected_versions(site.writer.directory)  # noqa: B023, E731
        site.wait(lambda: rejected() or site.answered - began > AT_MOST, 600)  # noqa: B023
        *_, last = SUSPECTED.findall(site.server.log.read_text(errors="replace")) or [()]
        found[name] = {"rolled back": rejected(), "requests": site.answered - began}
        if rejected():
            accepted, before, steps = last
            found[name] |= {
                "accepted": float(accepted), "before": float(before),
                "request-steps until suspected": int(steps),
            }  # fmt: skip
        print(name, found[name], flush=True)
        # the good one, proved once more, for the next
        good = site.publish(noise(1e-3))
        site.wait_for(good)
        mark = site.answered
        site.wait(lambda: site.answered - mark >= 100)  # noqa: B023
    return {"versions": found}


def equal(site: Site, options: argparse.Namespace) -> dict[str, Any]:
    for _ in track(range(options.swaps), "swaps of equal drafts"):
        mark = site.answered
        site.wait_for(site.publish(noise(1e-3)))
        site.wait(lambda: site.answered - mark >= options.requests)  # noqa: B023
    return {"swaps": site.server.metric("aurora_swaps_total"), **site.counts()}


def shift(site: Site, options: argparse.Namespace) -> dict[str, Any]:
    turns = 12
    for turn in range(turns):
        # an equal one comes, and the traffic changes when it was half judged
        site.wait_for(site.publish(noise(1e-3)))
        mark = site.answered
        site.wait(lambda: site.answered - mark >= 40)  # noqa: B023
        site.domain = "prose" if turn % 2 == 0 else "code"
        mark = site.answered
        site.wait(lambda: site.answered - mark >= 120)  # noqa: B023
    return {"changes of domain": turns, **site.counts()}


if __name__ == "__main__":
    main()
