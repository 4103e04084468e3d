"""What earlier requests computed, for requests whose prompt the server had cached in part.

The server computes no features of a cached prefix, so none travel; it sends the prefix's last
tokens instead. The turn before of the same conversation, or whoever said the system prompt first,
had the same tokens at the same positions: its features are what the server's draft sees there. They
become context of the sample, in front of what was computed.

Dimensions: L positions of a run, n tokens of a prefix, F feature width.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch

from aurora_trainer.intake.request import Step
from aurora_trainer.intake.sample import Sample

# Tokens before a multiple of it find a run; a prefix of fewer has none.
BLOCK = 16
# Tokens that must be the same, if the server sent so many.
AT_LEAST = 32
# of a key, beside the run
KEY_BYTES = 256

# a multiple of BLOCK, and the bytes of the tokens before it
BlockKey = tuple[int, bytes]


@dataclass(slots=True)
class Run:
    """The positions first..first + L - 1 of a sample; its arrays are the sample's memory."""

    first: int
    # int32 [L + 1], x[first] to x[first + L]
    tokens: np.ndarray
    # [L, F], bfloat16 as bits
    features: np.ndarray
    # int32 [L]
    versions: np.ndarray
    dtype: str
    keys: list[BlockKey] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        arrays = self.tokens.nbytes + self.features.nbytes + self.versions.nbytes
        return arrays + KEY_BYTES * len(self.keys)


class Prefixes:
    """The runs of the last requests, at most `max_bytes` with their keys; those that nobody asked
    for go first."""

    def __init__(self, max_bytes: int, most: int):
        """most: positions that a sample wants as context."""
        self._max_bytes, self._most = max_bytes, most
        # positions that samples wanted: found, missing
        self.positions: Counter[str] = Counter()
        self._nbytes = 0
        self._count = 0
        # least recently used first
        self._runs: OrderedDict[int, Run] = OrderedDict()
        self._at: dict[BlockKey, int] = {}

    def put(self, sample: Sample) -> None:
        """Keep what `sample` knows of its positions."""
        run, number = _run(sample), self._count
        self._count += 1
        last = run.first + len(run.features)
        for at in range(-(-run.first // BLOCK) * BLOCK + BLOCK, last + 1, BLOCK):
            key = at, run.tokens[at - BLOCK - run.first : at - run.first].tobytes()
            run.keys.append(key)
            # who comes last has most of the conversation
            self._at[key] = number
        self._runs[number] = run
        self._nbytes += run.nbytes
        while self._nbytes > self._max_bytes:
            number, run = self._runs.popitem(last=False)
            self._nbytes -= run.nbytes
            for key in run.keys:
                if self._at.get(key) == number:
                    del self._at[key]

    def before(self, position: int, tokens: np.ndarray, dtype: str, width: int) -> Step | None:
        """What is known of the positions that end before `position`; None: nothing.

        tokens: int32 [n + 1], x[position - n] to x[position]; a run must agree with all but the
            last.
        """
        most = min(self._most, position)
        found = self._before(position, tokens, dtype, width, most)
        known = len(found.tokens) if found else 0
        self.positions["found"] += known
        self.positions["missing"] += most - known
        return found

    def _before(
        self, position: int, tokens: np.ndarray, dtype: str, width: int, most: int
    ) -> Step | None:
        n = len(tokens) - 1
        at = position // BLOCK * BLOCK
        # of the block, in `tokens`
        end = n - (position - at)
        if end < BLOCK or most < 1:
            return None
        number = self._at.get((at, tokens[end - BLOCK : end].tobytes()))
        if number is None:
            return None
        run = self._runs[number]
        first = max(run.first, position - n)
        # the token at `position` is the request's own
        known = run.tokens[first - run.first : position - run.first]
        if (
            (run.dtype, run.features.shape[1]) != (dtype, width)
            or position > run.first + len(run.features)
            or len(known) < min(n, AT_LEAST)
            or not np.array_equal(known, tokens[first - position - 1 : -1])
        ):
            return None
        self._runs.move_to_end(number)
        count = min(len(known), most)
        own = slice(position - count - run.first, position - run.first)
        return Step(position - count, tokens[-count:], run.features[own], run.versions[own])


def _run(sample: Sample) -> Run:
    features = sample.features
    dtype = str(features.dtype).removeprefix("torch.")
    bits = features.view(torch.int16).numpy().view("<u2") if dtype == "bfloat16" else None
    return Run(
        sample.start,
        sample.tokens.numpy().astype(np.int32),
        features.numpy() if bits is None else bits,
        sample.position_version.numpy(),
        dtype,
    )
