"""Read a version of the weights and check every byte of it: the reading side of CONTRACT 2.

    read_manifest -> check_manifest (target, names, shapes, dtypes) -> tensors (hashes, values)

This module imports neither torch nor sglang.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
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
from aurora_sglang_plugin.weights.manifest import Manifest, ManifestError, read_manifest

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
        # not there, or the file system's fault: ESTALE on NFS is a file that was removed
        except OSError as error:
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
