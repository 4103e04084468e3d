"""Teaches a small model out of its loops: what it repeats in its own greedy text is what must not
come next.

Decoded greedily, a small model soon says the same few words forever, and a draft for it would only
learn that loop. So late in its training the model now and then continues some training text by
itself; every token that completes an n-gram which that row has seen before gets the loss -log(1 -
p) (sequence-level unlikelihood, Welleck et al., 2019).
"""

from __future__ import annotations

import torch
from target_model import NextTokenLoss, TargetModel
from transformers import AutoModelForCausalLM

ROWS, PROMPT_TOKENS, NEW_TOKENS = 24, 24, 72
# of what was written, before the model writes again
_USES = 2


def repeats(ids: torch.Tensor, start: int, n: int = 4) -> torch.Tensor:
    """A mask [B, T]: the places from `start` on where the last n of ids [B, T] stand earlier in the
    same row.
    """
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, tokens in enumerate(ids.tolist()):
        seen = set()
        for end in range(n, len(tokens) + 1):
            gram = tuple(tokens[end - n : end])
            mask[row, end - 1] = gram in seen and end > start
            seen.add(gram)
    return mask.to(ids.device)


class Unloop:
    """Holds the model's latest greedy text, and which of its tokens are repeats."""

    def __init__(self, model: TargetModel, stream: torch.Tensor, generator: torch.Generator):
        self.model, self.stream, self.generator = model, stream, generator
        self.uses = 0
        # Hugging Face's has a KV cache
        self.decoder = AutoModelForCausalLM.from_config(model.config).eval().to(model.head.device)

    @torch.no_grad()
    def _write(self) -> None:
        """Let the model, as it is now, continue text from random places of the stream."""
        self.decoder.load_state_dict(
            {n: weight.detach() for n, weight in self.model.weights.items()}, strict=False
        )
        starts = torch.randint(
            len(self.stream) - PROMPT_TOKENS, (ROWS, 1), generator=self.generator
        )
        prompts = self.stream[starts + torch.arange(PROMPT_TOKENS)].to(self.model.head.device)
        length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
        ids = self.decoder.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, **length
        )
        self.inputs, self.labels, self.repeated = (
            ids[:, :-1],
            ids[:, 1:],
            repeats(ids, PROMPT_TOKENS)[:, 1:],
        )

    def share(self) -> float:
        """The share of the written tokens that are repeats."""
        return self.repeated.sum().item() / (ROWS * NEW_TOKENS)

    def loss(self) -> torch.Tensor:
        """Mean over the written tokens of -log(1 - p) where they are repeats, and of nothing
        elsewhere.
        """
        if self.uses % _USES == 0:
            self._write()
        self.uses += 1
        hidden, labels = self.model(self.inputs)[self.repeated], self.labels[self.repeated]
        if not len(labels):
            return torch.zeros((), requires_grad=True)
        return self.share() * NextTokenLoss.apply(
            hidden, self.model.head, labels, torch.ones_like(labels, dtype=bool)
        )
