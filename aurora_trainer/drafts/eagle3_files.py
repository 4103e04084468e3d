"""The tensors in a draft's directory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from aurora_sglang_plugin.drafts.eagle3_check import harmless
from aurora_sglang_plugin.drafts.eagle3_vocab import MAP
from aurora_sglang_plugin.drafts.tensor_files import Entry, read_entries

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """A draft's tensors by canonical name, d2t in int64, without the embedding and what no draft
    computes with.

    Raises ValueError where SGLang could not load the files either.
    """
    try:
        entries = read_entries(Path(directory))
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    tensors = {
        name: tensor_of(entry)
        for name, entry in entries.items()
        if name != "embed_tokens.weight" and not harmless(name, entry)
    }
    if MAP in tensors and not tensors[MAP].is_floating_point():
        tensors[MAP] = tensors[MAP].long()
    return tensors


def tensor_of(entry: Entry) -> Tensor:
    """A tensor of its own from its place in a file."""
    data = bytearray(entry.read())
    return (
        torch.frombuffer(data, dtype=DTYPES[entry.dtype]).view(entry.shape)
        if data
        else torch.empty(entry.shape)
    )


def stored_dtype(directory: Path) -> torch.dtype:
    """That of the head that SGLang loads. Raises ValueError where there is none."""
    try:
        head = read_entries(Path(directory)).get("lm_head.weight")
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    if head is None or head.dtype not in DTYPES:
        raise ValueError(
            f"{directory} has no lm_head.weight in *.safetensors; expected an EAGLE3 draft with its"
            " own head"
        )
    return DTYPES[head.dtype]
