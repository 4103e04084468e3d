"""One table: our kernels and what a user would pick instead, in one run on one GPU.

    python scripts/bench_kernels.py [--only attention loss topk] [--minutes 7] [--out FILE.json]

Every side is checked first; a wrong one gets no figure, and one that cannot run says why. Under the
table, a line for each aim of the project says whether it was met. `--device cpu --tiny` goes
through everything at toy sizes, with the references or, under TRITON_INTERPRET=1, the kernels: it
shows that the bench runs, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
from pathlib import Path

import bench_attention
import bench_loss
import bench_topk
import torch
import triton
from kernel_timing import HEADER, Bench

BENCHES = {"topk": bench_topk, "loss": bench_loss, "attention": bench_attention}


def find(rows: list[dict], op: str, setting: str, side: str) -> dict | None:
    found = (
        r
        for r in rows
        if (r["op"], r["setting"], r["side"]) == (op, setting, side) and r["ms"] is not None
    )
    return next(found, None)


def aims(rows: list[dict]) -> list[str]:
    """A line per aim and setting: what was reached, and whether that is enough."""
    lines = []

    def aim(text: str, ours: float | None, least: float) -> None:
        verdict = (
            "not measured"
            if ours is None
            else f"{ours:.2f} {'met' if ours >= least else 'NOT MET'}"
        )
        lines.append(f"aim: {text}: at least {least}: {verdict}")

    def ratio(a: dict | None, b: dict | None, field: str) -> float | None:
        if a is None or b is None or not a[field] or not b[field]:
            return None
        return a[field] / b[field]

    by_op = {(row["op"], row["setting"]): None for row in rows if row["side"] == "ours"}
    for op, setting in by_op:
        ours = find(rows, op, setting, "ours")
        if op == "tree_attention fwd" and "T=8192" in setting:
            causal = find(
                rows,
                op,
                setting.rpartition("T=8192")[0] + "T=8192 positions",
                "causal flash (ceiling)",
            )
            aim(f"{op} {setting}, rate over causal flash's", ratio(ours, causal, "rate"), 0.7)
        if op == "tree_attention fwd+bwd":
            least = 1.0 if setting.endswith(("positions", "chain 5")) else 1.3
            flex = find(rows, op, setting, "flex, compiled")
            aim(f"{op} {setting}, flex's time over ours", ratio(flex, ours, "ms"), least)
        if op.startswith("tree_loss") and "VD=151936" in setting:
            naive = find(rows, op, setting, "naive, compiled")
            aim(f"{op} {setting}, naive time over ours", ratio(naive, ours, "ms"), 2.0)
            aim(f"{op} {setting}, naive memory over ours", ratio(naive, ours, "peak_mib"), 10.0)
        if op == "topk_logprobs":
            aim(f"{op} {setting}, torch's time over ours",
                ratio(find(rows, op, setting, "torch.topk + logsumexp"), ours, "ms"),
                2.0)  # fmt: skip
    index = [
        row["ms"]
        for row in rows
        if row["op"] == "tree_attention index" and "T=32768" in row["setting"]
    ]
    worst = max((ms for ms in index if ms is not None), default=None)
    aim("tree_attention index at T=32768, 1 ms over the slowest", worst and 1 / worst, 1.0)
    return lines


def one_setting(run: Bench, name: str, setting: tuple) -> None:
    if run.over():
        run.absent(name, " ".join(map(str, setting)), "all", "skipped: out of time")
        return
    try:
        BENCHES[name].bench(run, *setting)
    except Exception as error:
        # such as inputs that do not fit: the next setting may
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
        run.absent(name, " ".join(map(str, setting)), "all", why)
    # every setting is compiled for its own sizes
    torch._dynamo.reset()


def about(device: str) -> dict:
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": (
            torch.cuda.get_device_name()
            if device == "cuda"
            else platform.processor() or platform.machine()
        ),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(BENCHES), default=list(BENCHES))
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="begin nothing new after this long"
    )
    parser.add_argument("--out", type=Path, help="write rows, aims and versions as JSON")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: does it run?")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench-kernels: no CUDA GPU here; run it on one, or try --device cpu --tiny")
    if args.device == "cpu" and not args.tiny:
        sys.exit("bench-kernels: figures need a GPU; on a CPU only --tiny is of use")
    facts = about(args.device)
    print(*(f"{key}: {value}" for key, value in facts.items()), "", HEADER, sep="\n", flush=True)
    torch.manual_seed(0)
    run = Bench(args.device, args.minutes * 60)
    # what matters most before the time is over
    for part in ("TINY",) if args.tiny else ("FIRST", "REST"):
        for name in args.only:
            for setting in getattr(BENCHES[name], part):
                one_setting(run, name, setting)
    lines = aims(run.rows)
    print("", *lines, sep="\n")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps({"about": facts, "rows": run.rows, "aims": lines}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
