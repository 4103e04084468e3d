"""Notice new weights, check every byte of them, and have them staged: the reading side of CONTRACT
2.

    CURRENT -> read_manifest -> check_manifest (target, names, shapes, dtypes) -> read_tensors
    (hashes, values) -> stage

All of it happens on a thread of its own. A version that fails is counted by cause, logged once, and
tried again only when CURRENT names another or the server's target changes; only `missing` (a race
with the trainer's clean-up, or a slow network file system) is tried again at the next poll. A
version that a server rolled back (REJECTED) gives way to its parent, also while it drafts. This
module imports neither torch nor sglang.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from aurora_sglang_plugin.drafts.kinds import (
    BAD_MAP,
    MAP_DTYPES,
    MAPS,
    canonical_name,
    differing_config,
    maps_problem,
    optional_maps,
)
from aurora_sglang_plugin.weights.manifest import (
    CURRENT,
    REJECTED,
    Manifest,
    ManifestError,
    current_version,
    read_manifest,
    rejected_versions,
    version_name,
)

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 16 << 20
# BF16 as its bits
NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "BOOL": "|b1"}
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Expected:
    """What a server can load, found from the draft that it started with.

    `shapes` maps canonical names (`canonical_name`) to full, unsharded shapes; None where only the
    loader can tell.
    """

    # fingerprint
    target: str
    shapes: dict[str, tuple[int, ...] | None]
    # what the draft proposes must stay below it
    target_vocab: int
    # values that config.json must agree with, where it names them
    config: dict[str, object]


@dataclass(frozen=True)
class Weights:
    """A checked version: its arrays are views of the file's bytes, hashed after they were read."""

    manifest: Manifest
    config: dict
    # canonical name -> (safetensors dtype, array; bfloat16 as uint16)
    tensors: dict[str, tuple[str, np.ndarray]]
    # monotonic seconds
    noticed_at: float


def check_manifest(manifest: Manifest, expected: Expected) -> None:
    """Raises ManifestError with cause one of: target, names, shape, dtype."""
    if manifest.target != expected.target:
        raise ManifestError(
            "target", f"drafts for target {manifest.target}, this server's is {expected.target}"
        )
    tensors = {canonical_name(n): t for n, t in manifest.tensors.items()}
    optional = optional_maps(expected.shapes, expected.target_vocab)
    unknown = sorted(tensors.keys() - expected.shapes.keys() - optional)
    missing = sorted(expected.shapes.keys() - tensors.keys() - optional)
    if unknown or missing or len(tensors) != len(manifest.tensors):
        raise ManifestError(
            "names", f"unknown tensors {unknown[:5]}, missing tensors {missing[:5]}"
        )
    for name in tensors.keys() & expected.shapes.keys():
        dtypes = MAP_DTYPES if name in MAPS else FLOATS
        if tensors[name].dtype not in dtypes:
            raise ManifestError(
                "dtype", f"{name} is {tensors[name].dtype}, expected one of {dtypes}"
            )
        shape = expected.shapes[name]
        if shape is not None and tensors[name].shape != shape:
            raise ManifestError(
                "shape", f"{name} is {list(tensors[name].shape)}, this draft's is {list(shape)}"
            )


def read_weights(version_dir: Path, expected: Expected) -> Weights:
    """Read and check one version.

    Raises ManifestError with a cause of `read_manifest` or `check_manifest`, or: hash, header,
    values, config, or that of the draft's own maps.
    """
    noticed_at = time.monotonic()
    manifest = read_manifest(version_dir)
    check_manifest(manifest, expected)
    data = {}
    for name, file in manifest.files.items():
        try:
            data[name] = _read(Path(version_dir) / name)
        except FileNotFoundError as error:
            raise ManifestError("missing", str(error)) from None
        if hashlib.sha256(data[name].data).hexdigest() != file.sha256:
            raise ManifestError(
                "hash", f"{version_dir}/{name} is not the file that the manifest describes"
            )
    tensors = {}
    for name, (dtype, array) in _parse_safetensors(data["model.safetensors"], manifest).items():
        if hashlib.sha256(array.data).hexdigest() != manifest.tensors[name].sha256:
            raise ManifestError("hash", f"tensor {name} is not what the manifest describes")
        if not _finite(dtype, array):
            raise ManifestError("values", f"tensor {name} is not finite")
        tensors[canonical_name(name)] = (dtype, array)
    problem = maps_problem(tensors, expected.target_vocab)
    if problem:
        raise ManifestError(BAD_MAP, problem)
    config = _check_config(data["config.json"].tobytes(), expected.config)
    return Weights(manifest, config, tensors, noticed_at)


