"""Describe whatever Aurora wrote, for `aurora-trainer inspect`: which kind it is follows from the
files.

    recording            a directory of *.trace files, or one of them
    weights directory    CURRENT, v000042/..., or one version of it
    checkpoints          step-00000123/..., or one of them
    draft                config.json and *.safetensors

Every description is a plain record (JSON) with `kind` and `problems`, and a text for people. Hashes
are checked; tensors are not loaded.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open

from aurora_sglang_plugin.weights import manifest as contract
from aurora_trainer.recordings.recording import SUFFIX
from aurora_trainer.recordings.trace import MAGIC
from aurora_trainer.terminal import columns, escape, moment, size, value
from aurora_trainer.tools.describe_recording import describe_recording, recording_text

SHOWN_STATE = (
    "target", "parent", "served", "rolled_back", "steps", "positions", "earlier_updates", "traffic",
    "published", "samples", "optimizer", "cursor", "open_requests",
)  # fmt: skip


def describe(path: Path) -> tuple[dict[str, Any], str]:
    """(record, text) of what `path` is. Raises ValueError if it is nothing that Aurora knows."""
    path = Path(path)
    describer, writer = _kind(path)
    found = describer(path)
    return found, writer(found)


def problems(found: dict[str, Any]) -> int:
    """How many damaged, missing or wrong things a description names."""
    return len(found.get("problems", [])) + found.get("damaged_records", 0)


def _kind(path: Path) -> tuple[Callable[[Path], dict[str, Any]], Callable[[dict[str, Any]], str]]:
    names = {p.name for p in path.iterdir()} if path.is_dir() else set()
    if (
        path.is_file()
        and path.open("rb").read(len(MAGIC)) == MAGIC
        or any(n.endswith(SUFFIX) for n in names)
    ):
        return describe_recording, recording_text
    # its beginning is damaged
    if path.is_file() and path.suffix == SUFFIX:
        return describe_recording, recording_text
    if contract.CURRENT in names or any(re.fullmatch(r"v\d+", name) for name in names):
        return describe_weights, weights_text
    if {"manifest.json", "state.safetensors"} <= names or any(
        re.fullmatch(r"step-\d+", name) for name in names
    ):
        return describe_checkpoints, checkpoints_text
    if {"manifest.json", "model.safetensors"} <= names:
        return describe_version, version_text
    if "config.json" in names:
        return describe_draft, draft_text
    raise ValueError(
        f"{path}: neither a recording, a weights directory, a version, a checkpoint nor a draft;"
        " expected *.trace files, CURRENT, manifest.json, step-* or config.json there"
    )


# ---- weights


def describe_weights(path: Path) -> dict[str, Any]:
    """Every version on disk, what CURRENT and REJECTED say, and whether files are what their
    manifests bind.
    """
    # which brings torch
    from aurora_sglang_plugin.weights.writer import versions

    found: dict[str, Any] = {"kind": "weights", "path": str(path), "problems": []}
    rejected = contract.rejected_versions(path)
    try:
        current = contract.current_version(path)
    except contract.ManifestError as error:
        current = None
        found["problems"].append(str(error))
    on_disk = versions(path)
    if current is not None and current not in on_disk:
        found["problems"].append(f"{path}/CURRENT names version {current}, which is not there")
    found |= {"current": current, "rejected": sorted(rejected)}
    found["versions"] = [
        describe_version(path / contract.version_name(version)) for version in on_disk
    ]
    found["problems"] += [
        problem for version in found["versions"] for problem in version["problems"]
    ]
    return found


def describe_version(path: Path) -> dict[str, Any]:
    """One version: its manifest, and whether its files are those that it binds."""
    found: dict[str, Any] = {"kind": "version", "path": str(path), "problems": []}
    try:
        manifest = contract.read_manifest(path)
    except contract.ManifestError as error:
        return found | {"problems": [str(error)]}
    for name, file in manifest.files.items():
        if contract.sha256_file(path / name) != file.sha256:
            found["problems"].append(
                f"{path / name} is not the file that the manifest binds: its sha256 differs"
            )
    fields = msgspec.to_builtins(manifest)
    tensors = fields.pop("tensors")
    return found | fields | _tensors([(t["dtype"], t["shape"]) for t in tensors.values()])


def weights_text(found: dict[str, Any]) -> str:
    rows = []
    for of in found["versions"]:
        if "version" not in of:
            rows.append([escape(Path(of["path"]).name), "unreadable", *[""] * 6])
            continue
        state = "CURRENT" if of["version"] == found["current"] else ""
        nbytes = sum(file["nbytes"] for file in of["files"].values())
        state = "REJECTED" if of["version"] in found["rejected"] else state
        rows.append([
            f"v{of['version']:06d}", "DAMAGED" if of["problems"] else state or "whole",
            str(of["parent"]),
            str(of["optimizer_step"]), moment(of["created_unix_s"]), size(nbytes),
            escape(of["target"], 20),
            value(of["gate"]),
        ])  # fmt: skip
    lines = [
        f"weights directory {escape(found['path'])}: {len(rows)} versions, CURRENT is"
        f" {found['current']}"
    ]
    head = ["version", "state", "parent", "updates", "published", "size", "target", "gate"]
    lines += ["", *columns(head, rows)] if rows else []
    return "\n".join([*lines, *_problem_lines(found)])


def version_text(found: dict[str, Any]) -> str:
    lines = [f"version {escape(found['path'])}"]
    for name, of in found.items():
        if name == "files":
            lines += [
                f"  {escape(n)} {size(f['nbytes'])} sha256 {escape(f['sha256'])}"
                for n, f in of.items()
            ]
        elif name not in ("kind", "path", "problems"):
            lines.append(f"  {name} {moment(of) if name.endswith('unix_s') and of else value(of)}")
    return "\n".join([*lines, *_problem_lines(found)])


# ---- checkpoints


def describe_checkpoints(path: Path) -> dict[str, Any]:
    """Every checkpoint of a directory, or the one that `path` is."""
    # which brings torch
    from aurora_trainer.checkpoint import FORMAT, steps

    one = (path / "manifest.json").exists()
    folders = [path] if one else [path / f"step-{step:08d}" for step in steps(path)]
    found = [_checkpoint(folder, FORMAT) for folder in folders]
    problems = [problem for of in found for problem in of["problems"]]
    return {"kind": "checkpoints", "path": str(path), "checkpoints": found, "problems": problems}


def _checkpoint(path: Path, expected_format: int) -> dict[str, Any]:
    found: dict[str, Any] = {"path": str(path), "problems": []}
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != expected_format:
            raise ValueError(f"format {manifest['format']}, this version reads {expected_format}")
        found |= {"step": int(manifest["step"]), "bytes": 0}
        for name in ("state.safetensors", "state.json"):
            described = manifest["files"][name]
            found["bytes"] += (path / name).stat().st_size
            if contract.sha256_file(path / name) != described["sha256"]:
                raise ValueError(
                    f"{name} is not the file that the manifest describes: its sha256 differs"
                )
        state = json.loads((path / "state.json").read_text())
        found["state"] = {name: state[name] for name in SHOWN_STATE if name in state}
        groups = defaultdict(list)
        with safe_open(path / "state.safetensors", framework="np") as file:
            for name in file.keys():
                tensor = file.get_slice(name)
                groups["/".join(name.split("/")[:-1]) or name].append(
                    (tensor.get_dtype(), tensor.get_shape())
                )
        found["tensors"] = {group: _tensors(tensors) for group, tensors in sorted(groups.items())}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        found["problems"].append(f"{path}: {error}")
    return found


def checkpoints_text(found: dict[str, Any]) -> str:
    lines = [f"checkpoints {escape(found['path'])}: {len(found['checkpoints'])}"]
    for of in found["checkpoints"]:
        whole = "DAMAGED" if of["problems"] else size(of["bytes"])
        lines += ["", f"step {of.get('step', '?')} ({escape(Path(of['path']).name)}): {whole}"]
        for group, tensors in of.get("tensors", {}).items():
            lines.append(f"  {escape(group)}: {value(tensors)}")
        lines += [f"  {name} {value(state)}" for name, state in of.get("state", {}).items()]
    return "\n".join([*lines, *_problem_lines(found)])


# ---- a draft


def describe_draft(path: Path) -> dict[str, Any]:
    """Its config and tensors, by their files' headers."""
    found: dict[str, Any] = {"kind": "draft", "path": str(path), "problems": [], "tensors": {}}
    try:
        config = json.loads((path / "config.json").read_text())
        found["config"] = config
        for file_path in sorted(path.glob("*.safetensors")):
            with safe_open(file_path, framework="np") as file:
                for name in file.keys():
                    tensor = file.get_slice(name)
                    found["tensors"][name] = {
                        "dtype": tensor.get_dtype(),
                        "shape": tensor.get_shape(),
                    }
    except (OSError, ValueError, SafetensorError) as error:
        found["problems"].append(f"{path}: {error}")
    return found | _tensors([(t["dtype"], t["shape"]) for t in found["tensors"].values()])


