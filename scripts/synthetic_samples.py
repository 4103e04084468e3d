"""Samples of a make-believe request, of any length at once: what a training step is measured on.

Chains of S draft steps hang from every verify step; a random number of their nodes was accepted.
Tokens, features and the target's kept logits are random, so that nothing can be learnt; shapes and
indices are those of real traffic.
"""

from __future__ import annotations

import numpy as np
import torch

from aurora_trainer.intake.sample import Sample


def sample(
    positions: int,
    *,
    vocab: int,
    features: int,
    kept: int,
    num_steps: int = 4,
    prompt_len: int = 16,
    seed: int = 0,
) -> Sample:
    """A request of `positions` committed positions, prompt included; features are bfloat16, as a
    server sends them.
    """
    rng, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (positions + 1,), generator=g)
    # of each verify step, more of them than fit
    accepted = rng.integers(0, num_steps + 1, positions)
    # position of each root
    roots = prompt_len + np.r_[0, np.cumsum(accepted + 1)[:-1]]
    trees = int((roots <= positions).sum())
    accepted, roots = np.minimum(accepted[:trees], positions - roots[:trees]), roots[:trees]
    width = num_steps + 1
    depth = np.tile(np.arange(width), (trees, 1))
    node = np.arange(trees * width).reshape(trees, width)
    on_path = depth <= accepted[:, None]
    position = roots[:, None] + depth
    drafted = torch.randint(vocab, (trees, width), generator=g).numpy()
    position_node = np.full(positions, -1)
    position_node[(position - 1)[on_path]] = node[on_path]
    raw = torch.randn(trees * width, kept, generator=g).mul_(2).sort(-1, descending=True).values
    stride = vocab // kept
    ids = torch.randint(vocab, (trees * width, 1), generator=g) + stride * torch.arange(kept)
    return Sample(
        request=f"r{seed}", session="e", attempt=0, start=0, prompt_len=prompt_len, reason="stop",
        time_ns=0,
        tokens=tokens, features=torch.randn(positions, features, generator=g).bfloat16(),
        position_version=torch.zeros(positions, dtype=torch.int32),
        position_node=torch.from_numpy(position_node),
        node_token=torch.from_numpy(np.where(on_path,
        tokens.numpy()[np.minimum(position, positions)],
        drafted)).flatten(),
        node_parent=torch.from_numpy(np.where(depth > 0, node - 1, -1)).flatten(),
        node_depth=torch.from_numpy(depth).flatten(),
        node_position=torch.from_numpy(np.repeat(roots - 1, width)),
        node_accepted=torch.from_numpy(on_path).flatten(),
        node_altered=torch.zeros(trees * width, dtype=torch.bool),
        topk_ids=ids % vocab, topk_logits=raw, logsumexp=raw.logsumexp(-1) + 0.3,
        num_steps=num_steps, topk=1,
        tree_first=torch.from_numpy(node[:, 0].copy()),
        tree_version=torch.zeros(trees, dtype=torch.int32),
    )  # fmt: skip


def ragged(positions: int, *, seed: int = 0, **about) -> list[Sample]:
    """Requests of 64 to 512 positions, `positions` in all."""
    rng, lengths = np.random.default_rng(seed), []
    while (left := positions - sum(lengths)) > 0:
        lengths.append(left if left < 128 else int(min(rng.integers(64, 513), left - 64)))
    return [sample(n, seed=seed + 1 + i, **about) for i, n in enumerate(lengths)]