class Watcher:
    """Polls CURRENT on a daemon thread and hands each new, checked version to `stage`.

    `stage(weights)` runs on this thread and returns True where the version was staged, False where
    there is no room yet (it is offered again at the next poll). Any exception is counted under its
    ManifestError cause, or as `stage`.
    """

    def __init__(
        self, directory: Path, poll_s: float, expected: Expected, stage: Callable[[Weights], bool]
    ):
        self.directory = Path(directory)
        self.poll_s = poll_s
        self.expected = expected
        self.stage = stage
        # by cause, one per version (a cause `missing`: one per try)
        self.failures: Counter[str] = Counter()
        # the newest version that needs no further attention: staged, or refused
        self.seen_version = 0
        # of CURRENT and REJECTED, by `_identity`
        self._seen_stats: tuple | None = None
        # What `look_again` was last told, and what of it was heeded: a new tuple each time.
        self._asked: tuple[int] | None = None
        self._heeded: tuple[int] | None = None
        self._logged: tuple[int, str] | None = None
        # versions to be written to REJECTED
        self._rejects: deque[int] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="aurora-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def look_again(self, version: int, target: str | None = None) -> None:
        """From another thread: at the next poll read what CURRENT names, unless it is `version`.

        `target`: from now on versions must be made for this one.
        """
        if target is not None:
            self.expected = replace(self.expected, target=target)
        self._asked = (version,)

    def reject(self, version: int, served: int, write: bool) -> None:
        """From another thread: `version` was rolled back, and `served` drafts. At the next poll it
        is written to REJECTED (`write`: on one rank of a server), and CURRENT is read again."""
        if write:
            self._rejects.append(version)
        self.look_again(served)

    def _run(self) -> None:
        while not self._stop.wait(self.poll_s):
            self.poll()

    def poll(self) -> None:
        """Look once.

        Never raises: this is the serving boundary, a bad file must not end the server's thread.
        """
        version = 0
        self._write_rejected()
        if (asked := self._asked) is not self._heeded:
            self._heeded, self.seen_version, self._seen_stats = asked, asked[0], None
        try:
            stats = (_identity(self.directory / CURRENT), _identity(self.directory / REJECTED))
            if stats[0] is None or stats == self._seen_stats:
                # nothing was published yet, or nothing is new
                return
            version = self._wanted()
            done = version in (0, self.seen_version) or self.stage(
                read_weights(self.directory / version_name(version), self.expected)
            )
            if done:
                self.seen_version, self._seen_stats = version, stats
        except ManifestError as error:
            self._fail(version, error.cause, error)
            if error.cause != "missing":
                self.seen_version, self._seen_stats = version, stats
        except Exception as error:
            self._fail(version, "stage", error)
            self.seen_version = version

    def _write_rejected(self) -> None:
        while self._rejects:
            line = json.dumps({"version": self._rejects[0], "unix_s": round(time.time(), 3)}) + "\n"
            try:
                # one write of one line: other servers append to the same file
                with open(self.directory / REJECTED, "ab", buffering=0) as file:
                    file.write(line.encode())
            except OSError as error:
                self._fail(self._rejects[0], "rejected", error)
                return
            self._rejects.popleft()

    def _wanted(self) -> int:
        """CURRENT's version, or its first ancestor that no server rolled back; 0 where that is the
        initial draft.
        """
        version = current_version(self.directory) or 0
        rejected = rejected_versions(self.directory)
        while version in rejected:
            error = ManifestError(
                "rejected", f"a server rolled {version_name(version)} back; looking at its parent"
            )
            if self._logged != (version, error.cause):
                self._fail(version, error.cause, error)
            parent = read_manifest(self.directory / version_name(version)).parent
            # whatever the file says, this ends
            version = max(0, min(parent, version - 1))
        return version

    def _fail(self, version: int, cause: str, error: Exception) -> None:
        self.failures[cause] += 1
        if self._logged != (version, cause):
            self._logged = (version, cause)
            log.warning("weights refused version=%d cause=%s error=%s", version, cause, error)


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Differs whenever a file was replaced or appended to; None if there is no file."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _read(path: Path) -> np.ndarray:
    """uint8, the file. Reading and hashing it leaves the interpreter's lock to others."""
    with open(path, "rb") as file:
        data = np.empty(os.fstat(file.fileno()).st_size, np.uint8)
        read = file.readinto(data.data)
        # a file that shrank meanwhile: its hash will differ
        return data[:read]


def _parse_safetensors(data: np.ndarray, manifest: Manifest) -> dict[str, tuple[str, np.ndarray]]:
    """Views of the tensors of a safetensors file, which must hold exactly what the manifest
    lists.
    """
    header_bytes = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or header_bytes > min(MAX_HEADER_BYTES, len(data) - 8):
        raise ManifestError("header", f"a header of {header_bytes} bytes in a file of {len(data)}")
    try:
        header = json.loads(data[8 : 8 + header_bytes].tobytes())
        header.pop("__metadata__", None)
        described = {
            n: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for n, e in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError("header", f"not a safetensors header: {error!r}") from None
    if {n: d[:2] for n, d in described.items()} != {
        n: (t.dtype, t.shape) for n, t in manifest.tensors.items()
    }:
        raise ManifestError("header", "names, dtypes or shapes in the file are not the manifest's")
    body = data[8 + header_bytes :]
    views = {}
    for name, (dtype, shape, begin, end) in described.items():
        numpy = np.dtype(NUMPY.get(dtype, "V1"))
        count = int(np.prod(shape, dtype=np.int64))
        if (
            dtype not in NUMPY
            or not 0 <= begin <= end <= len(body)
            or end - begin != count * numpy.itemsize
        ):
            raise ManifestError(
                "header", f"{name}: {dtype} {shape} does not fit bytes {begin} to {end}"
            )
        views[name] = (dtype, np.frombuffer(body[begin:end].data, numpy).reshape(shape))
    return views


def _finite(dtype: str, array: np.ndarray) -> bool:
    if dtype == "BF16":
        return not ((array & 0x7F80) == 0x7F80).any()
    return dtype not in FLOATS or bool(np.isfinite(array).all())


def _check_config(data: bytes, expected: dict[str, object]) -> dict:
    try:
        config = json.loads(data)
        differing = differing_config(config, expected)
    except (ValueError, TypeError, AttributeError) as error:
        raise ManifestError("config", f"config.json: {error}") from None
    if differing:
        raise ManifestError("config", f"config.json (theirs, this server's): {differing}")
    return config