def draft_text(found: dict[str, Any]) -> str:
    config = found.get("config", {})
    lines = [
        f"draft {escape(found['path'])}: {found['parameters']} parameters,"
        f" {size(found['tensor_bytes'])}"
    ]
    lines += [f"  {escape(name)} {value(of)}" for name, of in config.items()]
    rows = [
        [escape(n), escape(t["dtype"]), "x".join(map(str, t["shape"]))]
        for n, t in found["tensors"].items()
    ]
    lines += ["", *columns(["tensor", "dtype", "shape"], rows)] if rows else []
    return "\n".join([*lines, *_problem_lines(found)])


# ---- shared

_BITS = {
    "F64": 64,
    "I64": 64,
    "F32": 32,
    "I32": 32,
    "F16": 16,
    "BF16": 16,
    "U8": 8,
    "I8": 8,
    "BOOL": 8,
}


def _tensors(tensors: list[tuple[str, list[int]]]) -> dict[str, Any]:
    """How many (dtype, shape), their elements and bytes, and how many of each dtype."""
    parameters = nbytes = 0
    dtypes: dict[str, int] = defaultdict(int)
    for dtype, shape in tensors:
        elements = 1
        for n in shape:
            elements *= n
        parameters += elements
        nbytes += elements * _BITS.get(dtype, 8) // 8
        dtypes[dtype] += 1
    return {
        "tensors_count": len(tensors),
        "parameters": parameters,
        "tensor_bytes": nbytes,
        "dtypes": dict(dtypes),
    }


def _problem_lines(found: dict[str, Any]) -> list[str]:
    return (
        ["", *(f"PROBLEM {escape(problem, 300)}" for problem in found["problems"])]
        if found["problems"]
        else []
    )
