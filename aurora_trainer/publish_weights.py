"""Publish the draft's weights to servers: the writing side of CONTRACT 2 (`aurora_sglang_plugin/manifest.py`).

A version is written whole and only then named by CURRENT, so that a kill at any instant leaves servers the old version
or the new one. One writer at a time, by a lock on the directory's LOCK file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import torch
from pydantic import Field
from safetensors.torch import save

from aurora_sglang_plugin import manifest as contract
from aurora_sglang_plugin.config import Section
from aurora_trainer.durable import Step, no_step, remove_directory, remove_temporaries, replace_file, write_directory

log = logging.getLogger(__name__)

LOCK = "LOCK"
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
Dtype = Literal["same", "float32", "bfloat16", "float16"]


class PublishConfig(Section):
    """When weights go to servers, and in which form."""

    every_s: Annotated[float, Field(ge=0)] = 10.0  # 0: not by time
    every_steps: Annotated[int, Field(ge=0)] = 0  # optimizer steps; 0: not by steps
    keep: Annotated[int, Field(ge=2)] = 4  # versions that stay on disk
    dtype: Dtype = "same"  # of floating tensors; "same" as the initial draft's


class WeightsWriter:
    """The one writer of a weights directory. Raises ValueError where another process holds it."""

    def __init__(self, directory: Path, keep: int = 4, step: Step = no_step):
        self.directory = Path(directory)
        self.keep = keep
        self.step = step
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.directory / LOCK, "a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read(32).strip()
            self._lock.close()
            raise ValueError(
                f"weights directory {self.directory} is written by another trainer, process {holder}; expected one "
                "writer: end that process or choose another weights.directory"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        for name in remove_temporaries(self.directory):
            log.warning("stale temporary removed name=%s", name)
        current = contract.current_version(self.directory) or 0
        self.newest = max([current, *versions(self.directory)])
        # A version that a killed writer never named by CURRENT was never served: its weights may come again.
        self._digests = {
            m.files["model.safetensors"].sha256 for m in manifests(self.directory) if m.version <= current
        }

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

        `tensors` are as they are to be served; the target's embedding is left out. Returns None, and writes
        nothing, where a version with exactly these weights was published before.
        """
        tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items() if "embed_tokens" not in n}
        weights = save(tensors)
        digest = hashlib.sha256(weights).hexdigest()
        if digest in self._digests:
            return None
        config_bytes = json.dumps(config, indent=2, sort_keys=True).encode()
        version = self.newest + 1
        data = {"config.json": config_bytes, "model.safetensors": weights}
        record = contract.Manifest(
            format=contract.FORMAT,
            version=version,
            parent=parent,
            target=target,
            d2t_sha256=_sha256(tensors["d2t"]) if "d2t" in tensors else "",
            optimizer_step=optimizer_step,
            created_unix_s=time.time(),
            trained_until_ns=trained_until_ns,
            files={n: contract.File(len(d), hashlib.sha256(d).hexdigest()) for n, d in data.items()},
            tensors={
                n: contract.Tensor(DTYPE_NAMES[t.dtype], tuple(t.shape), _sha256(t)) for n, t in tensors.items()
            },
            gate=gate or {},
        )
        data["manifest.json"] = msgspec.json.format(msgspec.json.encode(record))
        name = contract.version_name(version)
        write_directory(self.directory, name, data, self.step)
        self.newest = version
        self._digests.add(digest)
        replace_file(self.directory / contract.CURRENT, f"{name}\n".encode(), self.step)
        self._remove_old(version)
        return version

    def close(self) -> None:
        self._lock.close()

    def _remove_old(self, current: int) -> None:
        kept = [v for v in versions(self.directory) if v != current]
        for version in kept[: max(0, len(kept) + 1 - self.keep)]:
            remove_directory(self.directory / contract.version_name(version), self.step)


def versions(directory: Path) -> list[int]:
    """Versions on disk, oldest first."""
    return sorted(int(p.name[1:]) for p in Path(directory).glob("v*") if p.name[1:].isdigit())


def manifests(directory: Path) -> list[contract.Manifest]:
    """Manifests of the versions on disk, oldest first; unreadable ones are left out."""
    found = []
    for version in versions(directory):
        try:
            found.append(contract.read_manifest(Path(directory) / contract.version_name(version)))
        except contract.ManifestError as error:
            log.warning("version unreadable version=%d error=%s", version, error)
    return found


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
