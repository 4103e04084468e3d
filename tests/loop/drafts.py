"""Drafts for the loop's tests: they accept something, differ from each other, and every weight of
them matters.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.eagle3_init import init_draft, randomise
from aurora_trainer.drafts.target import open_target

WINDOW, WINDOWS, STEPS = 64, 6, 80


def make_draft(
    directory: Path, target: Path, *, draft_vocab: int | None = None, seed: int = 0
) -> Path:
    """Random, of the shape of those that the servers began with, or with a reduced vocabulary of
    its own for each seed. It accepts next to nothing."""
    size = open_target(target).config["vocab_size"]
    counts = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    draft = init_draft(
        target, directory, "target", draft_vocab=draft_vocab, token_counts=counts, seed=seed
    )
    randomise(draft, seed)
    draft.save(directory)
    return directory


def teach(draft: Draft, model: torch.nn.Module, stream: list[int], seed: int = 0) -> Draft:
    """A few seconds of training, in place: predict the target's greedy choice at two depths from
    windows of text.
    """
    torch.set_num_threads(1)
    layers = draft.config.aux_layer_ids
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    size = WINDOW - 1
    start = torch.arange(WINDOWS).repeat_interleave(size) * size
    positions = torch.arange(size).repeat(WINDOWS)
    position = torch.arange(WINDOWS * size)
    for _ in range(STEPS):
        firsts = torch.randint(len(stream) - WINDOW, (WINDOWS,), generator=generator).tolist()
        tokens = torch.tensor([stream[first : first + WINDOW] for first in firsts])
        with torch.no_grad():
            out = model(tokens, output_hidden_states=True)
        features = torch.cat([out.hidden_states[i + 1] for i in layers], -1)[:, :-1].flatten(0, 1)
        # at position p: what follows x[p]
        choice = out.logits.argmax(-1)
        state, kv = draft.context(tokens[:, 1:].flatten(), features, positions, start)
        # position i predicts what follows x[i + 1]
        loss = _cross_entropy(draft, state, choice[:, 1:].flatten())
        deeper = torch.where(positions < size - 1)[0]
        node = tokens[:, 2:].flatten()
        own = torch.arange(len(deeper))[:, None]
        state, _ = draft.nodes(
            node,
            state[deeper],
            positions[deeper] + 1,
            kv,
            None,
            start[deeper],
            position[deeper] + 1,
            own,
        )
        loss = loss + 0.8 * _cross_entropy(draft, state, choice[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return draft


@torch.no_grad()
def disturb(draft: Draft, seed: int, size: float) -> Draft:
    """Add noise in place, `size` times 1 / sqrt(fan in)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in draft.parameters():
        if parameter.dim() == 2:
            parameter += (
                torch.randn(parameter.shape, generator=generator)
                * size
                * parameter.shape[1] ** -0.5
            )
    return draft


def _cross_entropy(draft: Draft, state: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    labels = draft.draft_ids[target_ids]
    return F.cross_entropy(draft.logits(state), labels, ignore_index=-1)
