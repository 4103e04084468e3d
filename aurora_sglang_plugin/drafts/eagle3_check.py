"""Does this EAGLE3 draft fit this target? Answered from config.json and the safetensors headers, in
milliseconds.

SGLang skips unknown tensors silently, keeps random weights where one is missing, and fails on a
wrong shape only deep inside a forward pass; so a draft is checked before any model is loaded, and
everything that is wrong is said at once. Server start, `aurora-trainer check`, `import` and the
trainer ask this module: what it accepts, all of them take. It imports neither torch nor sglang.

H draft hidden size, Ht target hidden size, V target vocabulary, VD draft vocabulary, L target
layers, A aux layers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from aurora_sglang_plugin.drafts import aux_layers
from aurora_sglang_plugin.drafts.aux_layers import aux_layer_ids
from aurora_sglang_plugin.drafts.eagle3_config import DraftConfig, read_draft_config
from aurora_sglang_plugin.drafts.eagle3_vocab import vocabulary_problem
from aurora_sglang_plugin.drafts.tensor_files import Entry, read_entries, read_json, shown, some

__all__ = ["aux_layer_ids", "check_draft", "draft_problems", "expected_shapes", "read_entries"]

REMEDY = "`aurora-trainer init-draft` makes an untrained draft that fits any target."
FLOATS = ("F32", "F16", "BF16", "F64")
# Of d2t, which SGLang adds to int64 ids; the codes are array's.
INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
# What training leaves behind and no draft computes with, so that skipping it does no harm.
LEFT_OVER = re.compile(
    r".*rotary_emb\.(inv_freq|cos_cached|sin_cached)|verifier_(norm|lm_head)\.weight"
)

Shapes = dict[str, tuple[tuple[int, ...], bool]]


def check_draft(draft_dir: Path | str, target_config: dict[str, Any]) -> list[str]:
    """Check the draft in `draft_dir` against its target's (text) config; returns what its user
    should know.

    Raises ValueError, which names the draft and everything that does not fit, and what to do.
    """
    problems = draft_problems(Path(draft_dir), target_config)
    if problems:
        raise ValueError(f"draft {draft_dir}: {' '.join(problems)} {REMEDY}")
    config = read_json(Path(draft_dir) / "config.json")
    return layer_notes(config, target_config) + position_notes(config, target_config)


def draft_problems(directory: Path, target_config: dict[str, Any]) -> list[str]:
    """Everything that keeps a server from serving this draft for this target, or a trainer from
    training it."""
    try:
        config = read_json(directory / "config.json")
    except ValueError as error:
        return [str(error)]
    problems = config_problems(config, target_config)
    if (directory / "hf_quant_config.json").exists():
        problems.append(
            "hf_quant_config.json stands beside it: a quantized draft. Expected float tensors."
        )
    try:
        entries = read_entries(directory)
    except ValueError as error:
        return [*problems, str(error)]
    return problems + tensor_problems(entries, config, target_config)


def config_problems(config: dict[str, Any], target_config: dict[str, Any]) -> list[str]:
    """What config.json alone says against this draft for this target."""
    draft, problems = read_draft_config(config)
    ht, vocab = target_config["hidden_size"], target_config["vocab_size"]
    h = draft.hidden_size if draft is not None else None
    if draft is not None and draft.target_hidden_size == ht != h:
        problems.append(
            f"hidden_size is {h}, the target's is {ht}: a draft of a width of its own has an "
            f"embedding of its own, which AURORA neither trains nor swaps; expected {ht}."
        )
    elif draft is not None and (draft.target_hidden_size or h) != ht:
        key = "target_hidden_size" if draft.target_hidden_size else "hidden_size"
        problems.append(
            f"{key} is {draft.target_hidden_size or h}, the target's hidden_size is {ht}: made for "
            "another target."
        )
    if draft is not None and draft.vocab_size != vocab:
        problems.append(
            f"vocab_size is {draft.vocab_size}, the target's is {vocab}: made for another target."
        )
    return problems + _layer_problems(config, target_config)


def layer_notes(config: dict[str, Any], target_config: dict[str, Any]) -> list[str]:
    """Which layers feed a draft that fits, where its config does not simply say so."""
    ids = aux_layer_ids(config, target_config["num_hidden_layers"], target_config)
    named = aux_layers.named_ids(config)
    if named is None:
        return [
            f"its config names no aux layers, so SGLang takes the outputs of layers {ids}: make "
            f"sure that the draft "
            "was trained on these"
        ]
    if named != ids:
        return [
            f"SGLang reads the layers {named} of this model as what ENTERS them: the outputs of "
            f"{ids}"
        ]
    return []


def position_notes(config: dict[str, Any], target_config: dict[str, Any]) -> list[str]:
    """Where SGLang would refuse the target's context length for this draft."""
    draft, of_target = DraftConfig.from_json(config), target_config.get("max_position_embeddings")
    own, scaling = draft.max_position_embeddings, draft.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        own = int(own * scaling["factor"])
    if type(of_target) is not int or own >= of_target:
        return []
    return [
        f"its max_position_embeddings is {own}, the target's {of_target}: a server needs "
        f"--context-length {own} or "
        "less, or SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1; `aurora-trainer import` raises it"
    ]


