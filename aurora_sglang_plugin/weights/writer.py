"""Publish the draft's weights to servers: the writing side of CONTRACT 2
(`aurora_sglang_plugin/weights/manifest.py`).

A version is written whole and only then named by CURRENT, so that a kill at any instant leaves
servers the old version or the new one.

One writer at a time. The directory's LOCK file is locked, which other processes of this machine
heed, and on some file systems those of others. Across machines it is what LOCK says: each writer
writes its name there when it begins, and one that finds another's publishes no more. So a trainer
can be moved though nobody knows whether the old one is gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Annotated, Literal, TextIO

import msgspec
import torch
from pydantic import Field

from aurora_sglang_plugin.config import Section
from aurora_sglang_plugin.drafts.kinds import MAP
from aurora_sglang_plugin.weights import manifest as contract
from aurora_sglang_plugin.weights.atomic_files import (
    Content,
    Step,
    lock,
    no_fault,
    remove_directory,
    remove_temporaries,
    replace_file,
    write_directory,
)
from aurora_sglang_plugin.weights.tensor_bytes import (
    DTYPE_NAMES,
    buffer,
    safetensors_buffers,
    sha256,
)

log = logging.getLogger(__name__)

LOCK = "LOCK"
# characters of LOCK
MAX_CLAIM = 512
Dtype = Literal["same", "float32", "bfloat16", "float16"]


class PublishConfig(Section):
    """When weights go to servers, and in which form."""

    # 0: not by time
    every_s: Annotated[float, Field(ge=0)] = 10.0
    # optimizer steps; 0: not by steps
    every_steps: Annotated[int, Field(ge=0)] = 0
    # versions that stay on disk
    keep: Annotated[int, Field(ge=2)] = 4
    # of floating tensors; "same" as the initial draft's
    dtype: Dtype = "same"


class WeightsWriter:
    """The one writer of a weights directory, the one that was made last. Raises ValueError where
    another process of this machine holds it.
    """

    def __init__(self, directory: Path, keep: int = 4, step: Step = no_fault):
        self.directory = Path(directory)
        self.keep = keep
        self.step = step
        self.directory.mkdir(parents=True, exist_ok=True)
        host = socket.gethostname()
        self._claim = f"{os.getpid()} on {host}, claim {secrets.token_hex(8)}"
        self._lock = _lock(self.directory, self._claim)
        for name in remove_temporaries(self.directory):
            log.warning("stale temporary removed name=%s", name)
        current = served_version(self.directory)
        self.newest = max([current, *versions(self.directory)])
        # of the weights that servers have; those of a version that a killed writer never named by
        # CURRENT are not
        self._digest = next(
            (
                m.files["model.safetensors"].sha256
                for m in manifests(self.directory)
                if m.version == current
            ),
            "",
        )

    def publish(
        self,
        tensors: dict[str, torch.Tensor],
        config: dict,
        *,
        target: str,
        parent: int,
        optimizer_step: int,
        trained_until_ns: int = 0,
        gate: dict[str, float | str] | None = None,
    ) -> int | None:
        """Write the next version and make it CURRENT. Returns its number.

        `tensors` are as they are to be served; the target's embedding is left out. Returns None,
        and writes nothing, where the newest version has exactly these weights; those of an earlier
        one, such as the initial draft's, may come again. Raises OSError where the disk refuses,
        ValueError where the directory is another writer's by now: then servers have what they had,
        and the same weights may be published again.
        """
        tensors = served_tensors(tensors)
        weights = safetensors_buffers(tensors)
        digest = sha256(weights)
        if digest == self._digest:
            return None
        config_bytes = json.dumps(config, indent=2, sort_keys=True).encode()
        self._hold_the_lock()
        version = self.newest + 1
        # written once, and never made CURRENT
        while (self.directory / contract.version_name(version)).exists():
            version += 1
        nbytes = sum(part.nbytes for part in weights)
        record = contract.Manifest(
            format=contract.FORMAT,
            version=version,
            parent=parent,
            target=target,
            map_sha256=sha256([buffer(tensors[MAP])]) if MAP in tensors else "",
            optimizer_step=optimizer_step,
            created_unix_s=time.time(),
            trained_until_ns=trained_until_ns,
            files={
                "config.json": contract.File(len(config_bytes), sha256([memoryview(config_bytes)])),
                "model.safetensors": contract.File(nbytes, digest),
            },
            tensors={
                n: contract.Tensor(DTYPE_NAMES[t.dtype], tuple(t.shape), sha256([buffer(t)]))
                for n, t in tensors.items()
            },
            gate=gate or {},
        )
        data: dict[str, Content] = {
            "config.json": config_bytes,
            "model.safetensors": weights,
            "manifest.json": msgspec.json.format(msgspec.json.encode(record)),
        }
        name = contract.version_name(version)
        try:
            write_directory(self.directory, name, data, self.step, replace=False)
            # it may have taken a while
            self._hold_the_lock()
            replace_file(self.directory / contract.CURRENT, f"{name}\n".encode(), self.step)
        except (OSError, ValueError):
            self._take_back(record)
            raise
        self.newest = version
        self._digest = digest
        self._remove_old(version)
        return version

    def close(self) -> None:
        """LOCK keeps our name: whoever we took the directory from must go on finding it."""
        self._lock.close()

    def _take_back(self, record: contract.Manifest) -> None:
        """Remove a version that could not be published, unless servers may see it already, or it
        is another writer's.
        """
        path = self.directory / contract.version_name(record.version)
        with contextlib.suppress(OSError, contract.ManifestError):
            served = contract.current_version(self.directory) == record.version
            if not served and contract.read_manifest(path) == record:
                remove_directory(path)

    def _hold_the_lock(self) -> None:
        """Raises ValueError where another writer began since. A directory that went away and came
        back may be another one, with a writer of its own.
        """
        try:
            with open(self.directory / LOCK, errors="replace") as file:
                same = os.path.samestat(os.fstat(file.fileno()), os.fstat(self._lock.fileno()))
                holder = file.read(MAX_CLAIM).strip()
        except FileNotFoundError:
            same, holder = False, ""
        if holder not in ("", self._claim):
            raise ValueError(
                f"weights directory {self.directory} is written by another trainer, process"
                f" {holder}, which began later; expected one writer: this one publishes no more."
                " End one of them; to have this one go on, start it again"
            )
        if not same:
            lost, self._lock = self._lock, _lock(self.directory, self._claim)
            lost.close()

    def _remove_old(self, current: int) -> None:
        kept = [v for v in versions(self.directory) if v != current]
        try:
            # what could not be removed before
            remove_temporaries(self.directory)
            for version in kept[: max(0, len(kept) + 1 - self.keep)]:
                remove_directory(self.directory / contract.version_name(version), self.step)
        except OSError as error:
            # the next publication tries again
            log.warning("old versions not removed error=%s", error)


def served_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of a draft that a version has, on the CPU."""
    return {n: t.detach().cpu().contiguous() for n, t in tensors.items() if "embed_tokens" not in n}


