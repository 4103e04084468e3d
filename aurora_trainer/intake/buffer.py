"""The buffer: samples wait here to be trained on, the freshest first, each at most `max_uses`
times.

A batch is filled up to `fresh_fraction` with the newest samples that were never used, and from
there with a uniform draw of those that were used before (a small replay speeds learning); if one
kind runs out the other fills in. While never-used samples leave the buffer, repeats wait: batches
are all fresh. All that leaves is counted by cause.

Nobody's flood owns it: domains (the labels of requests) share it, and within a domain the servers
do (owners.py). What is full gives up the oldest sample of whoever has most, and a batch takes fresh
samples from whomever it has least of.

Ages are by the clock of the server that a sample came from: one that is wrong harms nobody else. If
a batch could not be trained on, each half is tried again, until the sample at fault is alone,
and goes.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from aurora_sglang_plugin.config import Section
from aurora_trainer.intake.owners import Owner, owner_of
from aurora_trainer.intake.sample import Sample


class BufferConfig(Section):
    """How much is kept, for how long, and how batches mix what is new with what is not."""

    # of samples; the oldest of whoever has most goes first. Where the trainer is on a GPU, as much
    # of its memory again, shared by the ranks: the features of samples stay there
    max_bytes: PositiveInt = 2 << 30
    # of one sample
    max_uses: PositiveInt = 8
    # of a batch's positions, never-used samples; all of them while such samples leave the buffer
    fresh_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    # behind its server's newest sample
    max_age_s: Annotated[float, Field(gt=0)] = 3600.0
    # who shares a full buffer, and the fresh part of a batch, equally: the labels of requests (at
    # most 16 have a share of their own), and within a label the servers; `[]`: the oldest goes, the
    # newest comes
    share_by: tuple[Literal["domain", "server"], ...] = ("domain", "server")


@dataclass(slots=True)
class _Entry:
    sample: Sample
    owner: Owner
    uses: int = 0


@dataclass(slots=True)
class _Held:
    """What one owner has: entries by arrival."""

    entries: OrderedDict[int, _Entry] = field(default_factory=OrderedDict)
    nbytes: int = 0


class Buffer:
    """put() samples, take() batches.

    Draws depend only on `seed`, what was put, taken and failed.
    """

    def __init__(self, config: BufferConfig, seed: int = 0):
        self.config = config
        # evicted (never used), used_up, replaced (used before), stale, failed (could not be trained
        # on)
        self.dropped: Counter[str] = Counter()
        self.put_count = 0
        self.nbytes = 0
        self.positions = 0
        # by arrival
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._held: dict[Owner, _Held] = {}
        self._random = random.Random(seed)
        # never-used samples that left, by now and at the last take
        self._unseen_lost = self._unseen_lost_before = 0
        # the last batch
        self._last: list[Sample] = []
        # parts of batches that failed, the next one last
        self._again: list[list[Sample]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, sample: Sample) -> None:
        owner = self._owner(sample)
        entry = self._entries[self.put_count] = _Entry(sample, owner)
        held = self._held.setdefault(owner, _Held())
        held.entries[self.put_count] = entry
        held.nbytes += sample.nbytes
        self.put_count += 1
        self.nbytes += sample.nbytes
        self.positions += _positions(sample)
        self._drop_stale(sample, owner)
        while self._entries and self.nbytes > self.config.max_bytes:
            number = next(iter(self._held[self._largest()].entries))
            self._drop(number, "replaced" if self._entries[number].uses else "evicted")

    def take(self, max_positions: int) -> list[Sample]:
        """A batch of at most `max_positions` positions, or of one sample that alone has more.

        Empty if there is none.
        """
        if self._again:
            self._last = self._again.pop()
            return self._last
        used = [number for number, entry in self._entries.items() if entry.uses]
        self._random.shuffle(used)
        fresh = self._fresh()
        overloaded, self._unseen_lost_before = (
            self._unseen_lost > self._unseen_lost_before,
            self._unseen_lost,
        )
        room = max_positions
        room_for_used = (
            0 if overloaded else max_positions - int(max_positions * self.config.fresh_fraction)
        )
        batch: dict[int, None] = {}
        # The share of fresh ones, then used ones, then whatever fits.
        for numbers, until in ((fresh, room_for_used if used else 0), (used, 0), (fresh, 0)):
            for number in numbers:
                size = _positions(self._entries[number].sample)
                if number not in batch and (room - size >= until or not batch):
                    batch[number] = None
                    room -= size
                if room <= until:
                    break
        self._last = [self._entries[number].sample for number in batch]
        for number in batch:
            entry = self._entries[number]
            entry.uses += 1
            if entry.uses >= self.config.max_uses:
                self._drop(number, "used_up")
        return list(self._last)

    def failed(self) -> None:
        """The last batch could not be trained on: one half comes next, then the other.

        A sample that is alone goes.
        """
        batch, self._last = self._last, []
        if len(batch) > 1:
            half = len(batch) // 2
            self._again += [batch[half:], batch[:half]]
        for sample in batch if len(batch) == 1 else ():
            number = next((n for n, entry in self._entries.items() if entry.sample is sample), None)
            # else it has left, and is counted by why
            if number is not None:
                self._forget(number)
                self.dropped["failed"] += 1

    def stats(self) -> dict[str, float]:
        """Numbers for metrics; ages in seconds behind the newest sample of the same server."""
        newest_ns = {entry.sample.session: entry.sample.time_ns for entry in self._entries.values()}
        ages = [
            max(0, newest_ns[entry.sample.session] - entry.sample.time_ns) / 1e9
            for entry in self._entries.values()
        ]
        return {
            "samples": len(ages),
            "fresh_samples": sum(not entry.uses for entry in self._entries.values()),
            "fresh_positions": sum(
                _positions(entry.sample) for entry in self._entries.values() if not entry.uses
            ),
            "positions": self.positions,
            "bytes": self.nbytes,
            "largest_share": self._held[self._largest()].nbytes / self.nbytes
            if self._held
            else 0.0,
            "age_mean_s": sum(ages) / len(ages) if ages else 0.0,
            "age_max_s": max(ages, default=0.0),
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able.

        The samples are not in it: they are counted `lost` by restore().
        """
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

    def _owner(self, sample: Sample) -> Owner:
        domain = sample.domain if "domain" in self.config.share_by else ""
        server = sample.session if "server" in self.config.share_by else ""
        return owner_of(domain, server, self._held)

    def _drop_stale(self, newest: Sample, owner: Owner) -> None:
        """Drop what is too old, of this server only.

        Its time is that of the sample that came last: a clock may be put right.
        """
        oldest_ns = newest.time_ns - int(self.config.max_age_s * 1e9)
        for (_, server), held in list(self._held.items()):
            for number, entry in list(held.entries.items()) if server == owner[1] else ():
                if entry.sample.session == newest.session:
                    if entry.sample.time_ns >= oldest_ns:
                        break
                    self._drop(number, "stale")

    def _largest(self) -> Owner:
        """The largest server of the largest domain, in bytes."""
        of_domain: Counter[str] = Counter()
        for (domain, _), held in self._held.items():
            of_domain[domain] += held.nbytes
        return max(
            self._held, key=lambda owner: (of_domain[owner[0]], owner[0], self._held[owner].nbytes)
        )

    def _fresh(self) -> list[int]:
        """Never-used samples, the newest first, and each from whoever has fewest positions in the
        batch until then.
        """
        newest_first = reversed(self._entries.items())
        waiting: dict[Owner, list[int]] = {}
        for number, entry in newest_first:
            if not entry.uses:
                waiting.setdefault(entry.owner, []).append(number)
        if len(waiting) == 1:
            return next(iter(waiting.values()))
        at = {owner: iter(numbers) for owner, numbers in waiting.items()}
        following = {owner: next(numbers) for owner, numbers in at.items()}
        of_domain: Counter[str] = Counter()
        of_owner: Counter[Owner] = Counter()
        order: list[int] = []
        while following:
            owner = min(following, key=lambda s: (of_domain[s[0]], of_owner[s], -following[s]))
            number = following[owner]
            order.append(number)
            size = _positions(self._entries[number].sample)
            of_domain[owner[0]] += size
            of_owner[owner] += size
            if (following_number := next(at[owner], None)) is None:
                del following[owner]
            else:
                following[owner] = following_number
        return order

    def _drop(self, number: int, cause: str) -> None:
        if not self._entries[number].uses:
            self._unseen_lost += 1
        self._forget(number)
        self.dropped[cause] += 1

    def _forget(self, number: int) -> None:
        entry = self._entries.pop(number)
        held = self._held[entry.owner]
        del held.entries[number]
        held.nbytes -= entry.sample.nbytes
        if not held.entries:
            del self._held[entry.owner]
        self.nbytes -= entry.sample.nbytes
        self.positions -= _positions(entry.sample)


def _positions(sample: Sample) -> int:
    return len(sample.features)
