"""Does this EAGLE3 draft fit this target? Answered from config.json and the safetensors headers, in milliseconds.

SGLang skips unknown tensors silently, keeps random weights where one is missing, and fails on a wrong shape only deep
inside a forward pass; so a draft is checked before any model is loaded. This module imports neither torch nor sglang.

H draft hidden size, Ht target hidden size, V target vocabulary, VD draft vocabulary, L target layers, A aux layers.
"""

from __future__ import annotations

import array
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

ARCHITECTURE = "LlamaForCausalLMEagle3"
MAX_HEADER_BYTES = 16 << 20
# Older names that SGLang still reads, and the prefix that it does not need.
LEGACY_NAMES = {
    "midlayer.": "layers.0.",
    "aux_norm_low.": "fc_norm.0.",
    "aux_norm_mid.": "fc_norm.1.",
    "aux_norm_high.": "fc_norm.2.",
}
REMEDY = "`aurora-trainer init-draft` makes an untrained draft that fits any target."


class Entry(NamedTuple):
    """Where a tensor lies in its file, e.g. Entry(path, "I64", (32000,), 8, 256008)."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    stop: int


def check_draft(draft_dir: Path | str, target_config: dict[str, Any]) -> None:
    """Check the draft in `draft_dir` against its target's (text) config.

    Raises ValueError, which names the draft, what was found, what was expected and what to do.
    """
    directory = Path(draft_dir)
    try:
        config = _read_config(directory)
        aux = aux_layer_ids(config, target_config["num_hidden_layers"])
        shapes = expected_shapes(config, target_config, len(aux))
        _check_tensors(read_entries(directory), shapes, config)
    except ValueError as error:
        raise ValueError(f"draft {directory}: {error} {REMEDY}") from None


def aux_layer_ids(draft_config: dict[str, Any], num_target_layers: int) -> list[int]:
    """The layers of the target whose OUTPUT the draft reads, low to high; SGLang's default where none are named.

    Raises ValueError where SGLang would capture others than the draft asks for, or fewer.
    """
    eagle = draft_config.get("eagle_config") or {}
    last = num_target_layers - 2  # SGLang captures what ENTERS a layer; the last layer's output enters none
    ids = eagle.get("eagle_aux_hidden_state_layer_ids")
    if ids is None:
        ids = [1, num_target_layers // 2 - 1, num_target_layers - 4]
        if ids != sorted(set(ids)) or ids[0] < 0 or ids[-1] > last:
            raise ValueError(
                f"eagle_config.eagle_aux_hidden_state_layer_ids is not set, and SGLang's default {ids} does not name "
                f"three layers of a target of {num_target_layers}; set it, for example to {_spread(num_target_layers)}."
            )
    if not ids or not all(type(i) is int and 0 <= i <= last for i in ids):
        raise ValueError(
            f"eagle_aux_hidden_state_layer_ids {ids}: expected ids from 0 to {last} for a target of "
            f"{num_target_layers} layers (the last layer's output is never captured), for example "
            f"{_spread(num_target_layers)}."
        )
    if ids != sorted(set(ids)):
        raise ValueError(
            f"eagle_aux_hidden_state_layer_ids {ids}: SGLang captures each layer once, low to high; expected "
            f"{sorted(set(ids))} and fc.weight to match."
        )
    if eagle.get("use_aux_hidden_state", True) is not True:
        raise ValueError("eagle_config.use_aux_hidden_state is false: AURORA drafts from aux hidden states only.")
    count = draft_config.get("num_aux_hidden_states")
    if count is not None and count != len(ids):
        raise ValueError(f"num_aux_hidden_states is {count}, but {len(ids)} layers are captured: {ids}.")
    return ids


def expected_shapes(
    config: dict[str, Any], target_config: dict[str, Any], num_aux: int
) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Tensor name -> (shape, must be there), for a draft of this config. Raises ValueError where it cannot fit."""
    h, heads, inner = (_positive(config, k) for k in ("hidden_size", "num_attention_heads", "intermediate_size"))
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or h // heads
    ht, vocab = target_config["hidden_size"], target_config["vocab_size"]
    if heads % kv_heads:
        raise ValueError(f"{heads} attention heads, {kv_heads} key-value heads: expected a divisor.")
    if config.get("target_hidden_size", h) != ht:
        key = "target_hidden_size" if "target_hidden_size" in config else "hidden_size"
        raise ValueError(f"{key} is {config[key]}, the target's hidden_size is {ht}: made for another target.")
    if config.get("vocab_size") != vocab:
        raise ValueError(f"vocab_size is {config.get('vocab_size')}, the target's is {vocab}: made for another target.")
    vd = config.get("draft_vocab_size")
    if vd is None:
        raise ValueError(
            "config.json has no draft_vocab_size: SGLang would draft with the target's own head, which a swap must "
            "never write. Expected the size, and the draft's own lm_head.weight."
        )
    if config.get("tie_word_embeddings"):
        raise ValueError("tie_word_embeddings is true; expected false and a head in lm_head.weight.")
    if num_aux * ht == h:
        raise ValueError(f"one aux layer of the draft's own width {h} never passes through fc; name two or more.")
    if type(vd) is not int or not 0 < vd <= vocab:
        raise ValueError(f"draft_vocab_size is {vd}, expected 1 to {vocab}.")

    shapes = {
        "fc.weight": ((h, num_aux * ht), True),
        "norm.weight": ((h,), True),
        "lm_head.weight": ((vd, h), True),
        "d2t": ((vd,), vd < vocab),
        "t2d": ((vocab,), False),
        "embed_tokens.weight": ((vocab, h), h != ht),  # of the target's width it is the target's own, shared
    }
    if config.get("bias"):
        shapes["fc.bias"] = ((h,), True)
    if config.get("fc_norm") or config.get("use_aux_norm"):
        shapes |= {f"fc_norm.{i}.weight": ((ht,), True) for i in range(num_aux)}
    if (config.get("eagle_config") or {}).get("norm_before_fc", config.get("norm_before_fc", False)):
        shapes["input_norm.weight"] = ((num_aux * ht,), True)
    for i in range(_positive(config, "num_hidden_layers")):
        width = 2 * h if i == 0 else h  # only the first layer sees embedding and state side by side
        layer = {
            "self_attn.q_proj": (heads * head_dim, width),
            "self_attn.k_proj": (kv_heads * head_dim, width),
            "self_attn.v_proj": (kv_heads * head_dim, width),
            "self_attn.o_proj": (h, heads * head_dim),
            "mlp.gate_proj": (inner, h),
            "mlp.up_proj": (inner, h),
            "mlp.down_proj": (h, inner),
            "hidden_norm": (h,),
            "post_attention_layernorm": (h,),
        }
        shapes |= {f"layers.{i}.{name}.weight": (shape, True) for name, shape in layer.items()}
        shapes[f"layers.{i}.input_layernorm.weight"] = ((h,), i == 0)
        if config.get("bias"):
            shapes[f"layers.{i}.self_attn.o_proj.bias"] = ((h,), True)
    return shapes


