"""Which target tokens a draft can propose: d2t, and what is wrong with one.

Dimensions: V target vocabulary, VD draft vocabulary. `d2t` integer [VD] holds offsets (target_id =
draft_id + d2t[draft_id]), `t2d` bool [V] marks the target ids that the draft has. This module
imports neither torch nor sglang.
"""

from __future__ import annotations

import numpy as np

# They are no parameters: a loader takes them aside.
MAPS = ("d2t", "t2d")


def vocabulary_problem(d2t: np.ndarray, target_vocab: int) -> str | None:
    """Why `d2t` does not name VD different target ids, or None."""
    ids = d2t.astype(np.int64) + np.arange(len(d2t))
    if not len(ids) or ids.min() >= 0 and ids.max() < target_vocab and _differ(ids):
        return None
    absolute = _differ(d2t) and d2t.min() >= 0 and d2t.max() < target_vocab
    hint = " It seems to hold the target ids themselves; expected target id minus draft id."
    return (
        f"d2t maps draft ids outside 0..{target_vocab - 1} or two of them to one target id."
        + hint * bool(absolute)
    )


def _differ(ids: np.ndarray) -> bool:
    return len(np.unique(ids)) == len(ids)
