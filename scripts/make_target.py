"""Makes the demo's target: a small Qwen3 language model, trained from nothing on the text of
`text.py`.

    python scripts/make_target.py [--minutes 6] [--quick] [--out .cache/target]

The clock is the budget: reading the text, training the tokenizer and the model, and the report all
fit in it. The result is a directory that SGLang and transformers load as they load any other; it is
made once and then reused. `target/` beside this script, which the demo serves, was made so.
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
# a thread that spins takes the core that its partner waits for
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import fcntl
import hashlib
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import text
import torch
from measure_target import distinct_fraction, greedy, held_out
from muon import Muon
from target_model import NextTokenLoss, TargetModel
from target_rows import batches, token_stream, train_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from transformers.utils import logging as transformers_logging
from unloop import Unloop


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the target becomes; its fingerprint names the cached result."""

    minutes: float = 6.0
    # of the optimizer; 0 leaves it to the clock
    steps: int = 0
    seed: int = 0
    vocab_size: int = 2048
    layers: int = 6
    hidden: int = 192
    intermediate: int = 512
    heads: int = 3
    kv_heads: int = 1
    head_dim: int = 64
    tied: bool = True
    context: int = 1024
    batch_tokens: int = 4096
    # attention is a third of a step at 1024
    row_tokens: int = 256
    # share of the time after which rows are `context` long
    long_rows_from: float = 0.85
    matrix_lr: float = 0.01
    other_lr: float = 0.004
    weight_decay: float = 0.02
    # share of the time after which the model unlearns its loops, see unloop.py
    unloop_from: float = 0.65
    unloop_weight: float = 4.0
    # share of the time after which the learning rates fall to nothing
    decay_from: float = 0.4
    # of each domain
    text_bytes: int = 1 << 30
    # kept for saving and measuring
    report_s: float = 20.0

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


# by steps: a busy machine makes the tests' target late, not bad
QUICK = replace(
    Recipe(),
    minutes=0.9,
    steps=100,
    vocab_size=1024,
    layers=4,
    hidden=128,
    intermediate=320,
    heads=2,
    text_bytes=1_500_000,
    report_s=10.0,
)


def fastest_dtype(device: str) -> torch.dtype:
    """bfloat16 on a GPU, and if this processor multiplies it clearly faster than float32."""
    if device == "cuda":
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(4096, 192).to(dtype), torch.randn(192, 1024).to(dtype)
        rounds = []
        # the fastest of them: others may use this machine too
        for _ in range(10):
            started = time.perf_counter()
            left @ right
            rounds.append(time.perf_counter() - started)
        seconds[dtype] = min(rounds)
    return (
        torch.bfloat16 if seconds[torch.bfloat16] < 0.7 * seconds[torch.float32] else torch.float32
    )


def train(recipe: Recipe, config: Qwen3Config, stream: torch.Tensor, until_s: float) -> TargetModel:
    """Trains until `time.monotonic()` is until_s, or for recipe.steps; the schedule follows the
    same measure.
    """
    torch.manual_seed(recipe.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = fastest_dtype(device)
    model = TargetModel(config, dtype).to(device)
    matrices = [weight for name, weight in model.weights.items() if "_proj" in name]
    others = [weight for name, weight in model.weights.items() if "_proj" not in name]
    optimizers = {
        Muon(
            matrices, lr=0.0, weight_decay=recipe.weight_decay, compute_dtype=dtype
        ): recipe.matrix_lr,
        torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0): recipe.other_lr,
    }
    started = time.monotonic()

    def progress() -> float:
        if recipe.steps:
            return step / recipe.steps
        return (time.monotonic() - started) / max(1e-3, until_s - started)

    def row_tokens() -> int:
        return recipe.context if progress() > recipe.long_rows_from else recipe.row_tokens

    generator = torch.Generator().manual_seed(recipe.seed)
    rows = batches(stream, recipe.batch_tokens, recipe.context, row_tokens, generator)
    unloop = Unloop(model, stream, generator)
    step, recent, shown, seen_tokens = 0, [], started, 0
    for batch in rows:
        done = progress()
        if done >= 1:
            break
        batch = batch.to(device)
        hidden = model(batch[:, :-1])
        loss = NextTokenLoss.apply(hidden.flatten(0, 1), model.head, batch[:, 1:].flatten())
        loss.backward()
        if done > recipe.unloop_from:
            (recipe.unloop_weight * unloop.loss()).backward()
        rate = min(1.0, (step + 1) / 30) * min(1.0, (1 - done) / (1 - recipe.decay_from))
        for optimizer, lr in optimizers.items():
            optimizer.param_groups[0]["lr"] = lr * rate
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        recent = [*recent[-49:], loss.item()]
        seen_tokens += batch[:, 1:].numel()
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            print(
                f"  {done:4.0%}  step {step}  loss {sum(recent) / len(recent):.3f}  "
                f"{seen_tokens / (shown - started):,.0f} tokens/s  {until_s - shown:.0f} s left",
                end="\r" if sys.stdout.isatty() else "\n",
                flush=True,
            )
    print(
        f"\n  {step} steps, {seen_tokens:,} tokens in {time.monotonic() - started:.0f} s,"
        f" {model.compute_dtype}"
    )
    return model