def expected_shapes(config: DraftConfig, target_config: dict[str, Any]) -> Shapes:
    """Tensor name -> (shape, must be there), for a draft whose config fits the target."""
    h, heads, inner = config.hidden_size, config.num_attention_heads, config.intermediate_size
    kv_heads, head_dim = config.num_key_value_heads, config.head_dim
    vd, num_aux = config.draft_vocab_size, config.num_aux
    ht, vocab = target_config["hidden_size"], target_config["vocab_size"]
    shapes = {
        "fc.weight": ((h, num_aux * ht), True),
        "norm.weight": ((h,), True),
        "lm_head.weight": ((vd, h), True),
        "d2t": ((vd,), vd < vocab),
        # SGLang puts the target's own in its place
        "embed_tokens.weight": ((vocab, h), False),
    }
    if config.bias:
        shapes["fc.bias"] = ((h,), True)
    if config.fc_norm:
        shapes |= {f"fc_norm.{i}.weight": ((ht,), True) for i in range(num_aux)}
    if config.norm_before_fc:
        shapes["input_norm.weight"] = ((num_aux * ht,), True)
    for i in range(config.num_hidden_layers):
        # only the first layer sees embedding and state side by side
        width = 2 * h if i == 0 else h
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
        if config.bias or config.attention_bias:
            shapes[f"layers.{i}.self_attn.o_proj.bias"] = ((h,), True)
    return shapes


def tensor_problems(
    entries: dict[str, Entry], config: dict[str, Any], target_config: dict[str, Any]
) -> list[str]:
    """What the files' headers, and d2t, say against this draft."""
    draft, _ = read_draft_config(config)
    if (
        draft is None
        or draft.hidden_size != target_config["hidden_size"] == draft.target_hidden_size
    ):
        # config_problems said so; there is nothing to compare with
        return []
    shapes = expected_shapes(draft, target_config)
    problems = []
    unknown = sorted(n for n in entries.keys() - shapes.keys() if not harmless(n, entries[n]))
    fused = [n for n in unknown if "qkv_proj" in n or "gate_up_proj" in n]
    if fused:
        problems.append(
            f"holds fused tensors ({some(fused)}); `aurora-trainer import` takes them apart."
        )
    elif unknown:
        problems.append(f"holds tensors that SGLang would skip silently: {some(unknown)}.")
    missing = sorted(name for name, (_, needed) in shapes.items() if needed and name not in entries)
    if missing and not fused:
        problems.append(f"lacks {some(missing)}.")
    known = {name: entry for name, entry in entries.items() if name in shapes}
    for name, entry in known.items():
        if entry.shape != shapes[name][0]:
            wanted = list(shapes[name][0])
            problems.append(
                f"{name} is {list(entry.shape)}, config.json and the target want {wanted}."
            )
        elif name != "d2t" and entry.dtype not in FLOATS:
            problems.append(f"{name} is {entry.dtype}, expected one of {', '.join(FLOATS)}.")
    if "d2t" in known and known["d2t"].shape == shapes["d2t"][0]:
        problems += _d2t_problems(known["d2t"], target_config["vocab_size"])
    return problems


def _layer_problems(config: dict[str, Any], target_config: dict[str, Any]) -> list[str]:
    """What SGLang would capture other than the draft means."""
    layers = target_config["num_hidden_layers"]
    top = config.get(aux_layers.KEY)
    if aux_layers.named_ids(config) is None and isinstance(top, list):
        try:
            taken = aux_layer_ids(config, layers, target_config)
        except ValueError:
            taken = []
        if top != [i + 1 for i in taken]:
            return [
                f"config.json names the aux layers {shown(top)} at its top, where SGLang does not "
                f"look: it would take "
                f"the outputs of {taken}. `aurora-trainer import` writes them into eagle_config."
            ]
    try:
        aux_layer_ids(config, layers, target_config)
    except ValueError as error:
        return [str(error)]
    return []


def harmless(name: str, entry: Entry) -> bool:
    """Whether SGLang may skip this tensor: nothing computes with it, or it adds nothing."""
    if name == "t2d" or LEFT_OVER.fullmatch(name):
        return True
    return name.endswith(".bias") and not any(entry.read())


def _d2t_problems(entry: Entry, vocab: int) -> list[str]:
    if entry.dtype not in INTEGERS:
        return [f"d2t is {entry.dtype}, expected I64 offsets (target id minus draft id)."]
    problem = vocabulary_problem(np.frombuffer(entry.read(), INTEGERS[entry.dtype]), vocab)
    return [problem] if problem else []
