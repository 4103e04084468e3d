"""Makes the demo's target: a small Qwen3 language model, trained from nothing on the text of `text.py`.

    python scripts/make_target.py [--minutes 6] [--quick] [--out .cache/target]

The clock is the budget: reading the text, training the tokenizer and the model, and the report all fit in it. The
result is a directory that SGLang and transformers load as they load any other; it is made once and then reused.
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import text
import torch
from muon import Muon
from target_model import NextTokenLoss, TargetModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

END = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the target becomes; its fingerprint names the cached result."""

    minutes: float = 6.0
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
    row_tokens: int = 256  # attention is a third of a step at 1024
    long_rows_from: float = 0.85  # share of the time after which rows are `context` long
    matrix_lr: float = 0.01
    other_lr: float = 0.004
    weight_decay: float = 0.02
    decay_from: float = 0.4  # share of the time after which the learning rates fall to nothing
    text_bytes: int = 1 << 30  # of each domain

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


QUICK = replace(
    Recipe(), minutes=0.9, vocab_size=1024, layers=4, hidden=128, intermediate=320, heads=2, text_bytes=1_500_000
)


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """The ids of the documents in one row [T], each followed by the end token."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch_fast(documents, add_special_tokens=False):
        ids += encoding.ids
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def batches(stream: torch.Tensor, recipe: Recipe, progress) -> Iterator[torch.Tensor]:
    """Batches [B, T + 1] of rows in random order; every pass over the stream cuts it elsewhere."""
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        shift = int(torch.randint(recipe.context, (), generator=generator))
        cells = (len(stream) - shift - 1) // recipe.context
        order = torch.randperm(cells, generator=generator)
        per_batch = recipe.batch_tokens // recipe.context
        for chosen in order[: cells // per_batch * per_batch].view(-1, per_batch):
            length = recipe.context if progress() > recipe.long_rows_from else recipe.row_tokens
            starts = (chosen[:, None] * recipe.context + torch.arange(0, recipe.context, length)).view(-1, 1) + shift
            yield stream[starts + torch.arange(length + 1)]


def fastest_dtype() -> torch.dtype:
    """bfloat16 where this processor multiplies it clearly faster than float32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(4096, 192).to(dtype), torch.randn(192, 1024).to(dtype)
        rounds = []
        for _ in range(10):  # the fastest of them: others may use this machine too
            started = time.perf_counter()
            left @ right
            rounds.append(time.perf_counter() - started)
        seconds[dtype] = min(rounds)
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.7 * seconds[torch.float32] else torch.float32


def train(recipe: Recipe, config: Qwen3Config, stream: torch.Tensor, until_s: float) -> TargetModel:
    """Trains until the clock `time.monotonic()` says until_s; the schedule follows the clock too."""
    torch.manual_seed(recipe.seed)
    model = TargetModel(config, fastest_dtype())
    matrices = {n: w for n, w in model.weights.items() if "_proj" in n}
    others = [w for n, w in model.weights.items() if n not in matrices]
    optimizers = {
        Muon(matrices.values(), lr=recipe.matrix_lr, weight_decay=recipe.weight_decay): recipe.matrix_lr,
        torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=0.0): recipe.other_lr,
    }
    started = time.monotonic()

    def progress() -> float:
        return (time.monotonic() - started) / (until_s - started)

    recent, shown, seen_tokens = [], started, 0
    for step, batch in enumerate(batches(stream, recipe, progress)):
        done = progress()
        if done >= 1:
            break
        hidden = model(batch[:, :-1])
        loss = NextTokenLoss.apply(hidden.flatten(0, 1), model.head, batch[:, 1:].flatten())
        loss.backward()
        rate = min(1.0, (step + 1) / 30) * min(1.0, (1 - done) / (1 - recipe.decay_from))
        for optimizer, lr in optimizers.items():
            optimizer.param_groups[0]["lr"] = lr * rate
            optimizer.step()
            optimizer.zero_grad()
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
    print(f"\n  {step} steps, {seen_tokens:,} tokens in {time.monotonic() - started:.0f} s, {model.compute_dtype}")
    return model


