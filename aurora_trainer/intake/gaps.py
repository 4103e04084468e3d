"""Which messages of a session are missing: what was open when one was lost cannot go on."""

from __future__ import annotations

from collections import Counter, OrderedDict

from aurora_sglang_plugin.link import wire

# that are remembered; the one that was silent for longest goes first
MAX_SESSIONS = 1 << 14


class Gaps:
    """Counts the gaps of each session's captured_seq; also `messages` and `holes` in `counters`."""

    def __init__(self, counters: Counter[str]):
        self._counters = counters
        # by session: [last captured_seq, gaps]
        self._sessions: OrderedDict[str, list[int]] = OrderedDict()
        # Gaps of a session begin here: above all that one had that was forgotten, so that nothing
        # is stitched to it.
        self._first = 0

    def count(self, header: wire.Header) -> int | None:
        """The gaps in this session so far; None for a message that repeats or precedes one."""
        state = self._sessions.setdefault(header.session, [header.captured_seq - 1, self._first])
        self._sessions.move_to_end(header.session)
        if len(self._sessions) > MAX_SESSIONS:
            _, (_, gaps) = self._sessions.popitem(last=False)
            self._first = max(self._first, gaps + 1)
        if header.captured_seq <= state[0]:
            return None
        if header.captured_seq != state[0] + 1:
            state[1] += 1
            self._counters["holes"] += 1
        state[0] = header.captured_seq
        self._counters["messages"] += 1
        return state[1]
