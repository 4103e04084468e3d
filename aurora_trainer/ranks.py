"""The ranks: processes that train one draft together, a GPU each, started by torchrun.

    torchrun --nproc-per-node 4 -m aurora_trainer run --config aurora.toml

Rank 0 is the trainer: it alone receives, keeps the buffer, publishes, writes checkpoints and
metrics. To the others it tells one order after the other (`tell`, `hear`; learn/follower.py), and
while an order is carried out all of them take part in the same sums.

Alone (one rank) nothing is sent, and a sum is the rank's own.

Nothing is tried again where a rank is gone or silent: the others say so and end with exit code
APART, and torchrun starts all of them again, from the last checkpoint (`--max-restarts`).
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from aurora_sglang_plugin.config import Section

log = logging.getLogger(__name__)

# exit code of a rank that lost another one
APART = 3
# of a tensor in an order
ALIGN_BYTES = 64
# rank 0 says something at least so often, as a part of the timeout
SPEAKS = 0.1


class RanksConfig(Section):
    """Several processes that train one draft, started by torchrun."""

    # a rank that waits so long for another one ends, and with it the job
    timeout_s: Annotated[float, Field(gt=0)] = 300.0


@dataclass
class Order:
    """What rank 0 tells another rank, e.g. Order("learn", {"depth": 3}, {"0.tokens": ...})."""

    name: str
    # JSON
    about: dict[str, Any]
    # on the CPU
    tensors: dict[str, Tensor]


def join(config: RanksConfig, device: str) -> Ranks:
    """This process among those that torchrun started; alone without it.

    Raises ValueError if there is no device for this rank.
    """
    found = os.environ
    if not {"RANK", "WORLD_SIZE"} <= found.keys():
        return Ranks()
    ranks = Ranks(int(found["RANK"]), int(found["WORLD_SIZE"]), config.timeout_s)
    if device == "cuda":
        local, there = int(found.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= there:
            raise ValueError(
                f"rank {ranks.rank} is number {local} on its machine, which has {there} GPUs;"
                f" expected a GPU for each: start at most {there} (--nproc-per-node)"
            )
        torch.cuda.set_device(local)
    if ranks.size > 1:
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        wait = timedelta(seconds=config.timeout_s)
        with ranks._linked():
            store, rank, size = next(dist.rendezvous("env://", timeout=wait))
            store = dist.PrefixStore(_meet(store, rank, size, config.timeout_s), store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    return ranks


def _meet(store: dist.Store, rank: int, size: int, timeout_s: float) -> str:
    """A name for this start of all ranks, the same at each.

    torchrun's store outlives the processes that it starts again, and keeps their addresses: rank 0
    answers each of the others only under the name that this one has just made up.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout_s
    if rank:
        store.set(f"asks/{rank}", own)
        name = store.get(f"answer/{own}").decode()
        store.set(f"{name}/{rank}", "")
        return name
    others = range(1, size)
    while not all(store.check([f"{own}/{other}"]) for other in others):
        for other in others:
            if store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", own)
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all of {size} ranks came within {timeout_s:g} s")
        time.sleep(0.02)
    return own


