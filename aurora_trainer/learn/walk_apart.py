"""Walks of several groups of samples at once, such as the requests that the gate holds: one that
cannot be walked costs itself alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from aurora_trainer.intake.sample import Sample

log = logging.getLogger(__name__)

# Steps and tokens of each sample's walk, [len(samples), 2], with a draft of that role.
Walk = Callable[[str, list[Sample]], np.ndarray]


def walk_apart(
    walk: Walk, role: str, groups: Sequence[Sequence[Sample]]
) -> list[np.ndarray | None]:
    """Of each group: float64 [its samples, 2], or None if it cannot be walked."""
    try:
        return _together(walk, role, groups)
    except Exception as error:
        # one at a time: whatever one of them is, it costs itself
        _say(type(error).__name__)
    found: list[np.ndarray | None] = []
    for samples in groups:
        try:
            found += _together(walk, role, [samples])
        except Exception:
            found.append(None)
    return found


@cache
def _say(kind: str) -> None:
    """Once for each kind: samples without end must not fill the log."""
    log.warning("samples cannot be walked together, walking each alone", exc_info=True)


def _together(walk: Walk, role: str, groups: Sequence[Sequence[Sample]]) -> list[np.ndarray]:
    found = walk(role, [sample for samples in groups for sample in samples])
    ends = np.cumsum([len(samples) for samples in groups])
    return np.split(found, ends[:-1])