def save(model: TargetModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    exported = AutoModelForCausalLM.from_config(model.config)
    missing, unexpected = exported.load_state_dict(
        {name: weight.detach().cpu() for name, weight in model.weights.items()}, strict=False
    )
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    exported.tie_weights()
    exported.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make(recipe: Recipe, directory: Path) -> None:
    """Trains a target and puts it at `directory`, whole or not at all; one process at a time, the
    others wait.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name(f"{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_ready(recipe, directory):
            _make(recipe, directory)


def _make(recipe: Recipe, directory: Path) -> None:
    started = time.monotonic()
    transformers_logging.disable_progress_bar()
    if "OMP_NUM_THREADS" not in os.environ:
        # more have too little to do at this size
        torch.set_num_threads(min(4, os.cpu_count() or 1))
    # exp of very negative logits is otherwise ten times slower
    torch.set_flush_denormal(True)
    documents = [
        d for domain in text.DOMAINS for d in text.documents(domain, "train", recipe.text_bytes)
    ]
    order = torch.randperm(
        len(documents), generator=torch.Generator().manual_seed(recipe.seed)
    ).tolist()
    documents = [documents[i] for i in order]
    tokenizer = train_tokenizer(documents, recipe.vocab_size)
    stream = token_stream(tokenizer, documents)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=recipe.tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    print(
        f"target: {len(stream):,} training tokens ready after {time.monotonic() - started:.0f} s",
        flush=True,
    )
    # A machine so busy that reading took the time still trains for a while.
    until_s = max(
        started + 60 * recipe.minutes - recipe.report_s, time.monotonic() + 15 * recipe.minutes
    )
    model = train(recipe, config, stream, until_s)

    temporary = directory.with_name(f"{directory.name}.tmp{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save(model, tokenizer, temporary)
    report = {"parameters": sum(weight.numel() for weight in model.weights.values())}
    for domain in text.DOMAINS:
        prompts = text.prompts(domain, 40, 48, tokenizer, seed=1)
        report[domain] = held_out(
            model, tokenizer, domain, 250_000 if recipe.minutes > 2 else 60_000
        ) | {
            "distinct_4grams": distinct_fraction(
                greedy(temporary, prompts, 128 if recipe.minutes > 2 else 48)
            )
        }
        print(
            f"  held-out {domain}: " + ", ".join(f"{k} {v:.3f}" for k, v in report[domain].items()),
            flush=True,
        )
    report |= {
        "seconds": time.monotonic() - started,
        "fingerprint": recipe.fingerprint(),
        "recipe": asdict(recipe),
    }
    (temporary / "target.json").write_text(json.dumps(report, indent=1))
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)
    print(f"target: ready at {directory} after {report['seconds']:.0f} s", flush=True)


def is_ready(recipe: Recipe, directory: Path) -> bool:
    report = directory / "target.json"
    return (
        report.is_file()
        and json.loads(report.read_text()).get("fingerprint") == recipe.fingerprint()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, help="wall clock for everything (6; 0.9 with --quick)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small target within a minute, for tests"
    )
    parser.add_argument(
        "--out", type=Path, help=".cache/target, or .cache/target-quick with --quick"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="a field of the recipe"
    )
    options = parser.parse_args()
    recipe = QUICK if options.quick else Recipe()
    if options.minutes:
        recipe = replace(recipe, minutes=options.minutes)
    for assignment in options.set:
        name, value = assignment.split("=")
        recipe = replace(recipe, **{name: json.loads(value)})
    directory = options.out or Path(".cache") / ("target-quick" if options.quick else "target")
    if is_ready(recipe, directory):
        print(f"target: {directory} is there already")
    else:
        make(recipe, directory)


if __name__ == "__main__":
    main()
