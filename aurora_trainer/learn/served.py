"""The weights that servers serve: a frozen copy of the newest published version, and the initial
draft, for the gate to score.

Read from the weights directory when the trainer starts, because servers may serve a version that is
newer than the checkpoint, and when a server rolled a version back.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from aurora_sglang_plugin.weights.manifest import (
    ManifestError,
    current_version,
    read_manifest,
    rejected_versions,
    version_name,
)
from aurora_trainer.drafts.kinds import Draft, load, stored_dtype
from aurora_trainer.drafts.target import TargetTensors

log = logging.getLogger(__name__)


class Served:
    """`version` 0 is the initial draft. Raises ValueError for bad drafts.

    `dtype` is the one that servers hold; the draft is scored where `tensors` are and in theirs.
    """

    def __init__(
        self, directory: Path, initial: Path, target: str, tensors: TargetTensors, dtype: str
    ):
        self._directory, self._initial = Path(directory), Path(initial)
        self._target, self._tensors = target, tensors
        self.dtype = stored_dtype(self._initial) if dtype == "same" else getattr(torch, dtype)
        # versions whose rejection was already heeded
        self.rolled_back: set[int] = set()
        # what the gate compares with; never changed
        self.initial = self._load(self._initial)
        self.version, self.draft = self._newest(current_version(self._directory) or 0)

    def take(self, version: int, tensors: dict[str, torch.Tensor]) -> None:
        """A new version was published."""
        if self.draft is self.initial:
            self.draft = self.initial.copy()
        self.version = version
        self.draft.load_checkpoint(tensors)

    def to_train(self) -> Draft:
        """A draft of its own, in float32 on the CPU, with the weights as they were published."""
        path = self._directory / version_name(self.version) if self.version else self._initial
        return load(path, self._tensors)

    def roll_back(self) -> int | None:
        """If the version was rejected: load the newest that was not, and return it. Else None.

        Raises OSError if the disk refuses; then the rejection is heeded the next time.
        """
        new = rejected_versions(self._directory) - self.rolled_back
        found = self._newest(self.version) if self.version in new else None
        self.rolled_back |= new
        if found is None:
            return None
        self.version, self.draft = found
        return self.version

    def _newest(self, version: int) -> tuple[int, Draft]:
        """`version`, or its first ancestor that was not rejected and can be read; at last the
        initial draft.
        """
        rejected = rejected_versions(self._directory)
        while version:
            path = self._directory / version_name(version)
            try:
                manifest = read_manifest(path)
                if manifest.target != self._target:
                    raise ValueError(
                        f"{path} is for another target; expected one weights.directory for each"
                        " target"
                    )
                if version not in rejected:
                    return version, self._load(path)
            except ManifestError as error:
                log.warning(
                    "published version unreadable, going back to the initial draft error=%s", error
                )
                break
            version = manifest.parent
        return 0, self.initial

    def _load(self, path: Path) -> Draft:
        draft, of = load(path, self._tensors), self._tensors
        return draft.compute_in(of.device, of.dtype).requires_grad_(False)
