"""Which target tokens a draft can propose: d2t, and what is wrong with one.

Dimensions: V target vocabulary, VD draft vocabulary. `d2t` integer [VD] holds offsets (target_id =
draft_id + d2t[draft_id]), `t2d` bool [V] marks the target ids that the draft has. This module
imports neither torch nor sglang.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# A reduced vocabulary comes with d2t, and may come with t2d, which follows from it. They are no
# parameters: a loader takes them aside.
MAP = "d2t"
MAPS = (MAP, "t2d")
# as safetensors names them
MAP_DTYPES = ("I64", "I32")
# The manifest's field with the hash of its bytes, and the reason why a version was refused for it.
MAP_SHA256 = "d2t_sha256"
BAD_MAP = "d2t"


def optional_maps(shapes: Mapping[str, tuple[int, ...] | None], target_vocab: int) -> set[str]:
    """Those that a version may leave out, for a draft of `shapes` (eagle3_served.served_shapes).

    A draft of the whole vocabulary may spell its offsets out, all zero, or leave them out.
    """
    return set(MAPS) if shapes.get(MAP) == (target_vocab,) else {"t2d"}


def maps_problem(tensors: Mapping[str, tuple[str, np.ndarray]], target_vocab: int) -> str | None:
    """What is wrong with the values of a version's maps; `tensors` as weights/reader.py has
    them.
    """
    return vocabulary_problem(tensors[MAP][1], target_vocab) if MAP in tensors else None


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
