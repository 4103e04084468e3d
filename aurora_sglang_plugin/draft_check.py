"""Does this EAGLE3 draft fit this target? Answered from config.json and the safetensors headers, in milliseconds.

SGLang skips unknown tensors silently, keeps random weights where one is missing, and fails on a wrong shape only deep
inside a forward pass; so a draft is checked before any model is loaded, and everything that is wrong is said at once.
This module imports neither torch nor sglang.

H draft hidden size, Ht target hidden size, V target vocabulary, VD draft vocabulary, L target layers, A aux layers.
"""

from __future__ import annotations

import array
import json
import sys
from pathlib import Path
from typing import Any

from aurora_sglang_plugin.draft_files import LEGACY_NAMES, Entry, read_entries

__all__ = ["LEGACY_NAMES", "aux_layer_ids", "check_draft", "draft_problems", "expected_shapes", "read_entries"]

ARCHITECTURE = "LlamaForCausalLMEagle3"
REMEDY = "`aurora-trainer init-draft` makes an untrained draft that fits any target."
SHAPED = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")  # what shapes follow from
FLOATS = ("F32", "F16", "BF16")
NAMED = 5  # tensors named in one problem, of which there may be hundreds

Shapes = dict[str, tuple[tuple[int, ...], bool]]


def check_draft(draft_dir: Path | str, target_config: dict[str, Any]) -> None:
    """Check the draft in `draft_dir` against its target's (text) config.

    Raises ValueError, which names the draft and everything that does not fit, and what to do.
    """
    problems = draft_problems(Path(draft_dir), target_config)
    if problems:
        raise ValueError(f"draft {draft_dir}: {' '.join(problems)} {REMEDY}")


def draft_problems(directory: Path, target_config: dict[str, Any]) -> list[str]:
    """Everything that keeps SGLang from serving this draft for this target, a sentence or two each."""
    try:
        config = _read_config(directory)
    except ValueError as error:
        return [str(error)]
    try:
        entries = read_entries(directory)
    except ValueError as error:
        return [*config_problems(config, target_config), str(error)]
    return config_problems(config, target_config) + tensor_problems(entries, config, target_config)


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


def config_problems(config: dict[str, Any], target_config: dict[str, Any]) -> list[str]:
    """What config.json alone says against this draft for this target."""
    problems = []
    try:
        aux_layer_ids(config, target_config["num_hidden_layers"])
    except ValueError as error:
        problems.append(str(error))
    for key in SHAPED:
        if type(config.get(key)) is not int or config[key] < 1:
            problems.append(f"config.json has {key} = {config.get(key)!r}, expected a positive integer.")
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if type(heads) is int and type(kv_heads) is int and (kv_heads < 1 or heads % kv_heads):
        problems.append(f"{heads} attention heads, {kv_heads} key-value heads: expected a divisor.")
    h, ht, vocab = config.get("hidden_size"), target_config["hidden_size"], target_config["vocab_size"]
    if config.get("target_hidden_size", h) != ht:
        key = "target_hidden_size" if "target_hidden_size" in config else "hidden_size"
        problems.append(f"{key} is {config[key]}, the target's hidden_size is {ht}: made for another target.")
    if config.get("vocab_size") != vocab:
        problems.append(f"vocab_size is {config.get('vocab_size')}, the target's is {vocab}: made for another target.")
    if config.get("tie_word_embeddings"):
        problems.append("tie_word_embeddings is true; expected false and a head in lm_head.weight.")
    if _num_aux(config) * ht == h:
        problems.append(f"one aux layer of the draft's own width {h} never passes through fc; name two or more.")
    vd = config.get("draft_vocab_size")
    if vd is None:
        problems.append(
            "config.json has no draft_vocab_size: SGLang would draft with the target's own head, which a swap must "
            "never write. Expected the size, and the draft's own lm_head.weight."
        )
    elif type(vd) is not int or not 0 < vd <= vocab:
        problems.append(f"draft_vocab_size is {vd}, expected 1 to {vocab}.")
    return problems


def expected_shapes(config: dict[str, Any], target_config: dict[str, Any], num_aux: int) -> Shapes:
    """Tensor name -> (shape, must be there), for a draft whose config fits the target."""
    h, heads, inner, layers = (config[k] for k in SHAPED)
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or h // heads
    ht, vocab = target_config["hidden_size"], target_config["vocab_size"]
    vd = config.get("draft_vocab_size") or vocab
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
    for i in range(layers):
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


def tensor_problems(entries: dict[str, Entry], config: dict[str, Any], target_config: dict[str, Any]) -> list[str]:
    """What the files' headers, and d2t, say against this draft."""
    if any(type(config.get(key)) is not int or config[key] < 1 for key in SHAPED):
        return []  # config_problems said so; without them there is nothing to compare with
    shapes = expected_shapes(config, target_config, _num_aux(config))
    problems = []
    unknown = sorted(entries.keys() - shapes.keys())
    if unknown:
        problems.append(f"holds tensors that SGLang would skip silently: {_some(unknown)}.")
    missing = sorted(name for name, (_, needed) in shapes.items() if needed and name not in entries)
    if missing:
        problems.append(f"lacks {_some(missing)}.")
    known = {name: entry for name, entry in entries.items() if name in shapes}
    for name, entry in known.items():
        if entry.shape != shapes[name][0]:
            wanted = list(shapes[name][0])
            problems.append(f"{name} is {list(entry.shape)}, config.json and the target want {wanted}.")
        elif name not in ("d2t", "t2d") and entry.dtype not in FLOATS:
            problems.append(f"{name} is {entry.dtype}, expected one of {', '.join(FLOATS)}.")
    if "d2t" in known and known["d2t"].shape == shapes["d2t"][0]:
        problems += _d2t_problems(known["d2t"], target_config["vocab_size"])
    return problems


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


def _num_aux(config: dict[str, Any]) -> int:
    """A, as SGLang counts it."""
    ids = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    return config.get("num_aux_hidden_states") or (len(ids) if ids else 3)


def _d2t_problems(entry: Entry, vocab: int) -> list[str]:
    if entry.dtype != "I64":
        return [f"d2t is {entry.dtype}, expected I64 offsets (target id minus draft id)."]
    offsets = array.array("q")
    with open(entry.path, "rb") as file:
        file.seek(entry.start)
        offsets.frombytes(file.read(entry.stop - entry.start))
    if sys.byteorder == "big":
        offsets.byteswap()
    ids = [draft_id + offset for draft_id, offset in enumerate(offsets)]
    if len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) >= vocab:
        absolute = len(set(offsets)) == len(offsets) and min(offsets) >= 0 and max(offsets) < vocab
        hint = " It seems to hold the target ids themselves; expected target id minus draft id." if absolute else ""
        return [f"d2t maps draft ids outside 0..{vocab - 1} or two of them to one target id.{hint}"]
    return []


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _spread(num_layers: int) -> list[int]:
    """Three captured layers, low, middle and high, of a target that has as many; fewer where it has fewer."""
    return sorted({0, (num_layers - 2) // 2, num_layers - 2}) if num_layers > 1 else []
