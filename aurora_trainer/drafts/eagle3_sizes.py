"""How large an EAGLE3 draft and a step of its training are, from its config.

tools/sizes.py has the rest; tests/trainer/tools/test_sizes.py holds these formulas against files
and a real step too. H hidden, F = A H feature width (A aux layers), V target vocabulary, VD draft
vocabulary, Hq and Hkv heads of D, I of the MLP, P# parameters.
"""

from __future__ import annotations

import math
from typing import Any

from aurora_sglang_plugin.drafts.eagle3_check import expected_shapes
from aurora_sglang_plugin.drafts.eagle3_config import DraftConfig
from aurora_sglang_plugin.drafts.eagle3_vocab import MAP
from aurora_trainer.drafts.target import Target


def described(draft: DraftConfig) -> dict[str, Any]:
    """Its shape, for a plan."""
    return {
        "hidden_size": draft.hidden_size,
        "intermediate_size": draft.intermediate_size,
        "heads": [draft.num_attention_heads, draft.num_key_value_heads, draft.head_dim],
        "vocabulary": draft.draft_vocab_size,
        "aux_layers": list(draft.aux_layer_ids or ()),
    }


def shapes(draft: DraftConfig, target: Target) -> dict[str, tuple[int, ...]]:
    """Every tensor of the draft's file but the vocabulary maps, by name: what the server expects to
    be there.
    """
    found = expected_shapes(draft, target.config)
    return {n: shape for n, (shape, needed) in found.items() if needed and n != MAP}


def parameter_count(draft: DraftConfig, target: Target) -> int:
    """P#, without the target's embedding."""
    return sum(map(math.prod, shapes(draft, target).values()))


def version_bytes(draft: DraftConfig, target: Target, size: int) -> int:
    """model.safetensors without its header of a few kB: P# in the server's dtype, and for a reduced
    vocabulary d2t (int64 [VD]) and t2d (bool [V])."""
    maps = (
        0
        if draft.draft_vocab_size == draft.vocab_size
        else 8 * draft.draft_vocab_size + draft.vocab_size
    )
    return parameter_count(draft, target) * size + maps


def rank_bytes(draft: DraftConfig, target: Target, tp: int, size: int) -> int:
    """A draft's parameters on one tensor-parallel rank.

    SGLang shards attention, MLP and head; fc and the norms are whole on each. The plugin holds two
    more drafts than EAGLE3: the staged and the previous version (serve/staging.py:
    reserve_staging_memory).
    """
    whole = ("fc.", "norm.", "hidden_norm.", "layernorm.", "input_norm.", "fc_norm.")
    found = shapes(draft, target)
    return size * sum(
        math.prod(s) if any(w in n for w in whole) else math.ceil(math.prod(s) / tp)
        for n, s in found.items()
    )


def activation_bytes(draft: DraftConfig, positions: int, rows: int, depth: int, c: int) -> int:
    """What autograd keeps of a step: `positions` packed positions, `rows` of them with a loss at
    each of `depth` levels.

    A position: its features F and, behind fc, the state, both norms' inputs and outputs (6 H), keys
    and values. A row of a level: state in, both halves of the attention's input, its norm's output,
    state out (8 H), queries and attention's output (2 Hq D), the MLP's gate, up, their product and
    what silu keeps (4 I), keys and values of its level and of those above it (they are concatenated
    level by level). What norms keep (4 H of a position, 6 H of a row) and attention's output are
    float32 whatever the dtype: so they are in PyTorch's norm on the CPU and in the reference of
    tree attention, and a fused kernel keeps less.
    """
    h, inner = draft.hidden_size, draft.intermediate_size
    q, kv = draft.num_attention_heads * draft.head_dim, draft.num_key_value_heads * draft.head_dim
    position = c * (draft.feature_size + 2 * h + 2 * kv) + 4 * 4 * h
    row = c * (2 * h + q + 4 * inner) + 4 * (6 * h + q)
    # level d holds those of levels 1..d
    nodes = c * 2 * kv * (depth - 1) * depth // 2
    return draft.num_hidden_layers * (positions * position + rows * (depth * row + nodes))


def row_parameters(draft: DraftConfig, depth: int) -> int:
    """How many parameters multiply a position of `depth` levels: fc once, layer and head at each
    level."""
    h, inner = draft.hidden_size, draft.intermediate_size
    q, kv = draft.num_attention_heads * draft.head_dim, draft.num_key_value_heads * draft.head_dim
    layer = 2 * h * (q + 2 * kv) + q * h + 3 * h * inner
    level = draft.num_hidden_layers * layer + draft.draft_vocab_size * h
    return depth * level + draft.feature_size * h