def _lock(directory: Path, claim: str) -> TextIO:
    """The directory's LOCK, held, with our name. Raises ValueError where another process holds
    it.
    """
    file = open(directory / LOCK, "a+", errors="replace")
    try:
        lock(file.fileno())
    except BlockingIOError:
        file.seek(0)
        holder = file.read(MAX_CLAIM).strip()
        file.close()
        raise ValueError(
            f"weights directory {directory} is written by another trainer, process {holder};"
            " expected one writer: end that process or choose another weights.directory. If its"
            f" machine is gone and its lock is not, remove {directory / LOCK}"
        ) from None
    file.truncate(0)
    file.write(f"{claim}\n")
    file.flush()
    os.fsync(file.fileno())
    return file


def served_version(directory: Path) -> int:
    """The version that CURRENT names, 0 if there is none; of a damaged CURRENT, the newest that is
    there: the next publication mends it."""
    try:
        return contract.current_version(directory) or 0
    except contract.ManifestError as error:
        newest = max(versions(directory), default=0)
        log.warning("damaged, taking version=%d for it error=%s", newest, error)
        return newest


def versions(directory: Path) -> list[int]:
    """Versions on disk, oldest first."""
    return sorted(int(p.name[1:]) for p in Path(directory).glob("v*") if p.name[1:].isdigit())


def manifests(directory: Path) -> list[contract.Manifest]:
    """Manifests of the versions on disk, oldest first; unreadable ones are left out."""
    found = []
    for version in versions(directory):
        try:
            found.append(contract.read_manifest(Path(directory) / contract.version_name(version)))
        except (contract.ManifestError, OSError) as error:
            log.warning("version unreadable version=%d error=%s", version, error)
    return found
