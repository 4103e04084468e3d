"""What AURORA costs a GPU server of a real model's shape, and what a swap does to its requests.

    python scripts/bench_cuda.py [--shape qwen3-8b] [--rounds 5] [--out FILE]    # needs a GPU

Three servers of one target share the GPU and take turns with the same greedy requests: EAGLE3;
AURORA with capture off; AURORA that captures, with a receiver beside it and without. Weights are
random: nearly every step commits one token, so a step's cost is what is compared, not what a draft
gains. The outputs of all are compared token by token: first one request at a time, where they must
be equal, then many. At the end versions are published under load. `--shape tiny` goes through
everything on a CPU: it shows that the bench runs, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from children import die_with_parent
from clients import send
from random_models import SHAPES, make_models
from serve import Server, free_port, has_gpu

from aurora_sglang_plugin.weights.manifest import target_fingerprint
from aurora_sglang_plugin.weights.writer import WeightsWriter
from aurora_trainer.drafts.eagle3 import Draft

NUM_STEPS = 3
PROMPT_TOKENS, SWAPS = 128, 5
MODES = ("EAGLE3", "capture off", "nobody listens", "receiving")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--logs", type=Path, help="keep the servers' logs in this directory")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    if options.shape != "tiny" and not has_gpu():
        sys.exit(f"bench-cuda: --shape {options.shape} needs a GPU; a CPU can try --shape tiny")
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        home = Path(scratch)
        figures = about() | {"shape": options.shape}
        bench = Bench(home, options.shape, options.logs or home, stack)
        most = max(options.concurrency)
        for name, measure in (
            ("outputs", lambda: bench.compare_outputs(options.tokens)),
            ("swaps", lambda: bench.swaps(most, options.tokens)),
            (
                "throughput",
                lambda: bench.throughput(options.concurrency, options.rounds, options.tokens),
            ),
            ("metrics", bench.metrics),
        ):
            figures[name] = measure()
            # as they come: the time that there is may end
            if options.out:
                options.out.write_text(json.dumps(figures, indent=1) + "\n")


def about() -> dict:
    device = torch.cuda.get_device_name() if has_gpu() else "cpu"
    return {"device": device, "torch": torch.__version__, "num_steps": NUM_STEPS}


class Bench:
    def __init__(self, home: Path, shape: str, logs: Path, stack: ExitStack):
        self.home, self.target = home, home / "target"
        _, self.draft = make_models(home, shape)
        self.vocab = SHAPES[shape][0]["vocab_size"]
        self.seeds = itertools.count()
        self.endpoint = f"tcp://127.0.0.1:{free_port()}"
        logs.mkdir(parents=True, exist_ok=True)
        args = ["--skip-tokenizer-init", "--enable-metrics", "--random-seed", "1"]
        args += ["--context-length", "2048"]
        # three of them in one memory
        args += ["--mem-fraction-static", "0.9", "--max-total-tokens", "20000"]

        def server(name: str, algorithm: str, settings: str = "") -> Server:
            always = "plugin.speculation.adaptive=false"
            env = {"AURORA_SET": f"link.endpoint={self.endpoint} {always} {settings}"}
            log = logs / f"{name}.log"
            return Server(self.target, draft=self.draft, algorithm=algorithm, num_steps=NUM_STEPS,
                          args=args, env=env, log=log, timeout_s=400)  # fmt: skip

        off = "plugin.capture.enabled=false plugin.swap.enabled=false"
        starts = [
            ("eagle3", "EAGLE3"),
            ("off", "AURORA", off),
            ("on", "AURORA", f"weights.directory={home}/weights"),
        ]
        began = time.monotonic()
        # the servers die with the thread that started them
        pool = stack.enter_context(ThreadPoolExecutor(3))
        futures = [pool.submit(server, *start) for start in starts]
        self.eagle3, self.off, self.on = (
            stack.enter_context(future.result()) for future in futures
        )
        print(f"three servers after {time.monotonic() - began:.0f} s", flush=True)

    def prompts(self, count: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(next(self.seeds))
        shape = (count, PROMPT_TOKENS)
        return torch.randint(1, self.vocab, shape, generator=generator).tolist()

    @contextmanager
    def receiver(self) -> Iterator[None]:
        command = [sys.executable, "-c", RECEIVE, self.endpoint, self.home / "ledger.json"]
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent
        )
        try:
            assert process.stdout.readline() == "ready\n"
            # until the server has connected again
            time.sleep(1.5)
            yield
        finally:
            process.kill()
            process.wait()

    def compare_outputs(self, tokens: int) -> dict:
        """Tokens until the first difference from EAGLE3's, of all tokens: one by one, then many."""
        found = {}
        with self.receiver():
            for name, concurrency, count in (("one by one", 1, 6), ("together", 16, 16)):
                prompts = self.prompts(count)
                reference = outputs(self.eagle3, prompts, tokens, concurrency)
                again = outputs(self.eagle3, prompts, tokens, concurrency)
                off = outputs(self.off, prompts, tokens, concurrency)
                on = outputs(self.on, prompts, tokens, concurrency)
                same = {
                    "EAGLE3 again": equal(reference, again),
                    "capture off": equal(reference, off),
                    "capture on": equal(reference, on),
                }
                found[name] = same
                print(f"same tokens as EAGLE3, {name}: {same}", flush=True)
        return found

    def throughput(self, concurrencies: list[int], rounds: int, tokens: int) -> dict:
        """Tokens a second of every mode, and the ratio of each to EAGLE3 in the same round."""
        found: dict[str, dict] = {}
        for concurrency in concurrencies:
            turns: dict[str, list[float]] = {mode: [] for mode in MODES}
            for number in range(rounds + 1):
                prompts = self.prompts(concurrency)

                def turn(server: Server, prompts=prompts, concurrency=concurrency) -> float:
                    server.get("/flush_cache?timeout=10")
                    began = time.monotonic()
                    replies = list(send(server, prompts, tokens=tokens, concurrency=concurrency))
                    return sum(len(r.tokens) for r in replies) / (time.monotonic() - began)

                figures = {"EAGLE3": turn(self.eagle3), "capture off": turn(self.off)}
                figures["nobody listens"] = turn(self.on)
                with self.receiver():
                    figures["receiving"] = turn(self.on)
                # the first one warms up
                if number:
                    for mode, value in figures.items():
                        turns[mode].append(value)
            found[str(concurrency)] = {}
            for mode, values in turns.items():
                ratios = sorted(a / b for a, b in zip(values, turns["EAGLE3"]))
                found[str(concurrency)][mode] = {"tokens_per_s": values, "ratios": ratios}
                print(
                    f"{concurrency:3} requests  {mode:15} {statistics.median(values):8.0f} tokens/s"
                    f"  {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})",
                    flush=True,
                )
        return found

    def swaps(self, concurrency: int, tokens: int) -> dict:
        """Requests while versions come: tokens a second, and the same without any."""
        draft = Draft.load(self.draft, torch.zeros(1, 1).expand(self.vocab, self._hidden()))
        writer = WeightsWriter(self.home / "weights", keep=SWAPS + 1)
        about = dict(target=target_fingerprint(str(self.target)), parent=0, optimizer_step=0)
        names = json.loads((self.draft / "config.json").read_text())

        def publish() -> None:
            for _ in range(SWAPS):
                with torch.no_grad():
                    draft.norm.weight.mul_(1.01)
                version = writer.publish(draft.checkpoint(torch.bfloat16), names, **about)
                wait_for(lambda version=version: f"version={version} " in swapped(self.on))

        def load(until: Callable[[], bool]) -> float:
            began, count = time.monotonic(), 0
            while True:
                prompts = self.prompts(concurrency)
                replies = send(self.on, prompts, tokens=tokens, concurrency=concurrency)
                count += sum(len(r.tokens) for r in replies)
                if until():
                    return count / (time.monotonic() - began)

        began = time.monotonic()
        before = load(lambda: time.monotonic() - began > 5)
        with ThreadPoolExecutor(1) as pool:
            publishing = pool.submit(publish)
            during = load(publishing.done)
            publishing.result()
        writer.close()
        found = {
            "versions": SWAPS,
            "version_bytes": (self.draft / "model.safetensors").stat().st_size,
            "tokens_per_s_without": before,
            "tokens_per_s_with": during,
            "log": swapped(self.on).splitlines(),
        }
        print(f"swaps: {during:.0f} tokens/s with, {before:.0f} without", flush=True)
        print(*found["log"], sep="\n", flush=True)
        return found

    def metrics(self) -> dict[str, float]:
        """AURORA's of the server that captures, but buckets."""
        page = self.on.get("/metrics")
        pairs = re.findall(r"^(aurora_\w+(?:\{.*?\})?) (\S+)$", page, re.MULTILINE)
        if not pairs:
            raise RuntimeError("the server exports no metric of AURORA's")
        return {name: float(value) for name, value in pairs if "_bucket" not in name}

    def _hidden(self) -> int:
        return json.loads((self.target / "config.json").read_text())["hidden_size"]


def outputs(server: Server, prompts: list, tokens: int, concurrency: int) -> list[list[int]]:
    server.get("/flush_cache?timeout=10")
    replies = send(server, prompts, tokens=tokens, concurrency=concurrency)
    return [r.tokens for r in sorted(replies, key=lambda r: r.number)]


def equal(expected: list[list[int]], found: list[list[int]]) -> str:
    """Tokens before the first difference of each answer, of all."""
    same = sum(
        next((i for i, (a, b) in enumerate(zip(*pair)) if a != b), len(pair[0]))
        for pair in zip(expected, found)
    )
    return f"{same} of {sum(map(len, expected))}"


def swapped(server: Server) -> str:
    lines = server.log.read_text(errors="replace").splitlines()
    return "\n".join(line for line in lines if "draft swapped" in line)


def wait_for(true: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError("a published version was not swapped in within a minute")
        time.sleep(0.05)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
