"""The buffer: samples wait here to be trained on, the freshest first, each at most `max_uses` times.

A batch is filled up to `fresh_fraction` with the newest samples that were never used, and from there with a uniform
draw of those that were used before (a small replay speeds learning); where one kind runs out the other fills in.
Bounded in bytes: the oldest sample goes first. All that leaves unused or used up is counted by cause.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from aurora_sglang_plugin.config import Section
from aurora_trainer.sample import Sample


class BufferConfig(Section):
    """How much is kept, for how long, and how batches mix what is new with what is not."""

    max_bytes: PositiveInt = 2 << 30
    max_uses: PositiveInt = 8  # of one sample
    fresh_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5  # of a batch's slots, never-used samples
    max_age_s: Annotated[float, Field(gt=0)] = 3600.0  # behind the newest sample


@dataclass(slots=True)
class _Entry:
    sample: Sample
    uses: int = 0


class Buffer:
    """put() samples, take() batches. Draws depend only on `seed`, what was put and what was taken."""

    def __init__(self, config: BufferConfig, seed: int = 0):
        self.config = config
        self.dropped: Counter[str] = Counter()  # evicted (never used), used_up, replaced (used before), stale
        self.put_count = 0
        self.nbytes = 0
        self.slots = 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # by arrival
        self._random = random.Random(seed)
        self._newest_ns = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, sample: Sample) -> None:
        self._entries[self.put_count] = _Entry(sample)
        self.put_count += 1
        self.nbytes += sample.nbytes
        self.slots += _slots(sample)
        self._newest_ns = max(self._newest_ns, sample.time_ns)
        oldest_ns = self._newest_ns - int(self.config.max_age_s * 1e9)
        while self._entries:
            number, entry = next(iter(self._entries.items()))
            if entry.sample.time_ns < oldest_ns:
                self._drop(number, "stale")
            elif self.nbytes > self.config.max_bytes:
                self._drop(number, "replaced" if entry.uses else "evicted")
            else:
                return

    def take(self, max_slots: int) -> list[Sample]:
        """A batch of at most `max_slots` slots, or of one sample that alone has more. Empty where there is none."""
        fresh = [number for number, entry in reversed(self._entries.items()) if not entry.uses]
        used = [number for number, entry in self._entries.items() if entry.uses]
        self._random.shuffle(used)
        room = max_slots
        room_for_used = max_slots - int(max_slots * self.config.fresh_fraction)
        batch: list[int] = []
        # The share of fresh ones, then used ones, then whatever fits.
        for numbers, until in ((fresh, room_for_used if used else 0), (used, 0), (fresh, 0)):
            for number in numbers:
                size = _slots(self._entries[number].sample)
                if number not in batch and (room - size >= until or not batch):
                    batch.append(number)
                    room -= size
                if room <= until:
                    break
        samples = [self._entries[number].sample for number in batch]
        for number in batch:
            entry = self._entries[number]
            entry.uses += 1
            if entry.uses >= self.config.max_uses:
                self._drop(number, "used_up")
        return samples

    def stats(self) -> dict[str, float]:
        """Numbers for metrics; ages in seconds behind the newest sample."""
        ages = [(self._newest_ns - entry.sample.time_ns) / 1e9 for entry in self._entries.values()]
        return {
            "samples": len(ages),
            "fresh_samples": sum(not entry.uses for entry in self._entries.values()),
            "fresh_slots": sum(_slots(entry.sample) for entry in self._entries.values() if not entry.uses),
            "slots": self.slots,
            "bytes": self.nbytes,
            "age_mean_s": sum(ages) / len(ages) if ages else 0.0,
            "age_max_s": max(ages, default=0.0),
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able. The samples are not in it: they are counted `lost` by restore()."""
        version, words, gauss = self._random.getstate()
        return {
            "random": [version, list(words), gauss],
            "put_count": self.put_count,
            "dropped": dict(self.dropped),
            "waiting": len(self._entries),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on as after state(), with an empty buffer."""
        assert not self._entries
        version, words, gauss = state["random"]
        self._random.setstate((version, tuple(words), gauss))
        self.put_count = state["put_count"]
        self.dropped = Counter(state["dropped"])
        self.dropped["lost"] += state["waiting"]

    def _drop(self, number: int, cause: str) -> None:
        sample = self._entries.pop(number).sample
        self.nbytes -= sample.nbytes
        self.slots -= _slots(sample)
        self.dropped[cause] += 1


def _slots(sample: Sample) -> int:
    return len(sample.features)
