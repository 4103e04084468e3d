"""Weights that may be published, as the training hands them to whoever writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Offer:
    """Copies: training goes on while they are written, and `write` needs nothing of it.

    `role`: live, mean or initial; `updates`: of the optimizer, by then; `asks`: of
    Training.urgent, those that it answers; `write` returns the version, or None if exactly these
    weights are the newest version's.
    """

    role: str
    updates: int
    asks: int
    tensors: dict[str, Tensor]
    write: Callable[[], int | None]
