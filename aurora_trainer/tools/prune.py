"""`aurora-trainer prune-vocab`: how often each target token is generated, in recorded traffic or in
text, and what a draft vocabulary of so many of them would cover.

The counts file (a JSON list of V numbers) is what `init-draft --counts` and `export --counts` read:
one way to choose a vocabulary, for a draft that is made and for one that is there. V target
vocabulary, VD draft vocabulary.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aurora_sglang_plugin.link import wire
from aurora_trainer.drafts import vocab
from aurora_trainer.drafts.target import Target
from aurora_trainer.terminal import columns

# coverage is measured on requests that were not counted
HALVES = 2
MAX_MESSAGE_BYTES = 1 << 30
SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class Coverage:
    """One size of draft vocabulary: which share of the traffic's tokens it has."""

    size: int
    # of the tokens that chose it, e.g. 0.991
    counted: float
    # of one half's tokens by the other half's choice: what to expect of traffic to come
    held_out: float
    # of the head's rows, in the target's dtype
    head_bytes: int


def count_messages(messages: Iterable[list[bytes]], target: Target) -> Tensor:
    """int64 [HALVES, V]: how often each token was generated, of two halves of the requests (by
    their id's hash).

    messages: a recording's raw parts. Counts what verify steps committed, up to an end-of-text
        token in each step.
    Raises ValueError (wire.WireError) for a message that cannot be read, and for tokens outside the
    vocabulary.
    """
    size = target.config["vocab_size"]
    counts = torch.zeros(HALVES, size, dtype=torch.int64)
    eos = torch.tensor(target.eos_token_ids, dtype=torch.int64)
    for parts in messages:
        message = wire.decode(parts, max_bytes=MAX_MESSAGE_BYTES)
        if message.header.kind != "verify":
            continue
        tokens = torch.from_numpy(message.arrays["next_tokens"].copy()).long()
        lens = torch.from_numpy(message.arrays["feature_lens"].copy()).long()
        kept = torch.arange(tokens.shape[1]) < lens[:, None]
        ended = torch.isin(tokens, eos) & kept
        # an accepted path runs past the end; nobody reads that
        kept &= (ended.cumsum(1) - ended.long()) == 0
        if kept.any() and int(tokens[kept].max()) >= size:
            raise ValueError(
                f"the recording holds token {int(tokens[kept].max())}, the target has {size}: not"
                " its own"
            )
        half = torch.tensor([zlib.crc32(r.encode()) % HALVES for r in message.header.requests])
        for n in range(HALVES):
            counts[n] += tokens[kept & (half == n)[:, None]].bincount(minlength=size)
    return counts


def count_text(paths: Sequence[Path], target: Target) -> Tensor:
    """The same from text files, with the target's own tokenizer.json; the halves are every other
    line.
    """
    from tokenizers import Tokenizer

    path = target.directory / "tokenizer.json"
    if not path.exists():
        raise ValueError(
            f"{target.directory} has no tokenizer.json; count from a recording instead"
        )
    tokenizer, size = Tokenizer.from_file(str(path)), target.config["vocab_size"]
    counts = torch.zeros(HALVES, size, dtype=torch.int64)
    for number, line in enumerate(_lines(paths)):
        ids = torch.tensor(tokenizer.encode(line, add_special_tokens=False).ids, dtype=torch.int64)
        counts[number % HALVES].scatter_add_(0, ids, torch.ones_like(ids))
    return counts


def coverage(counts: Tensor, sizes: Sequence[int], target: Target) -> list[Coverage]:
    """What vocabularies of `sizes` tokens cover; counts [HALVES, V].

    Raises ValueError if nothing was counted.
    """
    if not counts.sum():
        raise ValueError(
            "no generated token was counted: the recording holds no verify steps, or the text is"
            " empty"
        )
    keep, row = (
        target.eos_token_ids,
        target.config["hidden_size"] * target.embedding().element_size(),
    )
    total, found = counts.sum(0), []
    for size in sizes:
        kept = _mask(total, size, keep)
        others = [(counts[n] * _mask(counts[1 - n], size, keep)).sum() for n in range(HALVES)]
        held_out = int(sum(others)) / int(total.sum())
        found.append(
            Coverage(size, int((total * kept).sum()) / int(total.sum()), held_out, size * row)
        )
    return found


def write_counts(counts: Tensor, path: Path) -> None:
    """The counts file, replaced whole."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(counts.sum(0).tolist()))
    os.replace(temporary, path)


def read_counts(path: Path) -> Tensor:
    """int64 [V] of a counts file. Raises ValueError for anything else."""
    try:
        counts = torch.tensor(json.loads(Path(path).read_text()))
        if counts.dim() != 1 or counts.is_complex() or bool((counts < 0).any()):
            raise ValueError
        return counts
    except (ValueError, TypeError, RuntimeError):
        raise ValueError(
            f"{path}: expected a JSON list of one count for each target token; `aurora-trainer"
            " prune-vocab` writes one"
        ) from None


def default_sizes(target: Target) -> list[int]:
    """Powers of two below the target's vocabulary, the largest six, and the vocabulary itself."""
    v = target.config["vocab_size"]
    return [s for s in SIZES if s < v][-6:] + [v]


def table(rows: Sequence[Coverage]) -> list[str]:
    """Lines for a terminal."""
    cells = [
        [str(r.size), f"{r.counted:.2%}", f"{r.held_out:.2%}", f"{r.head_bytes / 1e6:.1f}"]
        for r in rows
    ]
    return columns(["tokens", "covered", "held out", "head MB"], cells, "right")


def _mask(counts: Tensor, size: int, keep: tuple[int, ...]) -> Tensor:
    return vocab.mask(vocab.most_frequent(counts, size, keep), len(counts))


def _lines(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from file
