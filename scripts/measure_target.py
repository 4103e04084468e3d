"""How good a target is: held-out perplexity, and how much it repeats itself when it is decoded
greedily.
"""

from __future__ import annotations

import math
from pathlib import Path

import text
import torch
from target_model import NextTokenLoss, TargetModel
from target_rows import token_stream
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


@torch.no_grad()
def held_out(
    model: TargetModel, tokenizer: PreTrainedTokenizerFast, domain: str, limit_bytes: int
) -> dict[str, float]:
    """Perplexity per token and bits per byte, which does not depend on the vocabulary, of a
    domain's held-out text.
    """
    documents, size = [], 0
    for document in text.documents(domain, "heldout"):
        if size < limit_bytes:
            documents.append(document[: limit_bytes // 10])
            size += len(documents[-1].encode())
    stream = token_stream(tokenizer, documents)
    width = model.config.max_position_embeddings // 2
    rows = stream[: (len(stream) - 1) // width * width].view(-1, width)
    total = 0.0
    for batch in rows.to(model.head.device).split(8):
        hidden = model(batch[:, :-1]).flatten(0, 1)
        total += NextTokenLoss.apply(hidden, model.head, batch[:, 1:].flatten()).item() * len(
            hidden
        )
    nats = total / (rows.size(0) * (width - 1))
    return {
        "perplexity": math.exp(nats),
        "bits_per_byte": nats / math.log(2) * len(stream) / size,
        "bytes_per_token": size / len(stream),
    }


def distinct_fraction(generated: list[list[int]], n: int = 4) -> float:
    """The share of all n-grams in the generated rows that are different: low if a model repeats
    itself.
    """
    grams = [tuple(row[i : i + n]) for row in generated for i in range(len(row) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


@torch.no_grad()
def greedy(directory: Path, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy continuations, as the server gives them, of prompts of one length."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().to(device)
    ids = torch.tensor(prompts, device=device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
    )
    return out[:, ids.size(1) :].tolist()
