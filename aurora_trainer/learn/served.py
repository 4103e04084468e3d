"""The weights that servers serve: a frozen copy of the newest published version, and the initial
draft, for the gate to score.

Read from the weights directory when the trainer starts, because servers may serve a version that is
newer than the checkpoint, and when a server rolled a version back. What is damaged there costs that
version and nothing else: its bytes are held against its manifest, as servers do.
"""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path

import torch

from aurora_sglang_plugin.weights.manifest import (
    Manifest,
    ManifestError,
    read_manifest,
    rejected_versions,
    sha256_file,
    version_name,
)
from aurora_sglang_plugin.weights.tensor_bytes import safetensors_buffers, sha256
from aurora_sglang_plugin.weights.writer import served_tensors, served_version
from aurora_trainer.drafts.kinds import Draft, load, stored_dtype
from aurora_trainer.drafts.target import TargetTensors

log = logging.getLogger(__name__)


class Served:
    """`version` 0 is the initial draft, and `draft` is `initial` while it is served, as whatever
    version. Raises ValueError for bad drafts.

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
        # initial drafts that a server rolled back, by the sha256 of their weights: it found them
        # worse than the gate did. Whoever sees that traffic changed clears it
        self.barred: set[str] = set()
        # what the gate compares with; never changed
        self.initial = self._frozen(load(self._initial, tensors))
        self.version, self.draft = self._newest(served_version(self._directory))

    def take(self, version: int, tensors: dict[str, torch.Tensor], role: str) -> None:
        """A new version was published, of a draft of that role."""
        if role == "initial":
            self.version, self.draft = version, self.initial
            return
        if self.draft is self.initial:
            self.draft = self.initial.copy()
        self.version = version
        self.draft.load_checkpoint(tensors)

    def to_train(self) -> Draft:
        """A draft of its own, in float32 on the CPU, with the weights as they were published."""
        if not self.version:
            return load(self._initial, self._tensors)
        path = self._directory / version_name(self.version)
        try:
            return self._checked(path, read_manifest(path))
        except (ValueError, OSError) as error:
            log.warning("published version damaged, training goes on from memory error=%s", error)
            draft = load(self._initial, self._tensors)
            draft.load_checkpoint(self.draft.checkpoint())
            return draft

    def roll_back(self) -> int | None:
        """If the version was rejected: load the newest that was not, and return it. Else None.

        Raises OSError if the list of them cannot be read; then it is heeded the next time.
        """
        new = rejected_versions(self._directory) - self.rolled_back
        if any(self._was_initial(version) for version in new):
            self.barred.add(self._initial_sha256)
        found = self._newest(self.version) if self.version in new else None
        self.rolled_back |= new
        if found is None:
            return None
        self.version, self.draft = found
        return self.version

    def was_rejected(self, version: int) -> bool:
        """Whether a server rolled it back, and that was not heeded yet."""
        return version in rejected_versions(self._directory) - self.rolled_back

    @property
    def initial_barred(self) -> bool:
        """Whether a server rolled the initial draft back, the one of today."""
        return bool(self.barred) and self._initial_sha256 in self.barred

    def go_back_to(self, version: int) -> None:
        """What was served when a checkpoint was made, if it can be read."""
        if version != self.version:
            self.version, self.draft = self._newest(version)

    def _newest(self, version: int) -> tuple[int, Draft]:
        """`version`, or its first ancestor that was not rejected and can be read; at last the
        initial draft.
        """
        rejected = rejected_versions(self._directory)
        while version > 0:
            path = self._directory / version_name(version)
            try:
                manifest = read_manifest(path)
            except (ValueError, OSError) as error:
                log.warning(
                    "published version unreadable, going back to the initial draft error=%s", error
                )
                break
            if manifest.target != self._target:
                raise ValueError(
                    f"{path} is for another target; expected one weights.directory for each target"
                )
            if version not in rejected:
                try:
                    found = self._frozen(self._checked(path, manifest))
                    return version, self.initial if self._is_initial(manifest) else found
                except (ValueError, OSError) as error:
                    log.warning(
                        "published version damaged, going back to its parent version=%d error=%s",
                        version, error,
                    )  # fmt: skip
            # a damaged manifest must not lead in a circle
            version = min(manifest.parent, version - 1)
        return 0, self.initial

    def _checked(self, path: Path, manifest: Manifest) -> Draft:
        """The draft of a published version, in float32 on the CPU.

        Raises ManifestError where its bytes are not those of its manifest, ValueError where they
        are no draft, OSError where they cannot be read.
        """
        for name, file in manifest.files.items():
            if sha256_file(path / name) != file.sha256:
                raise ManifestError("hash", f"{path / name} is not what was published")
        return load(path, self._tensors)

    @cached_property
    def _initial_sha256(self) -> str:
        """As a manifest has it, of a version of the initial draft."""
        tensors = served_tensors(self.initial.checkpoint(self.dtype))
        return sha256(safetensors_buffers(tensors))

    def _is_initial(self, manifest: Manifest) -> bool:
        """Whether a version is the initial draft, which may be another one today."""
        if manifest.gate.get("reason") != "initial":
            return False
        return manifest.files["model.safetensors"].sha256 == self._initial_sha256

    def _was_initial(self, version: int) -> bool:
        """As `_is_initial`, of a version that a server rolled back."""
        if version == self.version:
            return self.draft is self.initial
        try:
            return self._is_initial(read_manifest(self._directory / version_name(version)))
        except (ValueError, OSError):
            # gone, and heeded by then unless no trainer ran for long
            return False

    def _frozen(self, draft: Draft) -> Draft:
        of = self._tensors
        return draft.compute_in(of.device, of.dtype).requires_grad_(False)
