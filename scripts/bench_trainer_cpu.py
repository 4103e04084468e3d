"""A training step on the CPU, ours and the obvious one: tokens per second and peak memory, in turns
of one run.

    python scripts/bench_trainer_cpu.py [--tokens 512 2048 8192] [--rounds 3] [--out FILE.json]

A step is pack > objective > backward > optimizer. The other side (dense_objective.py) computes the
same objective with dense masks, whole logits and autograd, over all samples at once or over one
after another. Loss and gradients of both must agree first; otherwise there are no figures. Every
side lives in a process of its own; peak memory is what its resident set grew by over what it held
before its first step (weights, optimizer, samples), at its highest. Rates are by processor time,
which is wall time if nothing else runs and --threads is 1; the JSON holds both.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from dense_objective import DenseDraft, dense_loss
from safetensors.torch import load_file, save_file
from synthetic_samples import ragged, sample

from aurora_sglang_plugin.drafts.eagle3_config import DraftConfig
from aurora_trainer.drafts.batch import BatchConfig, pack
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.eagle3_init import randomise
from aurora_trainer.intake.sample import Sample
from aurora_trainer.learn.objective import LossConfig, losses
from aurora_trainer.learn.optimizer import Optimizer, OptimizerConfig

# what the samples are, and the weight of their rejected nodes
KINDS = {
    "long": (lambda n, **about: [sample(n, **about)], 0.0),
    "ragged": (ragged, 0.0),
    "trees": (ragged, 0.5),
}
SIDES = ("ours", "dense", "dense, one by one")
# relative; of a gradient, to its largest element
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3


def make_draft(options: argparse.Namespace, kind: type[Draft] = Draft) -> Draft:
    """Grouped-query heads of 64, MLP of 3 H, the whole vocabulary."""
    h = options.hidden
    config = DraftConfig(
        hidden_size=h, intermediate_size=3 * h, num_attention_heads=h // 64,
        num_key_value_heads=max(1, h // 128),
        head_dim=64, vocab_size=options.vocab, draft_vocab_size=options.vocab,
        aux_layer_ids=(0, 1, 2),
    )  # fmt: skip
    draft = kind(config, torch.randn(options.vocab, h, generator=torch.Generator().manual_seed(1)))
    randomise(draft, 1)
    return draft


def make_samples(options: argparse.Namespace, kind: str, tokens: int) -> list[Sample]:
    make, _ = KINDS[kind]
    return make(tokens, vocab=options.vocab, features=3 * options.hidden, kept=32)


class Side:
    """One side's weights and samples, in this process."""

    def __init__(self, options: argparse.Namespace, side: str, kind: str, tokens: int):
        self.side, rejected = side, KINDS[kind][1]
        self.samples = make_samples(options, kind, tokens)
        self.batch, self.loss = BatchConfig(rejected=rejected > 0), LossConfig(rejected=rejected)
        self.draft = make_draft(options, Draft if side == "ours" else DenseDraft)
        self.optimizer = Optimizer(self.draft, OptimizerConfig(lr=1e-4))
        # of the update, for those who take it in parts
        self.counts = pack(self.samples, self.batch).counts()

    def gradients(self) -> float:
        """Accumulate the gradients of one update; its loss."""
        if self.side == "ours":
            loss = losses(self.draft, pack(self.samples, self.batch), self.loss).loss_sum
            loss.backward()
            return float(loss.detach())
        total, parts = 0.0, [self.samples] if self.side == "dense" else [[s] for s in self.samples]
        for part in parts:
            loss = dense_loss(self.draft, pack(part, self.batch), self.loss, self.counts)
            loss.backward()
            total += float(loss.detach())
        return total


def serve(options: argparse.Namespace) -> None:
    """The process of one side: a step for every line that comes in, and a line of figures back."""
    torch.set_num_threads(options.threads)
    side = Side(options, options.side, options.kinds[0], options.tokens[0])
    # the highest resident set, from here on
    Path("/proc/self/clear_refs").write_text("5")
    before, gradients = memory_bytes("VmRSS"), options.gradients
    for _ in sys.stdin:
        began = time.perf_counter(), time.process_time()
        loss = side.gradients()
        # of the first step only, which is not timed
        if gradients:
            save_file({n: p.grad.clone() for n, p in side.optimizer.parameters.items()}, gradients)
            gradients = None
        side.optimizer.step(loss)
        took = time.perf_counter() - began[0], time.process_time() - began[1]
        print(json.dumps([loss, *took, memory_bytes("VmHWM") - before]), flush=True)


