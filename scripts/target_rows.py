"""From documents to rows of tokens for the target's training: the tokenizer, the stream, the
batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"


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
    tokenizer.train_from_iterator(_first(documents, 4_000_000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """The ids of the documents in one row [T], each followed by the end token."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch_fast(
        documents, add_special_tokens=False
    ):
        ids += encoding.ids
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def _first(documents: list[str], characters: int) -> Iterator[str]:
    for document in documents:
        if characters <= 0:
            return
        characters -= len(document)
        yield document


def batches(
    stream: torch.Tensor,
    batch_tokens: int,
    cell: int,
    row_tokens: Callable[[], int],
    generator: torch.Generator,
) -> Iterator[torch.Tensor]:
    """Batches [B, T + 1] without end: cells of the stream in random order, each cut into rows of T
    = row_tokens().

    T divides `cell`, and `cell` divides batch_tokens = B x T. Every pass over the stream cuts it
    elsewhere.
    """
    while True:
        shift = int(torch.randint(cell, (), generator=generator))
        cells = torch.randperm((len(stream) - shift - 1) // cell, generator=generator)
        per_batch = batch_tokens // cell
        if len(cells) < per_batch:
            raise ValueError(
                f"target: {len(stream)} tokens of text are too few for batches of {batch_tokens}"
            )
        for chosen in cells[: len(cells) // per_batch * per_batch].view(-1, per_batch):
            length = row_tokens()
            starts = (chosen[:, None] * cell + torch.arange(0, cell, length)).view(-1, 1) + shift
            yield stream[starts + torch.arange(length + 1)]