class Ranks:
    """This process among the others: `rank` of `size`."""

    def __init__(self, rank: int = 0, size: int = 1, timeout_s: float = 0.0):
        self.rank, self.size = rank, size
        self._speaks_s = SPEAKS * timeout_s
        self._spoke = time.monotonic()

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks do what is in here. What raises at one leaves them apart: that ends it."""
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            log.exception("rank %d of %d failed where all take part", self.rank, self.size)
            raise SystemExit(APART) from error

    @contextmanager
    def _linked(self) -> Iterator[None]:
        """Something is sent or awaited in here."""
        try:
            yield
        except RuntimeError as error:
            log.error(
                "rank %d of %d ends, another one is gone or silent: torchrun starts them again,"
                " from the last checkpoint, if it has restarts left (--max-restarts) error=%s",
                self.rank, self.size, error,
            )  # fmt: skip
            raise SystemExit(APART) from error

    def tell(
        self,
        name: str,
        about: dict[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Rank 0 gives the others an order."""
        if self.size > 1:
            self.tell_each([Order(name, about or {}, dict(tensors or {}))] * (self.size - 1))

    def tell_each(self, orders: Sequence[Order]) -> None:
        """Rank 0 gives each other rank an order of its own, in the order of the ranks."""
        with self._linked():
            packed: dict[int, Tensor] = {}
            sent = []
            for rank, order in enumerate(orders, 1):
                if id(order) not in packed:
                    packed[id(order)] = _packed(order)
                held = packed[id(order)]
                sent += [dist.isend(p, rank) for p in (torch.tensor([len(held)]), held)]
            for work in sent:
                work.wait()
        self._spoke = time.monotonic()

    def hear(self) -> Order:
        """The next order of rank 0."""
        with self._linked():
            dist.recv(size := torch.zeros(1, dtype=torch.int64), 0)
            dist.recv(packed := torch.empty(int(size), dtype=torch.uint8), 0)
            return _unpacked(packed)

    def keep_alive(self) -> None:
        """Rank 0: let the others know that it is there, where it told them nothing for long."""
        if self.size > 1 and time.monotonic() - self._spoke > self._speaks_s:
            self.tell("wait")

    def sum_of(self, work: Callable[[], Tensor], size: int) -> Tensor:
        """float64 [size] on the CPU: the sum over ranks of what `work` returns.

        Where it raises at one rank, this raises at all of them, and they stay together.
        """
        if self.size == 1:
            return work()
        error, own = None, torch.zeros(size, dtype=torch.float64)
        try:
            own = work()
        except Exception as raised:
            error = raised
            if self.rank:
                log.warning("rank %d cannot train on its share error=%r", self.rank, raised)
        failed = torch.tensor([float(error is not None)], dtype=torch.float64)
        total = self.sum_(torch.cat([own, failed]))
        if error is not None:
            raise error
        if total[-1]:
            raise ArithmeticError("another rank could not train on its share of this batch")
        return total[:-1]

    def sum_(self, tensor: Tensor) -> Tensor:
        """In place: the sum over all ranks."""
        if self.size > 1:
            with self._linked():
                dist.all_reduce(tensor)
        return tensor

    def reduce_(self, tensor: Tensor, to: int) -> None:
        """In place at rank `to`: the sum over all ranks. What others hold then means nothing."""
        with self._linked():
            dist.reduce(tensor, to)

    def broadcast_(self, tensor: Tensor, of: int) -> None:
        """In place: what rank `of` holds."""
        with self._linked():
            dist.broadcast(tensor, of)

    def send(self, tensor: Tensor, to: int) -> None:
        with self._linked():
            dist.send(tensor, to)

    def receive_(self, tensor: Tensor, of: int) -> None:
        with self._linked():
            dist.recv(tensor, of)


def _packed(order: Order) -> Tensor:
    """uint8: the size of a head, the head (JSON), and the tensors' bytes."""
    tensors = [t.contiguous().flatten().view(torch.uint8) for t in order.tensors.values()]
    described = [[n, str(t.dtype)[6:], list(t.shape)] for n, t in order.tensors.items()]
    head = json.dumps([order.name, order.about, described]).encode()
    parts = [_bytes(len(head).to_bytes(8, "little")), _bytes(head), *tensors]
    packed = torch.empty(sum(_room(len(p)) for p in parts), dtype=torch.uint8)
    at = 0
    for part in parts:
        packed[at : at + len(part)] = part
        at += _room(len(part))
    return packed


def _unpacked(packed: Tensor) -> Order:
    size = int.from_bytes(packed[:8].numpy().tobytes(), "little")
    at = _room(8)
    name, about, described = json.loads(packed[at : at + size].numpy().tobytes())
    at += _room(size)
    tensors = {}
    for key, kind, shape in described:
        dtype = getattr(torch, kind)
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        tensors[key] = packed[at : at + nbytes].view(dtype).view(shape)
        at += _room(nbytes)
    return Order(name, about, tensors)


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _room(nbytes: int) -> int:
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
