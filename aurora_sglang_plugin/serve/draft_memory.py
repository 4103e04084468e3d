"""The three places of a draft's weights on a device: live (what SGLang drafts with), staged and
previous. Every tensor keeps its address, so that CUDA graphs stay valid; the draft's own parameters
and, with a reduced vocabulary, the target id of each draft id. The target's embedding, which the
draft holds by reference, is in none of them.

    staging stream   staged <- a checkpoint (`fill`), previous <- live (`keep`)
    current stream   live <- staged or previous (`put`), live <-> previous (`exchange`)

Events order them, so that nobody waits on the host; on the CPU each is done when it returns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from aurora_sglang_plugin.drafts.kinds import fill
from aurora_sglang_plugin.serve.staging import make_staging_copy, trainable
from aurora_sglang_plugin.serve.stopwatch import Stopwatch
from aurora_sglang_plugin.weights.manifest import ManifestError

# what changes places at a time
SCRATCH_BYTES = 16 << 20


class DraftMemory:
    """Allocates all of it when it is made: memory that is missing must be missed before anything is
    served. `fill` is the watcher thread's, all else the scheduler thread's; beside `fill` only
    `exchange` and a `put` of what is previous may run."""

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
        # of the copies that stand between two steps
        self.stopwatch = Stopwatch(self.device)
        self._staging_stream = self._staged_event = self._written_event = None
        if self.device.type == "cuda":
            self._staging_stream = torch.cuda.Stream(self.device)
            # the staging stream's last copy; live's or previous' last write by the current stream
            self._staged_event, self._written_event = torch.cuda.Event(), torch.cuda.Event()
            self._written_event.record()

    @property
    def device(self) -> torch.device:
        return self.live[0].device

    def fill(self, tensors: Mapping[str, tuple[str, np.ndarray]]) -> None:
        """staged <- a checkpoint's (dtype, array) by name; waits for it, and allocates next to
        nothing. Raises ManifestError if they are not whole and finite."""
        with torch.no_grad(), self._staging():
            self._fill({name: _as_torch(*tensor) for name, tensor in tensors.items()})
        if self._staged_event:
            # this thread may wait; host tensors must outlive their copies
            self._staged_event.synchronize()

    def _fill(self, tensors: dict[str, torch.Tensor]) -> None:
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
        """previous <- live; allocates nothing."""
        if self._staging_stream is None:
            # of a swap's time as well
            self.stopwatch.start(0)
        with self._staging():
            torch._foreach_copy_(self.previous, self.live)
        if self._staging_stream is None:
            self.stopwatch.pause()

    def put(self, tensors: list[torch.Tensor]) -> None:
        """live <- staged, or previous"""
        with self._writing():
            torch._foreach_copy_(self.live, tensors)

    def exchange(self) -> None:
        """live <-> previous; nothing is allocated."""
        with self._writing():
            for live, previous in zip(self.live, self.previous):
                scratch = self._scratch.view(live.dtype)
                one, other = live.view(-1), previous.view(-1)
                for at in range(0, len(one), len(scratch)):
                    part, back = one[at : at + len(scratch)], other[at : at + len(scratch)]
                    aside = scratch[: len(part)].copy_(part)
                    part.copy_(back)
                    back.copy_(aside)

    @contextmanager
    def _staging(self) -> Iterator[None]:
        """In the staging stream, after what the current stream wrote to live and previous, and
        after what it read of staged."""
        if self._staging_stream is None:
            yield
            return
        with torch.cuda.stream(self._staging_stream):
            self._staging_stream.wait_event(self._written_event)
            yield
            self._staged_event.record(self._staging_stream)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """In the current stream, after the staging stream's last copy."""
        self.stopwatch.start(0)
        if self._staged_event:
            torch.cuda.current_stream().wait_event(self._staged_event)
        yield
        self.stopwatch.stop()
        # writes through .data do not count up a parameter's version, which marks old copies
        torch.autograd.graph.increment_version(self._parameters)
        if self._written_event:
            self._written_event.record()


def _as_torch(dtype: str, array: np.ndarray) -> torch.Tensor:
    """A view: the file was read into memory of its own."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor
