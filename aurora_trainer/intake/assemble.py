"""Assemble messages into samples: stitch each request's steps by absolute position, cut where it
ended.

The server keeps no state per request, so this does: (session, request id) -> the open Segment.
Rules, in order:

    a message of the session is missing     every open segment of that session ends before its next
                                            step
                                          (`gap`): the missing one may have ended the request and
                                          begun another with the same id
    a row that cannot be used             the segment of that request ends (`gap`), counted by
                                          cause, and no other
    a step goes on at segment.next        it extends the segment: chunks, verify steps, plain tokens
                                          of mixed chunks
    a verify step's root lies before it   fewer tokens were committed than accepted: cut back to the
                                          root, go on there
    any other position                    the segment ends (`gap`), a new attempt starts at the
                                          step's first feature
    end                                   cut at the committed length (accepted paths run past EOS,
                                          stop, max_tokens)
    a verify step after `end`             ignored: an overlapped server verifies a finished request
                                          once more

A segment that begins at a verify's root loses that one tree, which has no position to hang from.
One that begins behind a cached prefix gets what an earlier request knows of it (prefixes.py).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from aurora_sglang_plugin.config import Section
from aurora_sglang_plugin.link import wire
from aurora_trainer.intake.features import features_of
from aurora_trainer.intake.gaps import Gaps
from aurora_trainer.intake.prefixes import Prefixes
from aurora_trainer.intake.request import Quarantine, Segment, Step, Tree, to_sample
from aurora_trainer.intake.sample import RequestKey, Sample

# request ids that are remembered after they ended
MAX_PAST = 1 << 16


class AssembleConfig(Section):
    """The bounds of what is open, and when a long request's sample is taken."""

    # of all open segments; the least recently extended one is taken early
    max_bytes: PositiveInt = 1 << 30
    # segments
    max_open: PositiveInt = 4096
    # prompt features kept of one segment, the last ones
    max_positions: PositiveInt = 8192
    # generated positions after which a part of a long request is taken
    part_positions: Annotated[int, Field(ge=2)] = 512
    # positions before a sample's own, as context only: those of a long request's last part, or of a
    # prefix that the server had cached and an earlier request computed
    context_positions: NonNegativeInt = 512
    # features of earlier requests that are kept for that: a user may take a minute for the next
    # turn
    prefix_bytes: PositiveInt = 2 << 30
    # after which a request whose `end` was lost is taken
    idle_s: Annotated[float, Field(gt=0)] = 60.0
    # where to cut if `end` was lost
    eos_token_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class _Past:
    attempts: int = 0
    prompt_len: int = 0
    # the session's gap_count when it ended, -1 while it is open
    ended_at: int = -1
    domain: str = ""