@torch.no_grad()
def held_out(model: TargetModel, tokenizer: PreTrainedTokenizerFast, domain: str, limit_bytes: int) -> dict[str, float]:
    """Perplexity per token and bits per byte, which does not depend on the vocabulary, of a domain's held-out text."""
    documents, size = [], 0
    for document in text.documents(domain, "heldout"):
        if size < limit_bytes:
            documents.append(document[: limit_bytes // 10])
            size += len(documents[-1].encode())
    stream = token_stream(tokenizer, documents)
    width = model.config.max_position_embeddings // 2
    rows = stream[: (len(stream) - 1) // width * width].view(-1, width)
    total = 0.0
    for batch in rows.split(8):
        hidden = model(batch[:, :-1]).flatten(0, 1)
        total += NextTokenLoss.apply(hidden, model.head, batch[:, 1:].flatten()).item() * len(hidden)
    nats = total / (rows.size(0) * (width - 1))
    return {
        "perplexity": math.exp(nats),
        "bits_per_byte": nats / math.log(2) * len(stream) / size,
        "bytes_per_token": size / len(stream),
    }


def distinct_fraction(generated: list[list[int]], n: int = 4) -> float:
    """Of all n-grams in the generated rows, the share that are different: low where a model repeats itself."""
    grams = [tuple(row[i : i + n]) for row in generated for i in range(len(row) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


@torch.no_grad()
def greedy(directory: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy continuations, as the server gives them, of prompts of one length."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor(prompts)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
    )
    return out[:, ids.size(1) :].tolist()


def save(model: TargetModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    exported = AutoModelForCausalLM.from_config(model.config)
    missing, unexpected = exported.load_state_dict(
        {name: weight.detach() for name, weight in model.weights.items()}, strict=False
    )
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    exported.tie_weights()
    exported.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make(recipe: Recipe, directory: Path) -> None:
    """Trains a target and puts it at `directory`, whole or not at all."""
    started = time.monotonic()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    torch.set_flush_denormal(True)  # exp of very negative logits is otherwise ten times slower
    documents = [d for domain in text.DOMAINS for d in text.documents(domain, "train", recipe.text_bytes)]
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    documents = [documents[i] for i in order]
    tokenizer = train_tokenizer(_first_bytes(documents, 4_000_000), recipe.vocab_size)
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
    print(f"target: {len(stream):,} training tokens ready after {time.monotonic() - started:.0f} s", flush=True)
    model = train(recipe, config, stream, started + 0.94 * 60 * recipe.minutes)

    temporary = directory.with_name(f"{directory.name}.tmp{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save(model, tokenizer, temporary)
    report = {"parameters": sum(weight.numel() for weight in model.weights.values())}
    for domain in text.DOMAINS:
        prompts = text.prompts(domain, 40, 48, tokenizer, seed=1)
        report[domain] = held_out(model, tokenizer, domain, 250_000 if recipe.minutes > 2 else 60_000) | {
            "distinct_4grams": distinct_fraction(greedy(temporary, prompts, 128 if recipe.minutes > 2 else 48))
        }
        print(f"  held-out {domain}: " + ", ".join(f"{k} {v:.3f}" for k, v in report[domain].items()), flush=True)
    report |= {"seconds": time.monotonic() - started, "fingerprint": recipe.fingerprint(), "recipe": asdict(recipe)}
    (temporary / "target.json").write_text(json.dumps(report, indent=1))
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)
    print(f"target: ready at {directory} after {report['seconds']:.0f} s", flush=True)


def _first_bytes(documents: list[str], limit: int) -> list[str]:
    kept, size = [], 0
    for document in documents:
        if size < limit:
            kept.append(document)
            size += len(document)
    return kept


def is_ready(recipe: Recipe, directory: Path) -> bool:
    report = directory / "target.json"
    return report.is_file() and json.loads(report.read_text()).get("fingerprint") == recipe.fingerprint()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="wall clock for everything (6; 0.9 with --quick)")
    parser.add_argument("--quick", action="store_true", help="a small target within a minute, for tests")
    parser.add_argument("--out", type=Path, help=".cache/target, or .cache/target-quick with --quick")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="a field of the recipe")
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
