"""Is a server that chooses its draft steps ever slower than one without a draft? The same requests,
interleaved in one run: plain, AURORA with the count that it chooses, AURORA with a fixed count.

    python scripts/bench_control.py --good DRAFT [--clients 1 4 8 16] [--rounds 4]

`good` is a draft that was trained for the target (a published version, an export), `mediocre` the
same with noise, `untrained` what init-draft makes. Outputs are compared before anything is timed.
No trainer runs and nothing is captured. Answers have from half to one and a half of --tokens: if
they were equal, the plain server alone would end them all at once and run prompts in one batch.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from children import TRAINER, run_to_end
from clients import send
from demo import NUM_STEPS, TARGET, make_prompts
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from serve import Server

FIXED = "plugin.speculation.adaptive=false"
QUIET = "plugin.capture.enabled=false plugin.swap.enabled=false"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--good", type=Path, required=True, help="directory of a trained draft")
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--drafts", nargs="+", default=["untrained", "mediocre", "good"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=6, help="of a turn, about")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--noise", type=float, default=0.6, help="of the mediocre draft")
    parser.add_argument("--args", default="", help="more words for every server's command")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in options.drafts:
            rows += compare(kind, make_draft(kind, options, Path(scratch)), options)
            show(rows)
    if options.out:
        about = {"cores": os.cpu_count(), "steps": NUM_STEPS, "rows": rows}
        options.out.write_text(json.dumps(about, indent=1) + "\n")


def make_draft(kind: str, options: argparse.Namespace, home: Path) -> Path:
    if kind == "good":
        return options.good
    draft = home / kind
    if kind == "untrained":
        run_to_end([*TRAINER, "init-draft", options.target, draft])
        return draft
    draft.mkdir()
    torch.manual_seed(0)
    tensors = load_file(options.good / "model.safetensors")
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.dim() == 2:
            tensor += options.noise * tensor.float().std() * torch.randn(tensor.shape)
    save_file(tensors, draft / "model.safetensors")
    (draft / "config.json").write_text((options.good / "config.json").read_text())
    return draft


def compare(kind: str, draft: Path, options: argparse.Namespace) -> list[dict]:
    """A row for each count of clients."""
    args = ["--enable-metrics", "--max-running-requests", max(options.clients)]
    args += options.args.split()
    prompts = make_prompts(options.target, 4000)["code"]
    with ExitStack() as stack:

        def start(**more) -> Server:
            return stack.enter_context(Server(options.target, args=args, timeout_s=600, **more))

        aurora = dict(draft=draft, algorithm="AURORA", num_steps=NUM_STEPS)
        servers = {
            "plain": start(),
            "chosen": start(**aurora, env={"AURORA_SET": QUIET}),
            "fixed": start(**aurora, env={"AURORA_SET": f"{QUIET} {FIXED}"}),
        }
        same = prompts[:4]
        outputs = [
            [reply.tokens for reply in sorted(send(s, same, tokens=24), key=lambda r: r.number)]
            for s in servers.values()
        ]
        # 16 bits round otherwise in another batch, and near ties are decided otherwise
        equal = outputs[0] == outputs[1] == outputs[2]
        print("outputs", "equal" if equal else "differ", flush=True)
        assert equal or "bfloat16" in options.args, "the outputs differ"
        rows, at = [], len(same)
        draw, rounds_before = random.Random(0), decode_rounds(servers["chosen"])
        lengths = [round(options.tokens * draw.uniform(0.5, 1.5)) for _ in prompts]
        for clients in options.clients:
            speed: dict[str, list[float]] = {name: [] for name in servers}
            accept: dict[str, list[float]] = {name: [] for name in servers}
            # as many as the plain server answers in a turn
            warm = prompts[at : at + 2 * clients]
            began = time.monotonic()
            list(send(servers["plain"], warm, tokens=lengths, concurrency=clients))
            each = (time.monotonic() - began) / len(warm)
            count = max(clients, round(options.seconds / each))
            for _ in range(options.rounds):
                at = (at + count) % (len(prompts) - count)
                for name, server in servers.items():
                    server.get("/flush_cache")
                    began = time.monotonic()
                    replies = list(
                        send(
                            server,
                            prompts[at : at + count],
                            tokens=lengths[at : at + count],
                            concurrency=clients,
                        )
                    )
                    seconds = time.monotonic() - began
                    speed[name].append(sum(len(r.tokens) for r in replies) / seconds)
                    accept[name].append(statistics.mean(r.accept_length for r in replies))
            row = {"draft": kind, "clients": clients, "requests": count}
            for name in ("chosen", "fixed"):
                ratios = [a / b for a, b in zip(speed[name], speed["plain"])]
                row[name] = {
                    "ratio": statistics.median(ratios), "ratios": ratios,
                    "accept_length": statistics.mean(accept[name]),
                }  # fmt: skip
            row["plain_tokens_per_s"] = statistics.median(speed["plain"])
            rounds = decode_rounds(servers["chosen"])
            row["rounds_of_chosen"] = {
                steps: count - rounds_before.get(steps, 0) for steps, count in rounds.items()
            }
            rounds_before = rounds
            rows.append(row)
            print(json.dumps({k: v for k, v in row.items() if k != "rounds_of_chosen"}), flush=True)
        return rows


def decode_rounds(server: Server) -> dict[str, int]:
    """So far, by draft steps."""
    name = "aurora_decode_rounds_total{"
    lines = [line for line in server.get("/metrics").splitlines() if line.startswith(name)]
    if not lines:
        raise ValueError(f"{server.url}/metrics has no {name[:-1]}")
    found = {line.split('steps="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}
    return {steps: int(count) for steps, count in found.items() if count}


def show(rows: list[dict]) -> None:
    table = Table("draft", "clients", "plain tokens/s", "chosen / plain", "fixed / plain",
                  "accept length, fixed")  # fmt: skip
    for row in rows:
        cells = []
        for name in ("chosen", "fixed"):
            ratios = row[name]["ratios"]
            cells.append(f"{row[name]['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        table.add_row(row["draft"], str(row["clients"]), f"{row['plain_tokens_per_s']:.0f}",
                      *cells, f"{row['fixed']['accept_length']:.2f}")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
