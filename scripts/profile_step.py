"""Where a training step's time goes: shares of its parts, on the CPU or on a GPU.

    python scripts/profile_step.py [--shape demo|qwen3-8b/4|qwen3-8b] [--positions N] [--device
    cuda] [--trace FILE]

The step is the trainer's own (pack > score the served weights > objective > backward > optimizer),
on synthetic samples of 64 to 512 positions. Every operation is counted for the part whose range it
ran in, at its own time: on the CPU its time on the processor, on a GPU that of the kernels that it
launched; the time between kernels is told apart. Profiling itself costs a little, most if
operations are small.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from synthetic_samples import ragged
from torch.profiler import ProfilerActivity, profile, record_function

from aurora_sglang_plugin.drafts.eagle3_config import DraftConfig
from aurora_trainer.drafts.batch import BatchConfig, pack
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.eagle3_init import randomise
from aurora_trainer.learn.accept_length import chains, walked
from aurora_trainer.learn.objective import LossConfig, losses, score
from aurora_trainer.learn.optimizer import Optimizer, OptimizerConfig

DEMO = DraftConfig(
    hidden_size=192, intermediate_size=512, num_attention_heads=3, num_key_value_heads=1,
    head_dim=64,
    vocab_size=2048, draft_vocab_size=2048, aux_layer_ids=(0, 2, 4),
)  # fmt: skip
QWEN3_8B = replace(
    DEMO, hidden_size=4096, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936, draft_vocab_size=151936,
)  # fmt: skip
# a draft, and the positions of a step
SHAPES = {
    "demo": (DEMO, 256),
    "qwen3-8b/4": (
        replace(
            QWEN3_8B, hidden_size=1024, intermediate_size=3072, num_attention_heads=8,
            num_key_value_heads=2,
            vocab_size=37984, draft_vocab_size=37984,
        ),
        256,
    ),
    "qwen3-8b": (QWEN3_8B, 8192),
}  # fmt: skip
RANGES = ("packing", "upload", "scoring", "optimizer")
# of an operation's name, if it or what called it bears it
INSIDE = {
    "TreeAttention": "attention",
    "TreeLoss": "head and loss",
    "rms_norm": "norms",
    "RmsNorm": "norms",
    "linear": "projections and MLP",
    "MmBackward": "projections and MLP",
    "AddmmBackward": "projections and MLP",
}


def step(draft: Draft, optimizer: Optimizer, samples: list, device: str, rejected: float) -> float:
    """As aurora_trainer.learn.trainer.Training.step, with named ranges."""
    loss = LossConfig(rejected=rejected)
    with record_function("packing"):
        packed = pack(samples, BatchConfig(rejected=rejected > 0))
    with record_function("upload"):
        batch = packed.to(device)
    result = losses(draft, batch, loss)
    result.loss_sum.backward()
    with record_function("scoring"), torch.no_grad():
        score(batch, result)
        walked(draft, batch, samples, chains(draft, batch, result))
    with record_function("optimizer"):
        return optimizer.step(result.loss_sum).loss


def part_of(event) -> str:
    """The part that an operation belongs to: the outermost named range around it, or else what
    called it is.
    """
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for name in reversed(names):
        if name in RANGES:
            return name
    for name in reversed(names):
        for word, part in INSIDE.items():
            if word in name:
                return part
    return "the rest (rotary, gathers, additions)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--positions", type=int, help="of a step; default: what suits the shape")
    parser.add_argument("--rejected", type=float, default=0.0, help="weight of the rejected nodes")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trace", type=Path, help="write a trace for chrome://tracing or Perfetto")
    parser.add_argument("--out", type=Path, help="write the shares as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    on_gpu = options.device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    config, positions = SHAPES[options.shape]
    positions = options.positions or positions
    embed = torch.randn(
        config.vocab_size, config.hidden_size, generator=torch.Generator().manual_seed(1)
    )
    draft = Draft(config, embed)
    randomise(draft, 1)
    masters = {n: p.detach() for n, p in draft.named_parameters()}
    draft.compute_in(options.device, dtype)
    optimizer = Optimizer(draft, OptimizerConfig(lr=1e-4), masters)
    samples = ragged(positions, vocab=config.vocab_size, features=config.feature_size, kept=32)
    everything = draft, optimizer, samples, options.device, options.rejected

    # compiles and warms up
    for _ in range(2 if on_gpu else 1):
        step(*everything)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as recorded:
        began = time.perf_counter()
        for _ in range(options.steps):
            step(*everything)
        seconds = (time.perf_counter() - began) / options.steps
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    spent = Counter()
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CPU:
            spent[part_of(event)] += getattr(event, own)
    total = sum(spent.values())
    # a step lasts longer than its kernels if the device waits for the host
    if on_gpu:
        spent["waiting for the host"] = max(0.0, seconds * 1e6 * options.steps - total)
        total = sum(spent.values())
    shares = {part: us / total for part, us in spent.most_common()}
    queries = sum(
        len(level) for level in pack(samples, BatchConfig(rejected=options.rejected > 0)).levels
    )
    print(
        f"{options.shape} on {options.device}: {positions} positions, {queries} queries,"
        f" {seconds * 1e3:.1f} ms a step"
    )
    for part, share in shares.items():
        print(f"  {share:6.1%}  {part}")
    if options.trace:
        recorded.export_chrome_trace(str(options.trace))
    if options.out:
        about = {
            "shape": options.shape,
            "device": options.device,
            "positions": positions,
            "torch": torch.__version__,
        }
        options.out.write_text(
            json.dumps(about | {"seconds": seconds, "shares": shares}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