def memory_bytes(name: str) -> int:
    """A figure of /proc/self/status: VmRSS, the resident set, or VmHWM, the highest that it was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


class Process:
    """One side in a process of its own; use as a context."""

    def __init__(
        self, options: argparse.Namespace, side: str, kind: str, tokens: int, gradients: Path
    ):
        command = [
            sys.executable,
            __file__,
            "--side",
            side,
            "--kinds",
            kind,
            "--tokens",
            str(tokens),
        ]
        for name in ("hidden", "vocab", "threads"):
            command += [f"--{name}", str(getattr(options, name))]
        command += ["--gradients", str(gradients)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def step(self) -> tuple[float, float, float, int]:
        """(loss, seconds, processor seconds, peak bytes so far)."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side ended by itself; its error stands above")
        return tuple(json.loads(line))

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()


def check(first: dict[str, float], gradients: dict[str, Path]) -> float:
    """The largest relative difference of any side's gradient to ours.

    SystemExit if they do not agree.
    """
    ours, worst = load_file(gradients["ours"]), 0.0
    for side, loss in first.items():
        if abs(loss - first["ours"]) > LOSS_TOLERANCE * abs(first["ours"]):
            raise SystemExit(
                f"check failed, no figures: loss {loss} of {side}, ours {first['ours']}"
            )
        for name, gradient in load_file(gradients[side]).items():
            difference = float((gradient - ours[name]).abs().max() / ours[name].abs().max())
            if not difference <= GRADIENT_TOLERANCE:
                raise SystemExit(
                    f"check failed, no figures: gradient of {name} by {side} differs by"
                    f" {difference:.1e}"
                )
            worst = max(worst, difference)
    return worst


def compare(options: argparse.Namespace, kind: str, tokens: int) -> dict:
    """All sides on the same samples, in turns."""
    sides = [s for s in SIDES if s != "dense, one by one" or kind != "long"]
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        files = {s: Path(directory) / s.replace(" ", "_") for s in sides}
        processes = {
            s: stack.enter_context(Process(options, s, kind, tokens, files[s])) for s in sides
        }
        # also warms up
        first = {s: p.step() for s, p in processes.items()}
        difference = check({s: figures[0] for s, figures in first.items()}, files)
        turns = [{s: p.step() for s, p in processes.items()} for _ in range(options.rounds)] or [
            first
        ]
    return {
        "kind": kind, "tokens": tokens, "loss": first["ours"][0], "gradient_difference": difference,
        "seconds": {s: [turn[s][1] for turn in turns] for s in sides},
        "cpu_seconds": {s: [turn[s][2] for turn in turns] for s in sides},
        "peak_bytes": {s: turns[-1][s][3] for s in sides},
    }  # fmt: skip


def row(result: dict) -> str:
    cells = [f"{result['kind']:7} {result['tokens']:6}"]
    for side in SIDES:
        if side in result["seconds"]:
            rate = result["tokens"] / statistics.median(result["cpu_seconds"][side])
            cells.append(f"{rate:8.0f} tok/s {result['peak_bytes'][side] / 1e6:7.0f} MB")
        else:
            cells.append(" " * 25)
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--rounds", type=int, default=3, help="0: time the step that is checked, cold"
    )
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON; results of earlier runs in it are kept")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options)
        return
    print(f"{'samples':7} {'tokens':>6} | " + " | ".join(f"{s:25}" for s in SIDES), flush=True)
    results = []
    for tokens in options.tokens:
        for kind in options.kinds:
            results.append(compare(options, kind, tokens))
            print(row(results[-1]), flush=True)
    if options.out:
        run = {
            "command": "python scripts/bench_trainer_cpu.py " + " ".join(sys.argv[1:]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__, "python": platform.python_version(), "machine": machine(),
            "hidden": options.hidden, "vocab": options.vocab, "threads": options.threads,
            "results": results,
        }  # fmt: skip
        earlier = json.loads(options.out.read_text()) if options.out.exists() else []
        options.out.write_text(json.dumps([*earlier, run], indent=1) + "\n")


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


if __name__ == "__main__":
    main()
