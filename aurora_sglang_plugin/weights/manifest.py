"""CONTRACT 2, the weights: what a trainer publishes to servers through a shared file system.

    DIRECTORY/v000042/config.json          the draft's Hugging Face config
    DIRECTORY/v000042/model.safetensors    the draft's weights; never the target's embedding
    DIRECTORY/v000042/manifest.json        this module's Manifest: binds the other two by size and
                                           hash
    DIRECTORY/CURRENT                      one line, "v000042": the version to serve
    DIRECTORY/REJECTED                     one JSON line per version that a server rolled back

A version directory appears whole (written under a temporary name, fsynced, renamed) and is never
written again. CURRENT is replaced by rename. A reader that loses a race with the clean-up of an old
version reads CURRENT again.

This module imports neither torch nor sglang, so that both sides can read it cheaply.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import msgspec

from aurora_sglang_plugin.drafts.kinds import MAP_SHA256
from aurora_sglang_plugin.drafts.tensor_files import INDEX, read_header, read_json, weight_map

# what is written, and what is read
FORMAT, FORMATS = 1, (1,)
CURRENT = "CURRENT"
REJECTED = "REJECTED"
FILES = ("config.json", "model.safetensors")
MAX_MANIFEST_BYTES = 4 << 20
EMBEDDING = "model.embed_tokens.weight"
SAMPLE_BYTES = 16 << 10


class Tensor(msgspec.Struct, frozen=True):
    # as safetensors names it: F32, BF16, F16, I64, BOOL
    dtype: str
    shape: tuple[int, ...]
    # of the tensor's bytes
    sha256: str


class File(msgspec.Struct, frozen=True):
    nbytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """A field that a reader may pass over can be added with a default, so that either side may be
    upgraded first; what it must heed is a new format.
    """

    format: int
    # counts published weights, from 1
    version: int
    # the version that training went on from, 0 for the initial draft
    parent: int
    # target_fingerprint() of the target that it drafts for
    target: str
    # of the bytes of the draft's vocabulary map, "" without a reduced vocabulary
    map_sha256: str = msgspec.field(name=MAP_SHA256)
    optimizer_step: int
    created_unix_s: float
    files: dict[str, File]
    tensors: dict[str, Tensor]
    # when the newest step it was trained on was captured, by the trainer's clock; 0: unknown
    trained_until_ns: int = 0
    # what the gate measured when it let this version pass
    gate: dict[str, float | str] = {}


class _Format(msgspec.Struct):
    """A manifest of any format."""

    format: int


class ManifestError(ValueError):
    """Weights that must not be loaded. `cause` is a short constant for counters."""

    def __init__(self, cause: str, detail: str):
        super().__init__(f"{cause}: {detail}")
        self.cause = cause


def version_name(version: int) -> str:
    return f"v{version:06d}"


def current_version(directory: Path) -> int | None:
    """The version that CURRENT names, or None where nothing was published.

    Raises ManifestError("current").
    """
    try:
        with open(Path(directory) / CURRENT, "rb") as file:
            text = file.read(64).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    if not re.fullmatch(r"v\d{6,12}", text):
        raise ManifestError(
            "current", f"{directory}/{CURRENT} holds {text!r}, expected a name like v000042"
        )
    return int(text[1:])


def rejected_versions(directory: Path) -> set[int]:
    """Versions that a server rolled back: each line of REJECTED is a JSON object with a
    `version`.
    """
    try:
        lines = (Path(directory) / REJECTED).read_bytes().splitlines()
    except FileNotFoundError:
        return set()
    rejected = set()
    for line in lines:
        try:
            rejected.add(int(json.loads(line)["version"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            # nobody's, or still being written: it is read again next time
            continue
    return rejected


def read_manifest(version_dir: Path) -> Manifest:
    """Read and check manifest.json against its directory's name and files' sizes; hashes are for
    the loader to check.

    Raises ManifestError with cause one of: missing (not there, or cannot be read now), manifest,
    format, name, size.
    """
    path = Path(version_dir) / "manifest.json"
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
        if len(data) > MAX_MANIFEST_BYTES:
            raise ManifestError("manifest", f"{path} is larger than {MAX_MANIFEST_BYTES} bytes")
        _check_format(path, data)
        manifest = msgspec.json.decode(data, type=Manifest)
        sizes = {name: _size(Path(version_dir) / name) for name in FILES}
    except OSError as error:
        raise ManifestError("missing", str(error)) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError("manifest", f"{path}: {error}") from None
    if version_name(manifest.version) != Path(version_dir).name:
        raise ManifestError("name", f"{version_dir} holds version {manifest.version}")
    if set(manifest.files) != set(FILES) or any(
        manifest.files[n].nbytes != sizes[n] for n in FILES
    ):
        raise ManifestError(
            "size", f"{version_dir}: files are {sizes}, the manifest says {manifest.files}"
        )
    return manifest


def _check_format(path: Path, data: bytes) -> None:
    """Raises ManifestError("format") for another one, whatever else is in it."""
    found = msgspec.json.decode(data, type=_Format).format
    if found not in FORMATS:
        side = "server" if found > FORMATS[-1] else "trainer"
        raise ManifestError(
            "format", f"{path} has format {found}, this side reads {FORMATS[0]} to {FORMATS[-1]}:"
            f" upgrade the {side}",
        )  # fmt: skip


def _size(path: Path) -> int:
    """Of the file as it is: by its name a network file system may tell what it was."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_size


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def target_fingerprint(model: str, revision: str | None = None) -> str:
    """Identify a target by config.json and by the file that holds its embedding: its header, and of
    each tensor in it the first and the last 16 KiB.

    So the trainer's machine needs no other file of a large target, and gets the server's answer.
    Two fine-tunes differ in it unless they share every weight in that file: of the first layers, in
    most models, and in a small one of all. `model` is a directory or the name of a Hugging Face
    model that is in the local cache. Reads little, so that it is cheap for a model of any size.
    Raises ValueError where there is no such directory or cached model, or a file of it is damaged
    or missing.
    """
    directory = Path(model)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        try:
            directory = Path(snapshot_download(model, revision=revision, local_files_only=True))
        except Exception as error:
            raise ValueError(
                f"target {model}, revision {revision or 'main'}: neither a directory nor a model in"
                f" the local Hugging Face cache ({type(error).__name__}); expected one of them:"
                f" give a directory, or `hf download {model}`"
            ) from None
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"target {directory} has no config.json; expected a Hugging Face model directory"
        )
    try:
        digest = hashlib.sha256(
            json.dumps(read_json(directory / "config.json"), sort_keys=True).encode()
        )
        path = _embedding_file(directory)
        # no safetensors, which a trainer could not read either
        if path is None:
            for path in sorted(directory.glob("*.bin")):
                size = path.stat().st_size
                digest.update(f"{path.name} {size}\n".encode())
                digest.update(_bytes(path, 0, min(SAMPLE_BYTES, size)))
                digest.update(_bytes(path, max(0, size - SAMPLE_BYTES), size))
            return digest.hexdigest()[:32]
        for name, entry in sorted(read_header(path)):
            digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
            digest.update(_bytes(path, entry.start, min(entry.start + SAMPLE_BYTES, entry.stop)))
            digest.update(_bytes(path, max(entry.start, entry.stop - SAMPLE_BYTES), entry.stop))
    except ValueError as error:
        raise ValueError(f"target {directory}: {error}") from None
    return digest.hexdigest()[:32]


def spellings(name: str) -> tuple[str, ...]:
    """What a tensor of a language model may be called in the files of a model that holds it."""
    return (name, f"language_model.{name}", name.replace("model.", "model.language_model.", 1))


def _embedding_file(directory: Path) -> Path | None:
    """The safetensors file with the embedding; of a model that calls it otherwise the first file;
    None: there is none.

    Raises ValueError where the index names a file that is not there.
    """
    if (directory / INDEX).is_file():
        files = weight_map(directory)
        name = next((files[n] for n in spellings(EMBEDDING) if n in files), min(files.values()))
        if not (directory / name).is_file():
            raise ValueError(
                f"{name} is not there, which holds the embedding; expected it, config.json and"
                f" {INDEX}"
            )
        return directory / name
    paths = sorted(p for p in directory.glob("*.safetensors") if not p.name.startswith("."))
    for path in paths:
        if any(name in spellings(EMBEDDING) for name, _ in read_header(path)):
            return path
    return paths[0] if paths else None


def _bytes(path: Path, start: int, stop: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(stop - start)
