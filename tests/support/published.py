"""Small versions of weights, and a reader that checks all of one."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from aurora_sglang_plugin.weights.manifest import (
    current_version,
    read_manifest,
    sha256_file,
    version_name,
)

FIELDS = {"target": "t" * 32, "parent": 0, "optimizer_step": 7}


def tensors(fill: float) -> dict[str, torch.Tensor]:
    return {
        "fc.weight": torch.full((4, 6), fill),
        "norm.weight": torch.full((4,), fill, dtype=torch.bfloat16),
        "d2t": torch.arange(5),
        "embed_tokens.weight": torch.zeros(3, 4),
    }


def read_current(directory: Path) -> tuple[int, float]:
    """What a careful reader finds: the version and its fill value, every hash checked."""
    version = current_version(directory)
    manifest = read_manifest(directory / version_name(version))
    for name, file in manifest.files.items():
        assert sha256_file(directory / version_name(version) / name) == file.sha256
    loaded = load_file(directory / version_name(version) / "model.safetensors")
    assert set(loaded) == set(manifest.tensors) == {"fc.weight", "norm.weight", "d2t"}
    return version, loaded["fc.weight"].unique().item()
