"""How a step's tensors reach the host without making the scheduler's thread or the forward stream
wait.

On CUDA the outputs of a verify step are slices of a CUDA graph's static buffers that the next
replay overwrites, so they are packed into one private tensor on the forward stream (stream order,
no synchronisation). A side stream then carries that to a pinned buffer, and the publisher's thread
waits for it. No free buffer: the caller counts a drop. Buffers are few, so a message that has to
wait for the trainer is moved out of its buffer (`unload`, on the publisher's thread). On the CPU
the private copies are all there is to do.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from aurora_kernels.dispatch import kernels_run_on

logger = logging.getLogger(__name__)

WITHOUT_KERNELS = (
    "this GPU runs no kernels of Aurora: PyTorch packs each captured step, which costs more and"
    " was never tried; expected an NVIDIA GPU from sm_80 on. Where decoding suffers, capture"
    " less: plugin.capture.sample_rate"
)

# name, numpy's dtype, shape, first byte
Layout = list[tuple[str, np.dtype, tuple[int, ...], int]]


@dataclass(slots=True)
class Staged:
    """Private tensors on the host."""

    tensors: Mapping[str, torch.Tensor]
    nbytes: int

    def fetch(self) -> dict[str, np.ndarray]:
        """By name; bfloat16 as its bits. May wait, so only the publisher's thread calls it."""
        return {name: as_array(tensor) for name, tensor in self.tensors.items()}

    def unload(self) -> None:
        """Give back what is scarce: the message has to wait."""

    def release(self) -> None:
        self.tensors = {}


@dataclass(slots=True)
class Pinned:
    """Tensors on their way to the host, packed."""

    # uint8 [nbytes]: of the pinned buffer, which is still being written; once unloaded, private
    data: np.ndarray
    layout: Layout
    nbytes: int
    buffer: PinnedBuffer | None
    pool: PinnedBuffers

    def fetch(self) -> dict[str, np.ndarray]:
        """As Staged.fetch; views of the pinned buffer."""
        if self.buffer is not None:
            # releases the GIL
            self.buffer.done.synchronize()
        return unpack(self.data, self.layout)

    def unload(self) -> None:
        """Move what the pinned buffer holds to memory of its own, and give the buffer back.

        Waits for the copy, as fetch.
        """
        if self.buffer is not None:
            self.buffer.done.synchronize()
            self.data = self.data.copy()
            self.release()

    def release(self) -> None:
        """Give the pinned buffer back. What was fetched must have been copied out by now."""
        if self.buffer is not None:
            self.pool.free.append(self.buffer)
            self.buffer = None

    # a message that was dropped unread: the buffer may be rewritten only after its copy has ended,
    # which the side stream's order sees to
    def __del__(self):
        self.release()


class HostTensors:
    """The CPU's transfer: nothing to move."""

    # whether a step is packed on the device
    packs = False

    def has_room(self) -> bool:
        return True

    def private(self, tensor: torch.Tensor) -> torch.Tensor:
        """What may be staged of a tensor that the next step overwrites."""
        return tensor.clone(memory_format=torch.contiguous_format)

    def stage(self, tensors: Mapping[str, torch.Tensor]) -> Staged:
        return Staged(tensors, sum(t.nbytes for t in tensors.values()))


@dataclass(eq=False)
class PinnedBuffer:
    # uint8, pinned
    buffer: torch.Tensor
    # packed, on the forward stream
    ready: torch.cuda.Event = field(default_factory=torch.cuda.Event)
    # carried over, on the side stream
    done: torch.cuda.Event = field(default_factory=lambda: torch.cuda.Event(blocking=True))


class PinnedBuffers:
    """CUDA's transfer: `buffers` pinned buffers of `buffer_bytes`, one side stream."""

    packs = True

    def __init__(self, device: torch.device, buffers: int, buffer_bytes: int):
        self.free: collections.deque[PinnedBuffer] = collections.deque(
            PinnedBuffer(torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=True))
            for _ in range(buffers)
        )
        self.buffer_bytes = buffer_bytes
        self.side = torch.cuda.Stream(device)
        if not kernels_run_on(device):
            logger.warning(WITHOUT_KERNELS)

    def has_room(self) -> bool:
        return bool(self.free)

    def private(self, tensor: torch.Tensor) -> torch.Tensor:
        # stage copies
        return tensor

    def stage(self, tensors: Mapping[str, torch.Tensor]) -> Pinned | None:
        """None where no buffer is free or large enough: the caller counts it."""
        if sum(t.nbytes for t in tensors.values()) > self.buffer_bytes:
            return None
        return self.carry(*pack(tensors)) if self.free else None

    def carry(self, packed: torch.Tensor, layout: Layout) -> Pinned | None:
        """As `stage`, of what is packed already: uint8 [bytes]."""
        nbytes = packed.nbytes
        if nbytes > self.buffer_bytes or not self.free:
            return None
        # only this thread takes buffers
        buffer = self.free.popleft()
        buffer.ready.record()
        host = buffer.buffer[:nbytes]
        with torch.cuda.stream(self.side):
            self.side.wait_event(buffer.ready)
            packed.record_stream(self.side)
            host.copy_(packed, non_blocking=True)
            buffer.done.record()
        return Pinned(host.numpy(), layout, nbytes, buffer, self)


def pack(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, Layout]:
    """A copy of them all in one tensor, uint8 [bytes], and where each lies.

    The widest elements come first, so that each is aligned.
    """
    layout: Layout = []
    parts, offset = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        layout.append((name, numpy_dtype(tensor.dtype), tensor.shape, offset))
        # not view(-1): it keeps the stride of a single element
        flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
        parts.append(flat.view(torch.uint8))
        offset += tensor.nbytes
    return torch.cat(parts), layout


def unpack(data: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    """Views of what was packed."""
    return {name: np.ndarray(shape, dtype, data, first) for name, dtype, shape, first in layout}


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """as_array's inverse, where no uint16 is meant."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A view of a tensor on the host; numpy has no bfloat16: its bits, as uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@cache
def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    return as_array(torch.empty(0, dtype=dtype)).dtype