class Assembler:
    """Messages in, samples out. Deterministic: time passes only through idle()."""

    def __init__(self, config: AssembleConfig):
        self.config = config
        self.counters: Counter[str] = Counter()
        # by the causes of rows.py
        self.bad_rows: Counter[str] = Counter()
        # least recently extended first
        self._open: OrderedDict[RequestKey, Segment] = OrderedDict()
        self._past: OrderedDict[RequestKey, _Past] = OrderedDict()
        self._gaps = Gaps(self.counters)
        self.prefixes = Prefixes(config.prefix_bytes, config.context_positions)
        # of each session with open segments: [segments, bytes]
        self._held: dict[str, list[int]] = {}
        self._nbytes = 0
        self._now_s: float | None = None
        self._done: list[Sample] = []

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def open_requests(self) -> int:
        return len(self._open)

    def add(self, message: wire.Message) -> list[Sample]:
        """Take one message of wire.decode; returns the samples that it completes."""
        header = message.header
        if header.kind == "heartbeat":
            return []
        gap_count = self._gaps.count(header)
        if gap_count is None:
            self.counters["duplicate"] += 1
            return []
        {"prefill": self._prefill, "verify": self._verify, "end": self._end}[header.kind](
            message, gap_count
        )
        while self._open and (
            len(self._open) > self.config.max_open or self._nbytes > self.config.max_bytes
        ):
            self.counters["evicted"] += 1
            self._close(self._to_evict(by=int(len(self._open) <= self.config.max_open)), "gap")
        return self._take()

    def idle(self, now_s: float) -> list[Sample]:
        """Tell the time (any clock); returns the samples of requests that were silent for
        `idle_s`.
        """
        # what came before the first call was silent since then at most
        if self._now_s is None:
            for segment in self._open.values():
                segment.touched_s = now_s
        self._now_s = now_s
        for key, segment in list(self._open.items()):
            if now_s - segment.touched_s < self.config.idle_s:
                break
            self._close(key, "idle")
        return self._take()

    # ---- one method per kind

    def _prefill(self, message: wire.Message, gap_count: int) -> None:
        header, a = message.header, message.arrays
        dtype, hidden = features_of(message)
        token = feature = 0
        for row, request in enumerate(header.requests):
            length, count = int(a["extend_lens"][row]), int(a["feature_lens"][row])
            token, feature = token + length, feature + count
            key, prompt_len = (header.session, request), int(a["prompt_lens"][row])
            if self._is_bad(message, row, key):
                continue
            ids = np.append(a["input_ids"][token - length : token], a["next_tokens"][row])
            known = ids[length - count :]
            features = hidden[feature - count : feature].copy()
            # of the chunk's features
            first = int(a["positions"][row]) + length - count
            segment = self._following(key, first, int(known[0]), gap_count, dtype, hidden.shape[1])
            if segment is None or segment.prompt_len != prompt_len or not count:
                self._close(key, "gap")
                self._remember(key).domain = header.domains[row] if header.domains else ""
                prefix = ids[: length - count + 1]
                before = self.prefixes.before(first, prefix, dtype, hidden.shape[1])
                start = before.position if before else first
                token_there = int(prefix[start - first - 1])
                segment = self._begin(key, start, token_there, gap_count, dtype, prompt_len)
                if before:
                    segment.carried = len(before.tokens)
                    self._extend(key, segment, before, header)
            if count:
                versions = np.full(count, header.extend_version, np.int32)
                self._extend(key, segment, Step(first, known[1:], features, versions), header)

    def _verify(self, message: wire.Message, gap_count: int) -> None:
        header, a = message.header, message.arrays
        dtype, hidden = features_of(message)
        shape = (
            header.num_steps, header.topk, message.dtype("topk_logits"),
            a["topk_ids"].shape[2], header.rejection,
        )  # fmt: skip
        lens, path = a["feature_lens"], a["accept_path"]
        on_path = np.arange(path.shape[1]) < lens[:, None]
        ends = lens.cumsum(dtype=np.int64)
        for row, request in enumerate(header.requests):
            key, root = (header.session, request), int(a["positions"][row])
            count, end = int(lens[row]), int(ends[row])
            if self._is_bad(message, row, key):
                continue
            past = self._past.get(key)
            if past is not None and past.ended_at == gap_count and key not in self._open:
                self.counters["after_end"] += 1
                continue
            segment = self._following(
                key, root, int(a["draft_tokens"][row, 0]), gap_count, dtype, hidden.shape[1]
            )
            # a root in the prompt is none: such a segment would never be taken in parts
            if segment is None or segment.shape not in (None, shape) or root < segment.prompt_len:
                self._close(key, "gap")
                prompt_len = min(past.prompt_len, root) if past and past.prompt_len else root
                segment = self._begin(
                    key, root, int(a["draft_tokens"][row, 0]), gap_count, dtype, prompt_len
                )
            if segment.start == root:
                self.counters["rootless_trees"] += 1
            segment.shape = shape
            tree = Tree(
                tokens=a["draft_tokens"][row].copy(),
                parents=a["parents"][row].copy(),
                path=np.where(on_path[row], path[row], -1),
                topk_ids=a["topk_ids"][row].copy(),
                topk_logits=a["topk_logits"][row].copy(),
                logsumexp=a["logsumexp"][row].copy(),
                version=header.draft_version,
                altered=bool(header.flags[row] & wire.FLAG_ALTERED_DISTRIBUTION),
            )
            versions = np.full(count, header.extend_version, np.int32)
            step = Step(
                root,
                a["next_tokens"][row, :count].copy(),
                hidden[end - count : end].copy(),
                versions,
                tree,
            )
            self._extend(key, segment, step, header)

    def _end(self, message: wire.Message, gap_count: int) -> None:
        header = message.header
        for row, request in enumerate(header.requests):
            key = (header.session, request)
            if self._is_bad(message, row, key):
                continue
            segment = self._open.get(key)
            if segment is not None:
                segment.time_ns = header.time_ns
                segment.domain = header.domains[row] if header.domains else segment.domain
                certain = segment.gap_count == gap_count
                last = int(message.arrays["committed_lens"][row]) - 1
                self._close(key, header.reasons[row] if certain else "gap", last)
            self._remember(key).ended_at = gap_count

    # ---- segments

    def _is_bad(self, message: wire.Message, row: int, key: RequestKey) -> bool:
        """Whether the row must not be used; then its request's segment ends here."""
        cause = message.bad.get(row)
        if cause is None:
            return False
        self.bad_rows[cause] += 1
        self._close(key, "gap")
        return True

    def _to_evict(self, by: int) -> RequestKey:
        """The least recently extended segment of the session that has most: a flood takes from
        nobody else.

        by: 0, most segments; 1, most bytes.
        """
        largest = max(self._held, key=lambda session: self._held[session][by])
        return next(key for key in self._open if key[0] == largest)

    def _hold(self, key: RequestKey, segments: int, nbytes: int) -> None:
        """So many more are open, or fewer."""
        held = self._held.setdefault(key[0], [0, 0])
        held[0] += segments
        held[1] += nbytes
        self._nbytes += nbytes
        if not held[0]:
            del self._held[key[0]]

    def _following(
        self, key: RequestKey, position: int, token: int, gap_count: int, dtype: str, width: int
    ) -> Segment | None:
        """The open segment that goes on with `token` at `position`, cut back to there if need
        be.
        """
        segment = self._open.get(key)
        if segment is None or segment.gap_count != gap_count or segment.dtype != dtype:
            return None
        if segment.steps and segment.steps[0].features.shape[1] != width:
            return None
        if segment.start < position < segment.next and position >= segment.prompt_len:
            before = segment.nbytes
            segment.cut(position)
            self._hold(key, 0, segment.nbytes - before)
            self.counters["cut_back"] += 1
        return segment if (segment.next, segment.last_token) == (position, token) else None

    def _begin(
        self, key: RequestKey, start: int, token: int, gap_count: int, dtype: str, prompt_len: int
    ) -> Segment:
        past = self._remember(key)
        past.prompt_len, past.ended_at = prompt_len, -1
        about: dict[str, Any] = {"dtype": dtype, "domain": past.domain}
        segment = Segment(
            key[1], key[0], past.attempts, start, prompt_len, token, gap_count, **about
        )
        self._open[key] = segment
        self._hold(key, 1, 0)
        return segment

    def _extend(self, key: RequestKey, segment: Segment, step: Step, header: wire.Header) -> None:
        before = segment.nbytes
        segment.extend(step)
        segment.time_ns, segment.touched_s = header.time_ns, self._now_s or 0.0
        if step.tree is None:
            self.counters["trimmed"] += segment.trim(self.config.max_positions)
        self._hold(key, 0, segment.nbytes - before)
        self._open.move_to_end(key)
        if (
            segment.next - max(segment.start + segment.carried, segment.prompt_len)
            >= self.config.part_positions
        ):
            after = segment.tail(self.config.context_positions)
            # the last position has no target yet and goes on
            self._close(key, "part", segment.next - 1)
            self._open[key] = after
            self._hold(key, 1, after.nbytes)

    def _close(self, key: RequestKey, reason: str, end: int | None = None) -> None:
        segment = self._open.pop(key, None)
        if segment is None:
            return
        self._hold(key, -1, -segment.nbytes)
        self._remember(key).attempts = segment.attempt + 1
        eos = self.config.eos_token_ids if reason in ("gap", "idle") else ()
        try:
            sample = to_sample(segment, segment.next if end is None else end, reason, eos)
        except Quarantine as error:
            self.counters[f"dropped_{error.cause}"] += 1
            return
        self.counters[f"samples_{reason}"] += 1
        self.counters["positions"] += len(sample.features)
        self.counters["trees"] += len(sample.tree_first)
        self.counters["nodes"] += len(sample.node_token)
        self.prefixes.put(sample)
        self._done.append(sample)

    def _remember(self, key: RequestKey) -> _Past:
        past = self._past.setdefault(key, _Past())
        self._past.move_to_end(key)
        if len(self._past) > MAX_PAST:
            self._past.popitem(last=False)
        return past

    def _take(self) -> list[Sample]:
        done, self._done = self._done, []
        return done
