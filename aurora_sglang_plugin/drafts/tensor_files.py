"""Which tensors lie in a draft's directory, from the safetensors headers alone. Imports neither
torch nor sglang.

Files and names are chosen as SGLang's loader chooses them, so that whoever reads a draft reads the
same one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from aurora_sglang_plugin.drafts.eagle3_vocab import MAPS

# as safetensors allows
MAX_HEADER_BYTES = 100_000_000
INDEX = "model.safetensors.index.json"
# tensors or files named in one sentence, of which there may be hundreds
NAMED = 5
# Older names that SGLang still reads, wherever in a name they stand.
LEGACY_NAMES = {
    "midlayer": "layers.0",
    "aux_norm_low": "fc_norm.0",
    "aux_norm_mid": "fc_norm.1",
    "aux_norm_high": "fc_norm.2",
}
# reading them can run what they hold
CODE_FORMATS = (".bin", ".pt", ".pth", ".ckpt")
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "C64": 64,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


class Entry(NamedTuple):
    """Where a tensor lies in its file, e.g. Entry(path, "I64", (32000,), 8, 256008)."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    # bytes from the beginning of the file
    start: int
    stop: int

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.stop - self.start)


def canonical_name(name: str) -> str:
    """The name under which SGLang's draft takes a tensor in: midlayer.x and model.layers.0.x are
    layers.0.x.

    The head is the one part that stands outside `model.`: model.lm_head.weight would be skipped,
    and stays as it is.
    """
    for old, new in LEGACY_NAMES.items():
        name = name.replace(old, new)
    for vocabulary_map in MAPS:
        if vocabulary_map in name:
            return vocabulary_map
    bare = name.removeprefix("model.")
    return name if bare.startswith("lm_head.") else bare


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ValueError, in one sentence."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"no {path.name} can be read there ({error.strerror}).") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path.name} is not JSON.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds {shown(value)}, expected a JSON object.")
    return value


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that SGLang loads: those that the index names where there is one, else
    all.

    Raises ValueError for none, for an index that is damaged or names files that are absent.
    """
    paths = sorted(p for p in directory.glob("*.safetensors") if not p.name.startswith("."))
    if not paths:
        others = sorted(p.name for p in directory.glob("*") if p.suffix in CODE_FORMATS)
        raise ValueError(
            f"holds {', '.join(others)} and no *.safetensors: a file in that format can run code "
            "when it is read, so "
            "it is not read. Ask its author for safetensors, or convert it where that does no harm "
            "(docs/troubleshooting.md)."
            if others
            else "holds no *.safetensors; other formats are not read."
        )
    if not (directory / INDEX).is_file():
        # of a Mistral pair SGLang leaves out the first
        pair = [p.name for p in paths] == ["consolidated.safetensors", "model.safetensors"]
        return paths[1:] if pair else paths
    named = set(weight_map(directory).values())
    absent = sorted(name for name in named if not (directory / name).is_file())
    if absent:
        raise ValueError(
            f"{INDEX} names files that are not there: {some(absent)} (an incomplete download?)."
        )
    paths = [p for p in paths if p.name in named]
    if not paths:
        raise ValueError(f"{INDEX} names none of the *.safetensors there.")
    return paths


def weight_map(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, of the index. Raises ValueError."""
    found = read_json(directory / INDEX).get("weight_map")
    if (
        not isinstance(found, dict)
        or not found
        or not all(isinstance(f, str) for f in found.values())
    ):
        raise ValueError(
            f"{INDEX} is damaged; expected a weight_map from tensor names to file names."
        )
    return found


def read_entries(directory: Path) -> dict[str, Entry]:
    """Every tensor that SGLang would load from the directory, by its canonical name. Reads headers
    only.

    Raises ValueError for no file, a damaged header, or a tensor that is there twice.
    """
    entries: dict[str, Entry] = {}
    for path in weight_files(directory):
        for name, entry in read_header(path):
            name = canonical_name(name)
            if name in entries:
                raise ValueError(f"{name} is there twice.")
            entries[name] = entry
    return entries


def read_header(path: Path) -> list[tuple[str, Entry]]:
    """The names and places of one file's tensors, checked as safetensors checks them. Raises
    ValueError."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
                raise ValueError
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError
        entries = [(name, _entry(path, field, 8 + length)) for name, field in header.items()]
        end = 8 + length
        for entry in sorted((entry for _, entry in entries), key=lambda e: (e.start, e.stop)):
            if entry.start != end:
                # a hole, or two tensors in one place
                raise ValueError
            end = entry.stop
        if end != size:
            raise ValueError
        return entries
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path.name} is damaged or not a safetensors file.") from None


def some(names: list[str]) -> str:
    """A list for a sentence, cut to NAMED."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def shown(value: object) -> str:
    """A value from a file for a sentence, cut to a length that can be read."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _entry(path: Path, field: dict[str, Any], data: int) -> Entry:
    """Raises ValueError, KeyError or TypeError for a field that safetensors would not take."""
    dtype, shape, (first, last) = field["dtype"], field["shape"], field["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
        raise ValueError
    bits = BITS[dtype]
    for n in shape:
        bits *= n
    if bits != 8 * (last - first):
        raise ValueError
    return Entry(path, dtype, tuple(shape), data + first, data + last)
