"""What becomes of a socket's connections, told by libzmq's monitor: refused handshakes, by cause.

    key          CURVE worked and the key is not on the trainer's allow-list
    protocol     another mechanism than ours (plaintext against CURVE), or made for another
                 trainer's key
    unfinished   went away in the middle, or was cut off after HANDSHAKE_S
    garbage      bytes that are no handshake at all

libzmq's monitor must be read: bounded, it blocks the I/O thread that carries the messages;
unbounded, it grows. Here it is unbounded and switched off for PAUSE_S when a reader finds more than
EVENTS_PER_TURN at once. Everything in this file belongs to the thread that owns the socket.
"""

from __future__ import annotations

import itertools
import struct
import time
from collections import Counter
from collections.abc import Iterator

import zmq

# for a whole handshake, after which libzmq closes the connection
HANDSHAKE_S = 5.0
EVENTS_PER_TURN = 1000
PAUSE_S = 1.0
REFUSALS: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "key",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "protocol",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "unfinished",
}
_FAILED = sum(REFUSALS)
_HERE = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | _FAILED
_THERE = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | _FAILED
)
_names = itertools.count()


class Monitor:
    """Reads a socket's events.

    Open it before the socket binds or connects; close it before the socket.
    """

    def __init__(self, socket: zmq.Socket, events: int):
        self._socket, self._events = socket, events
        self._resume_at = 0.0
        self.pauses = 0
        self.reader: zmq.Socket | None = None
        self._open()

    def read(self) -> Iterator[int]:
        """The events since the last call, as libzmq numbers them."""
        if self.reader is None:
            if time.monotonic() < self._resume_at:
                return
            self._open()
        for _ in range(EVENTS_PER_TURN):
            try:
                event, _ = self.reader.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield struct.unpack("=H", event[:2])[0]
        self.close()
        self.pauses += 1
        self._resume_at = time.monotonic() + PAUSE_S

    def close(self) -> None:
        if self.reader is not None:
            if not self._socket.closed:
                # first: without a reader it would block libzmq's I/O thread
                self._socket.disable_monitor()
            self.reader.close(linger=0)
            self.reader = None

    def _open(self) -> None:
        address = f"inproc://aurora-monitor-{next(_names)}"
        self._socket.monitor(address, self._events)
        self.reader = self._socket.context.socket(zmq.PAIR)
        self.reader.rcvhwm = 0
        self.reader.connect(address)


class Accepted:
    """The side that binds.

    `refused` only grows; `garbage` follows within two to three times HANDSHAKE_S.
    """

    def __init__(self, socket: zmq.Socket):
        self.monitor = Monitor(socket, _HERE)
        self.refused: Counter[str] = Counter()
        self._accepted = self._settled = 0
        # when, and how many had been accepted by then
        self._mark = (time.monotonic(), 0)

    def turn(self) -> None:
        pauses = self.monitor.pauses
        for event in self.monitor.read():
            if event == zmq.EVENT_ACCEPTED:
                self._accepted += 1
            else:
                self._settled += 1
                if event in REFUSALS:
                    self.refused[REFUSALS[event]] += 1
        # what follows was not seen: begin again
        if self.monitor.pauses != pauses:
            self._accepted = self._settled = 0
            self._mark = (time.monotonic(), 0)
        since, accepted = self._mark
        if time.monotonic() - since > 2 * HANDSHAKE_S:
            # libzmq tells nothing about bytes that are no handshake. By now every connection up to
            # the mark has either settled or was such a one; what settled since then can only make
            # this too few.
            garbage = max(0, accepted - self._settled)
            if garbage:
                self.refused["garbage"] += garbage
                self._settled += garbage
            self._mark = (time.monotonic(), self._accepted)


class Connected:
    """The side that connects, to one peer.

    `stuck` is when libzmq gave the peer up without trying again, as it does
    after a refused key and after bytes that are no handshake; else None."""

    def __init__(self, socket: zmq.Socket, refused: Counter[str]):
        self.monitor = Monitor(socket, _THERE)
        # its owner's: it outlives the socket
        self.refused = refused
        self.stuck: float | None = None
        self._shaking = False

    def turn(self) -> None:
        for event in self.monitor.read():
            if event in REFUSALS:
                self.refused[REFUSALS[event]] += 1
            elif event == zmq.EVENT_DISCONNECTED:
                if self._shaking:
                    self.refused["garbage"] += 1
                self.stuck = time.monotonic()
            if event in (zmq.EVENT_CONNECTED, zmq.EVENT_CONNECT_RETRIED):
                self.stuck = None
            self._shaking = event == zmq.EVENT_CONNECTED
