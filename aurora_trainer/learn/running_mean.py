"""The running mean of the weights: what is published in their stead, if it is switched on.

At a constant learning rate the weights wander around what they would settle at; their mean over the
last updates wanders less (Polyak and Juditsky, 1992; as an exponential mean in most training of
large models). With decay a it is over about 1 / (1 - a) updates. Memory: the draft in float32 once
more, and in the trainer's dtype to be scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from aurora_trainer.drafts.kinds import Draft


class RunningMean:
    """`weights` by name, float32, as the masters are cut; empty at decay 0."""

    def __init__(self, decay: float, masters: Mapping[str, Tensor]):
        self._decay = decay
        self.weights = {n: m.detach().clone() for n, m in masters.items()} if decay else {}
        # updates at which it began
        self.began = 0
        self._draft: Draft | None = None

    @torch.no_grad()
    def update(self, masters: Mapping[str, Tensor], updates: int) -> None:
        """After `updates` updates in all: shorter at first, that the start may not stay in it."""
        if self.weights:
            since = updates - self.began
            keep = min(self._decay, (since + 1) / (since + 10))
            torch._foreach_lerp_(list(self.weights.values()), list(masters.values()), 1 - keep)

    @torch.no_grad()
    def restart(self, masters: Mapping[str, Tensor], updates: int) -> None:
        """Begin again from the weights: those of before were for other traffic."""
        self.began = updates
        for name, held in self.weights.items():
            held.copy_(masters[name])

    @torch.no_grad()
    def draft(self, trained: Draft, whole: Iterable[tuple[str, Tensor]] | None = None) -> Draft:
        """A draft that holds the mean, to be scored; `trained` itself at decay 0.

        whole: the mean by name, where this rank holds only rows of it.
        """
        if not self.weights:
            return trained
        if self._draft is None:
            self._draft = trained.copy().requires_grad_(False)
        own = dict(self._draft.named_parameters())
        for name, weight in self.weights.items() if whole is None else whole:
            own[name].copy_(weight)
        return self._draft
