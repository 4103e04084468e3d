"""Replay a recording: at the pace at which it was recorded, or into a live trainer over the link.

Training from a recording is the daemon's (`Daemon.run_recording`). `push` stands in for the servers
that were recorded: same messages in the same order, with a session of their own, so that no
trainer takes them for repetitions, and with the time at which they are sent. Unlike a server it
waits for the trainer instead of dropping.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import zmq

from aurora_sglang_plugin.config import LinkConfig
from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.link.keys import load_server_keys
from aurora_sglang_plugin.link.publisher import SEND_QUEUE_MESSAGES
from aurora_trainer.recordings.recording import CorruptionLog, read_messages
from aurora_trainer.recordings.trace import Record

log = logging.getLogger(__name__)

# at most at a time, so that stopping is noticed
SLEEP_S = 0.1
# Clocks that differ by less are one; what a server's clock jumps by more was the clock, not the
# time.
TRUST_S = 60.0
# for the last messages to leave
LINGER_S = 30.0
# for the trainer to read them: what a closed connection still holds is lost to one that is busy
SETTLE_S = 1.0

Messages = Iterator[tuple[Record, wire.Message]]


def on_one_clock(messages: Messages) -> Messages:
    """The same messages with times of one clock, whatever the clocks of their servers say: an hour
    ahead, or set right in between. Where they agree, times stay as they are."""
    trust_ns, now_ns = int(TRUST_S * 1e9), None
    # of each session's clock
    behind_ns: dict[str, int] = {}
    for record, message in messages:
        header = message.header
        new = header.session not in behind_ns
        time_ns = header.time_ns + behind_ns.setdefault(header.session, 0)
        now_ns = time_ns if now_ns is None else now_ns
        # What was captured long ago may have waited for its trainer; a heartbeat is sent as soon as
        # it is made.
        if time_ns > now_ns + trust_ns or (
            time_ns < now_ns - trust_ns and (new or header.kind == "heartbeat")
        ):
            behind_ns[header.session] += now_ns - time_ns
            time_ns = now_ns
        header.time_ns = max(0, time_ns)
        now_ns = max(now_ns, time_ns)
        yield record, message


def paced(
    messages: Messages, stopping: Callable[[], bool], meanwhile: Callable[[], None] = lambda: None
) -> Messages:
    """The same messages, each as long after the first one as it was captured after it. `meanwhile`
    is called now and then while nothing is due."""
    first_ns, began_s = None, 0.0
    for record, message in messages:
        if first_ns is None:
            first_ns, began_s = message.header.time_ns, time.monotonic()
        due_s = began_s + (message.header.time_ns - first_ns) / 1e9
        while (left_s := due_s - time.monotonic()) > 0 and not stopping():
            time.sleep(min(left_s, SLEEP_S))
            meanwhile()
        yield record, message


def push(
    path: Path,
    link: LinkConfig,
    *,
    original_pace: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> Counter[str]:
    """Send a recording to the trainer at link.endpoint; returns counts of messages, bytes and
    damaged records.

    Waits for a trainer that is not there yet, until `stopping`. With keys it is the server of
    link.server_keys. Raises ValueError for a bad endpoint, recording or key.
    """
    damage = CorruptionLog()
    counts: Counter[str] = Counter()
    sessions: dict[str, str] = {}
    messages = on_one_clock(read_messages(path, damage))
    if original_pace:
        messages = paced(messages, stopping)
    with zmq.Context() as context, _connect(context, link) as socket:
        for _, message in messages:
            header = message.header
            header.session = sessions.setdefault(header.session, secrets.token_hex(8))
            header.time_ns = time.time_ns()
            parts = wire.encode(
                header, {f.name: (f.dtype, message.arrays[f.name]) for f in header.frames}
            )
            while not socket.poll(int(SLEEP_S * 1000), zmq.POLLOUT):
                if stopping():
                    break
            else:
                socket.send_multipart(parts)
                counts["messages"] += 1
                counts["bytes"] += sum(map(len, parts))
            if stopping():
                break
        if not stopping():
            time.sleep(SETTLE_S)
        socket.close(linger=0 if stopping() else int(LINGER_S * 1000))
    counts["damaged_records"] = damage.count
    return counts


def _connect(context: zmq.Context, link: LinkConfig) -> zmq.Socket:
    socket = context.socket(zmq.PUSH)
    socket.sndhwm, socket.immediate = SEND_QUEUE_MESSAGES, 1
    socket.ipv6 = link.endpoint.startswith("tcp://[")
    if link.server_keys is not None:
        load_server_keys(link.server_keys).encrypt(socket)
    try:
        socket.connect(link.endpoint)
    except zmq.ZMQError as error:
        socket.close()
        raise ValueError(
            f"endpoint {link.endpoint!r}: {error}; expected ipc:///PATH or tcp://127.0.0.1:PORT"
        ) from None
    return socket