def read_entries(directory: Path) -> dict[str, Entry]:
    """Every tensor in the directory's safetensors files by its present-day name. Reads headers only.

    Raises ValueError for no file, a damaged header, or a tensor that is there twice.
    """
    entries: dict[str, Entry] = {}
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise ValueError("holds no *.safetensors; other formats are not read.")
    for path in paths:
        for name, entry in _read_header(path):
            name = name.removeprefix("model.")
            for old, new in LEGACY_NAMES.items():
                name = re.sub(f"^{re.escape(old)}", new, name)
            if name in entries:
                raise ValueError(f"{name} is there twice.")
            entries[name] = entry
    return entries


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text())
    except OSError as error:
        raise ValueError(f"no config.json can be read there ({error.strerror}).") from None
    except ValueError:
        raise ValueError("config.json is not JSON.") from None
    found = config.get("architectures") if isinstance(config, dict) else None
    if found != [ARCHITECTURE]:
        raise ValueError(f"architectures is {found}, expected {[ARCHITECTURE]}: not an EAGLE3 draft.")
    return config


def _read_header(path: Path) -> list[tuple[str, Entry]]:
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


def _check_tensors(entries: dict[str, Entry], shapes: dict[str, tuple[tuple[int, ...], bool]], config: dict) -> None:
    unknown = sorted(entries.keys() - shapes.keys())
    if unknown:
        raise ValueError(f"holds tensors that SGLang would skip silently: {', '.join(unknown[:5])}.")
    missing = sorted(name for name, (_, needed) in shapes.items() if needed and name not in entries)
    if missing:
        raise ValueError(f"lacks {', '.join(missing[:5])}.")
    for name, entry in entries.items():
        if entry.shape != shapes[name][0]:
            raise ValueError(f"{name} is {list(entry.shape)}, config.json and the target want {list(shapes[name][0])}.")
    if "d2t" in entries:
        _check_d2t(entries["d2t"], config["vocab_size"])


def _check_d2t(entry: Entry, vocab: int) -> None:
    if entry.dtype != "I64":
        raise ValueError(f"d2t is {entry.dtype}, expected I64 offsets (target id minus draft id).")
    offsets = array.array("q")
    with open(entry.path, "rb") as file:
        file.seek(entry.start)
        offsets.frombytes(file.read(entry.stop - entry.start))
    if sys.byteorder == "big":
        offsets.byteswap()
    ids = [draft_id + offset for draft_id, offset in enumerate(offsets)]
    if len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) >= vocab:
        raise ValueError(f"d2t maps draft ids outside 0..{vocab - 1} or two of them to one target id.")


def _positive(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json has {key} = {value!r}, expected a positive integer.")
    return value


def _spread(num_layers: int) -> list[int]:
    """Three captured layers, low, middle and high, of a target that has as many; fewer where it has fewer."""
    return sorted({0, (num_layers - 2) // 2, num_layers - 2}) if num_layers > 1 else []
