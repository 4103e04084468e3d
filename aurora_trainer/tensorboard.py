"""The status record to TensorBoard, for those who keep their runs there.

Off unless trainer.metrics.tensorboard is set.

`wandb sync DIRECTORY` takes the same files to Weights & Biases.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

# not figures of the run, or one for each server that ever was
EXCLUDED = ("time_unix_s", "pid", "ledger")


class TensorBoard:
    """Event files in `directory`. Raises ValueError if the package is not installed."""

    def __init__(self, directory: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                f"trainer.metrics.tensorboard: {error}; expected `pip install tensorboard` in this"
                " environment, or the setting left out"
            ) from None
        self._writer = SummaryWriter(str(directory))

    def write(self, status: Mapping[str, Any]) -> None:
        """Every number of a status record, at its batch.

        A full disk is logged, and does not end training.
        """
        try:
            for name, value in scalars(status):
                self._writer.add_scalar(name, value, status["steps"])
            self._writer.flush()
        except OSError as error:
            log.warning("tensorboard not written error=%s", error)


def scalars(status: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """("buffer/bytes", 1234.0) and so on: what is a number, at any depth."""
    for key, value in status.items():
        if key in EXCLUDED and not prefix:
            continue
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)
