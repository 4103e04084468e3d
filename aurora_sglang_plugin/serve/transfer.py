"""How a step's tensors reach the host without making the scheduler's thread or the forward stream
wait.

What is staged must be private to the caller: the outputs of a verify step are slices of a CUDA
graph's static buffers that the next replay overwrites, so the capture copies them on the forward
stream (stream order, no synchronisation). A side stream then carries the copies to a pinned buffer,
and the publisher's thread waits for that. No free buffer: the caller counts a drop. Buffers are
few, so a message that has to wait for the trainer is moved out of its buffer (`unload`, on the
publisher's thread). On the CPU the private copies are all there is to do.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Staged:
    """Tensors on their way to the host.

    `fetch` may wait, so only the publisher's thread calls it.
    """

    # host tensors; on CUDA, views of a pinned buffer that is still being written
    tensors: dict[str, torch.Tensor]
    nbytes: int
    done: torch.cuda.Event | None = None
    buffer: PinnedBuffer | None = None
    pool: PinnedBuffers | None = None

    def fetch(self) -> dict[str, torch.Tensor]:
        if self.done is not None:
            # releases the GIL
            self.done.synchronize()
        return self.tensors

    def unload(self) -> None:
        """Move what a pinned buffer holds to memory of its own, and give the buffer back.

        Waits for the copy, as fetch.
        """
        if self.buffer is not None:
            tensors = {name: tensor.clone() for name, tensor in self.fetch().items()}
            self.release()
            self.tensors, self.done = tensors, None

    def release(self) -> None:
        """Give the pinned buffer back. What was fetched must have been copied out by now."""
        self.tensors = {}
        if self.buffer is not None:
            self.pool.free.append(self.buffer)
            self.buffer = None

    # a message that was dropped unread: the buffer may be rewritten only after its copy has ended
    def __del__(self):
        self.release()


class HostTensors:
    """The CPU's transfer: nothing to move."""

    def has_room(self) -> bool:
        return True

    def stage(self, tensors: dict[str, torch.Tensor]) -> Staged:
        return Staged(tensors, sum(t.nbytes for t in tensors.values()))


@dataclass(eq=False)
class PinnedBuffer:
    # uint8, pinned
    buffer: torch.Tensor
    done: torch.cuda.Event = field(default_factory=lambda: torch.cuda.Event(blocking=True))


class PinnedBuffers:
    """CUDA's transfer: `buffers` pinned buffers of `buffer_bytes`, one side stream."""

    def __init__(self, device: torch.device, buffers: int, buffer_bytes: int):
        self.free: collections.deque[PinnedBuffer] = collections.deque(
            PinnedBuffer(torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=True))
            for _ in range(buffers)
        )
        self.buffer_bytes = buffer_bytes
        self.side = torch.cuda.Stream(device)

    def has_room(self) -> bool:
        return bool(self.free)

    def stage(self, tensors: dict[str, torch.Tensor]) -> Staged | None:
        """None where no buffer is free or large enough: the caller counts it."""
        nbytes = sum(-(-t.nbytes // 16) * 16 for t in tensors.values())
        if nbytes > self.buffer_bytes:
            return None
        try:
            buffer = self.free.popleft()
        except IndexError:
            return None
        ready = torch.cuda.Event()
        ready.record()
        host, offset = {}, 0
        with torch.cuda.stream(self.side):
            self.side.wait_event(ready)
            for name, tensor in tensors.items():
                tensor.record_stream(self.side)
                view = (
                    buffer.buffer[offset : offset + tensor.nbytes]
                    .view(tensor.dtype)
                    .view(tensor.shape)
                )
                view.copy_(tensor, non_blocking=True)
                host[name] = view
                offset += -(-tensor.nbytes // 16) * 16
            buffer.done.record()
        return Staged(host, nbytes, buffer.done, buffer, self)
