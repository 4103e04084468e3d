"""What Aurora costs a server: the same requests with capture off and on, interleaved in one run,
ratios first.

    python scripts/bench_serving.py [--rounds 5] [--requests 24] [--modes receiving]

Two servers with the same target and draft, one with capture off, take turns; an idle one sleeps.
The other's trainer is in turn absent, stopped (SIGSTOP) with the server's queue full, receiving
without training, and training (which competes for the processor, and is therefore reported apart).
Swapping is off: every mode drafts alike. On a CPU another --target than the demo's is served as
`make demo-real` serves it.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import tempfile
import time
from pathlib import Path

import psutil
from children import TRAINER, Trainer, run_to_end
from clients import send
from demo import LEARNING, NUM_STEPS, TARGET, make_prompts
from demo_real import CPU_ARGS, CPU_ENV
from passes import write_config
from serve import Server, has_gpu

MODES = ("off", "absent", "stopped", "receiving", "training")
# Full within a turn of the demo's target; the logits of one step of a real one are larger.
SMALL_QUEUE = "plugin.publish.queue_bytes=4000000"


def tree_cpu_s(server: Server) -> float:
    root = psutil.Process(server.process.pid)
    return sum(sum(p.cpu_times()[:2]) for p in [root, *root.children(recursive=True)])


def tree_rss_bytes(server: Server) -> int:
    root = psutil.Process(server.process.pid)
    return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)])


CAPTURE = ("aurora_capture_seconds_sum", "aurora_captured_messages_total")


def measure(server: Server, prompts: list[list[int]], captures: bool = True) -> dict[str, float]:
    """`captures`: else the server has no figures of capture."""
    # every turn computes its prompts
    server.get("/flush_cache")
    before = [server.metric(name) if captures else 0.0 for name in CAPTURE]
    cpu, began = tree_cpu_s(server), time.monotonic()
    replies = list(send(server, prompts, tokens=96))
    wall = time.monotonic() - began
    after = [server.metric(name) if captures else 0.0 for name in CAPTURE]
    seconds, messages = (now - then for now, then in zip(after, before))
    return {
        "tokens_per_s": sum(len(r.tokens) for r in replies) / wall,
        "latency_p95_s": sorted(r.latency_s for r in replies)[int(0.95 * len(replies))],
        "cpu_s": tree_cpu_s(server) - cpu,
        "capture_us_per_message": 1e6 * seconds / max(1.0, messages),
        "capture_share": seconds / wall,
    }


def wire_bytes(server: Server, prompts: list[list[int]]) -> float:
    """Bytes that a committed token costs on the wire to a trainer that receives: of requests whose
    prompts are cached, and send no features."""
    list(send(server, prompts, tokens=1))
    before = _sent_bytes(server)
    tokens = sum(len(reply.tokens) for reply in send(server, prompts, tokens=96))
    return (_sent_bytes(server) - before) / tokens


def _sent_bytes(server: Server, timeout_s: float = 30) -> float:
    """Once nothing waits to be sent."""
    deadline = time.monotonic() + timeout_s
    while server.metric("aurora_queued_messages"):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the trainer did not take all messages within {timeout_s:g} s")
        time.sleep(0.1)
    return server.metric("aurora_sent_bytes_total")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=24, help="of 96 tokens in each turn")
    parser.add_argument(
        "--init", choices=("random", "target"), default="target", help="the untrained draft"
    )
    parser.add_argument("--draft", type=Path, help="a trained draft instead")
    parser.add_argument("--modes", nargs="+", choices=MODES[1:], default=MODES[1:])
    parser.add_argument(
        "--set", default="", help="AURORA_SET of both servers, e.g. plugin.capture.features=float8"
    )
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = run(options, options.target.resolve(), Path(scratch))
    show(figures)
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1))


def run(options: argparse.Namespace, target: Path, home: Path) -> dict[str, list[dict[str, float]]]:
    draft = options.draft
    if draft is None:
        draft = home / "draft"
        run_to_end([*TRAINER, "init-draft", target, draft, "--kind", options.init])
    config = write_config(home, target, draft, LEARNING)
    prompts = make_prompts(target, options.requests * (options.rounds + 1))["code"]
    args, environment, settings = ["--enable-metrics"], {}, "plugin.swap.enabled=false"
    if target == TARGET.resolve():
        settings += f" {SMALL_QUEUE}"
    elif not has_gpu():
        args, environment = [*args, *CPU_ARGS], CPU_ENV
    serve = dict(algorithm="AURORA", num_steps=NUM_STEPS, draft=draft, args=args)
    settings += f" {options.set}"
    environment = environment | {"AURORA_CONFIG": str(config), "AURORA_SET": settings}
    off = environment | {"AURORA_SET": settings + " plugin.capture.enabled=false"}
    modes = ("off", *options.modes)
    figures: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES if mode in modes}
    with (
        Server(target, **serve, env=off) as plain,
        Server(target, **serve, env=environment) as capturing,
    ):
        measure(plain, prompts[: options.requests], captures=False)
        measure(capturing, prompts[: options.requests])
        rss = tree_rss_bytes(capturing)
        for number in range(1, options.rounds + 1):
            turn = prompts[number * options.requests : (number + 1) * options.requests]
            figures["off"].append(measure(plain, turn, captures=False))
            if "absent" in modes:
                figures["absent"].append(measure(capturing, turn))
            with Trainer(
                config, home / "receiving.log", "--set", "trainer.pace.enabled=false"
            ) as trainer:
                wait_until_received(home)
                if "stopped" in modes:
                    trainer.process.send_signal(signal.SIGSTOP)
                    # fills the queue
                    list(send(capturing, turn, tokens=96))
                    figures["stopped"].append(measure(capturing, turn))
                    trainer.process.send_signal(signal.SIGCONT)
                    time.sleep(1)
                if "receiving" in modes:
                    figures["receiving"].append(measure(capturing, turn))
                if number == options.rounds:
                    per_token = wire_bytes(capturing, turn)
            if "training" in modes:
                with Trainer(config, home / "training.log"):
                    wait_until_received(home)
                    figures["training"].append(measure(capturing, turn))
            print(f"  round {number} of {options.rounds} done", flush=True)
        print(
            f"server memory {rss / 2**20:.0f} MiB before, {tree_rss_bytes(capturing) / 2**20:.0f}"
            " MiB after; dropped because the queue was full:"
            f" {capturing.metric('aurora_dropped_messages_total'):.0f} messages"
        )
        print(f"{per_token:,.0f} bytes on the wire a committed token")
        figures["off"][-1]["wire_bytes_per_token"] = per_token
    return figures


def wait_until_received(home: Path, timeout_s: float = 60) -> None:
    """Until a trainer that was just started has heard from the server."""
    status = home / "status.json"
    status.unlink(missing_ok=True)
    deadline = time.monotonic() + timeout_s
    while not (status.exists() and json.loads(status.read_text())["received"]):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the trainer heard nothing from the server within {timeout_s:g} s")
        time.sleep(0.2)


def show(figures: dict[str, list[dict[str, float]]]) -> None:
    """Each mode against `off` of the same round: median (smallest to largest) of the ratios, and
    the mean throughput with its 95% interval over rounds."""
    print(
        f"{'mode':10} {'tokens/s':>9}  {'throughput vs off':>24}  {'mean':>14} "
        f" {'p95 latency vs off':>24}  server CPU  capture"
    )
    for mode, rounds in figures.items():
        base = figures["off"]

        def ratio(name: str, rounds=rounds, base=base) -> str:
            values = sorted(r[name] / b[name] for r, b in zip(rounds, base))
            return f"{statistics.median(values):.3f} ({values[0]:.3f} to {values[-1]:.3f})"

        gains = [r["tokens_per_s"] / b["tokens_per_s"] for r, b in zip(rounds, base)]
        spread = statistics.stdev(gains) if len(gains) > 1 else math.nan
        # 1.96 is a little narrow for few rounds
        mean = f"{statistics.mean(gains):.3f} +-{1.96 * spread / math.sqrt(len(gains)):.3f}"
        mid = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
        print(
            f"{mode:10} {mid['tokens_per_s']:9.0f}  {ratio('tokens_per_s'):>24}  {mean:>14} "
            f" {ratio('latency_p95_s'):>24}  {ratio('cpu_s')[:5]:>10} "
            f" {mid['capture_us_per_message']:.0f} us a message, {mid['capture_share']:.2%} of the"
            " time"
        )


if __name__ == "__main__":
    main()
