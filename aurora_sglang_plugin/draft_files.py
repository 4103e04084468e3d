"""Which tensors lie in a draft's directory, from the safetensors headers alone. Imports neither torch nor sglang."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

MAX_HEADER_BYTES = 16 << 20
# Older names that SGLang still reads, and the prefix that it does not need.
LEGACY_NAMES = {
    "midlayer.": "layers.0.",
    "aux_norm_low.": "fc_norm.0.",
    "aux_norm_mid.": "fc_norm.1.",
    "aux_norm_high.": "fc_norm.2.",
}
CODE_FORMATS = (".bin", ".pt", ".pth", ".ckpt")  # reading them can run what they hold


class Entry(NamedTuple):
    """Where a tensor lies in its file, e.g. Entry(path, "I64", (32000,), 8, 256008)."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int


def canonical_name(name: str) -> str:
    """A tensor's present-day name: midlayer.x and model.layers.0.x are layers.0.x."""
    name = name.removeprefix("model.")
    for old, new in LEGACY_NAMES.items():
        name = re.sub(f"^{re.escape(old)}", new, name)
    return name


def read_entries(directory: Path) -> dict[str, Entry]:
    """Every tensor in the directory's safetensors files by its present-day name. Reads headers only.

    Raises ValueError for no file, a damaged header, or a tensor that is there twice.
    """
    entries: dict[str, Entry] = {}
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        others = sorted(p.name for p in directory.glob("*") if p.suffix in CODE_FORMATS)
        raise ValueError(
            f"holds {', '.join(others)} and no *.safetensors: a file in that format can run code when it is read, so "
            "it is not read. Ask its author for safetensors, or convert it where that does no harm "
            "(docs/troubleshooting.md)."
            if others
            else "holds no *.safetensors; other formats are not read."
        )
    for path in paths:
        for name, entry in read_header(path):
            name = canonical_name(name)
            if name in entries:
                raise ValueError(f"{name} is there twice.")
            entries[name] = entry
    return entries


def read_header(path: Path) -> list[tuple[str, Entry]]:
    """The names and places of one file's tensors. Raises ValueError."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
                raise ValueError
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = []
        for name, field in header.items():
            start, stop = (8 + length + offset for offset in field["data_offsets"])
            if not 8 + length <= start <= stop <= size:
                raise ValueError
            entries.append((name, Entry(path, field["dtype"], tuple(field["shape"]), start, stop)))
        return entries
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path.name} is damaged or not a safetensors file.") from None
