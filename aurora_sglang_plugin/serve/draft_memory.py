"""The three places of a draft's weights on a device: live (what SGLang drafts with), staged and
previous. Every tensor keeps its address, so that CUDA graphs stay valid; the draft's own parameters
and, with a reduced vocabulary, the target id of each draft id. The target's embedding, which the
draft holds by reference, is in none of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from aurora_sglang_plugin.drafts.kinds import fill
from aurora_sglang_plugin.serve.staging import make_staging_copy, trainable
from aurora_sglang_plugin.weights.manifest import ManifestError

# what changes places at a time
SCRATCH_BYTES = 16 << 20


class DraftMemory:
    """Allocates all of it when it is made: memory that is missing must be missed before anything is
    served. The copies are queued on the current stream."""

    def __init__(self, model: nn.Module, target_ids: torch.Tensor | None):
        # the watcher's thread must be able to write to what is made here
        with torch.inference_mode(False):
            self.staging: Any = make_staging_copy(model)
            staged = dict(trainable(self.staging))
            self._parameters = [live for _, live in trainable(model)]
            self.live = [live.data for live in self._parameters]
            self.staged = [staged[name].data for name, _ in trainable(model)]
            self.staged_ids = None if target_ids is None else torch.empty_like(target_ids)
            if target_ids is not None:
                self.live.append(target_ids)
                self.staged.append(self.staged_ids)
            self.previous = [tensor.clone() for tensor in self.live]
            self._scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device=self.device)

    @property
    def device(self) -> torch.device:
        return self.live[0].device

    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """staged <- a checkpoint's tensors, on the current stream; waits for it, and allocates next
        to nothing. Raises ManifestError if they are not whole and finite."""
        for _, staged in trainable(self.staging):
            # what the loader leaves out is found below
            staged.data.fill_(float("nan"))
        fill(self.staging, self.staged_ids, tensors)
        for name, staged in trainable(self.staging):
            # NaN if any is
            ends = torch.stack(staged.data.aminmax())
            if not bool(ends.isfinite().all()):
                raise ManifestError(
                    "values", f"{name} is not whole and finite in {staged.dtype} after loading"
                )

    def keep(self) -> None:
        """previous <- live"""
        torch._foreach_copy_(self.previous, self.live)

    def put(self, tensors: list[torch.Tensor]) -> None:
        """live <- staged, or previous"""
        torch._foreach_copy_(self.live, tensors)
        self._count_write()

    def exchange(self) -> None:
        """live <-> previous; nothing is allocated."""
        for live, previous in zip(self.live, self.previous):
            scratch = self._scratch.view(live.dtype)
            one, other = live.view(-1), previous.view(-1)
            for at in range(0, len(one), len(scratch)):
                part, back = one[at : at + len(scratch)], other[at : at + len(scratch)]
                aside = scratch[: len(part)].copy_(part)
                part.copy_(back)
                back.copy_(aside)
        self._count_write()

    def _count_write(self) -> None:
        """Writes through .data do not count up a parameter's version, which marks old copies."""
        torch.autograd.graph.increment_version(self._parameters)
