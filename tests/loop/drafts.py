"""Drafts for the loop's tests: they accept a little, and every weight of them matters."""

from __future__ import annotations

from pathlib import Path

import torch

from aurora_trainer.draft import Draft
from aurora_trainer.init_draft import init_draft


def make_draft(directory: Path, target: Path, *, draft_vocab: int | None = None, seed: int = 0) -> Path:
    """Started from the target, then disturbed: its attention would add nothing, and its fc would read one layer.

    A reduced vocabulary is another one for each seed.
    """
    counts = torch.rand(_vocab(target), generator=torch.Generator().manual_seed(seed))
    counts[:256] += seed == 0  # bytes: the initial draft can write most of the text
    draft = init_draft(target, directory, "target", draft_vocab=draft_vocab, token_counts=counts)
    disturb(draft, seed)
    draft.save(directory)
    return directory


@torch.no_grad()
def disturb(draft: Draft, seed: int) -> Draft:
    """Add noise in place, in units of 1 / sqrt(fan in): a little everywhere, much where attention comes in."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in draft.named_parameters():
        if parameter.dim() == 2:
            size = 4.0 if name.endswith("o_proj.weight") else 0.2
            parameter += torch.randn(parameter.shape, generator=generator) * size * parameter.shape[1] ** -0.5
    return draft


def _vocab(target: Path) -> int:
    from aurora_trainer.target import open_target

    return open_target(target).config["vocab_size"]
