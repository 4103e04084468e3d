"""CONTRACT 1, the wire: what a server publishes to a trainer over ZeroMQ (PUSH -> PULL).

One multipart message per scheduler step: part 0 is the header (msgpack), the others are raw frames,
C order, little endian, as the header's `frames` names them (frames.py). No pickle. Delivery is at
most once: a message may be dropped (and is counted by cause in every later header), never altered,
and messages of one session arrive in order. Whatever decodes can be assembled, packed and trained
on: what a whole message must be is checked here, what each request's row of it must be in rows.py.

    captured = sent + sum(dropped) + queued          (messages, checked when the publisher is quiet)
    sent     = received + lost                       (the trainer's side of the same ledger)

Kinds
    prefill    a chunk of prompt (or re-prefilled) tokens and the features that the target computed
               for them
    verify     one verify step: draft trees, what was accepted, the distribution that judged every
               node
    end        requests that gave back their KV rows: finished, aborted or retracted
    heartbeat  counters only, sent when nothing else was for a while

Dimensions: B requests, T packed feature rows, N tree nodes, S draft steps, K kept target logits, F
width of the features: H for each layer that the draft reads.

This module imports neither torch nor sglang, so that both sides can read it cheaply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
from aurora_kernels.limits import MAX_KEPT, MAX_NODES

from aurora_sglang_plugin.link.frames import (
    DTYPES,
    FEATURES,
    FRAMES,
    MAX_FEATURES,
    MAX_LAYERS,
    MAX_STEPS,
    SCALES,
    frames_of,
)
from aurora_sglang_plugin.link.rows import DOMAIN as DOMAIN
from aurora_sglang_plugin.link.rows import bad_rows
from aurora_sglang_plugin.link.schemas import FLOAT8_SCHEMA, SCHEMAS, refusal
from aurora_sglang_plugin.link.schemas import SCHEMA_VERSION as SCHEMA_VERSION

# a header of MAX_REQUESTS, each with the longest id, label and reason, is smaller
MAX_HEADER_BYTES = 2 << 20
# Of one step: SGLang runs fewer at a time, 4,096 only where nothing else bounds them.
MAX_REQUESTS = 4096
MAX_FRAMES = 32
# Characters of a session's or a cause's name, and of the target's fingerprint.
MAX_NAME = 64
# Causes of drops that a publisher may name.
MAX_CAUSES = 32

# Per-request flags of a verify message.
# A grammar's mask or a watermark judged this row: its distribution is nothing to learn from.
FLAG_ALTERED_DISTRIBUTION = 1

Kind = Literal["prefill", "verify", "end", "heartbeat"]
EndReason = Literal["stop", "length", "abort", "retract"]


class Frame(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One raw frame, e.g. Frame("positions", "int32", (8,))."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        # Python integers: nothing to overflow
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)


class Header(msgspec.Struct, omit_defaults=True):
    """Part 0 of every message. Counters are cumulative for the session."""

    schema: int
    kind: Kind
    # one publisher's life, random; a restarted server has a new one
    session: str
    # messages captured up to and including this one (heartbeats are not captured)
    captured_seq: int
    # messages sent up to and including this one (heartbeats included)
    sent_seq: int
    # heartbeats sent up to and including this one: sent = sent_seq - heartbeats
    heartbeats: int
    # messages dropped so far, by cause
    dropped: dict[str, int]
    # messages still queued behind this one
    queued: int
    # fingerprint of the target (manifest.target_fingerprint)
    target: str
    # version that drafted these trees
    draft_version: int
    # version that wrote the draft KV of this message's features
    extend_version: int
    # wall clock at capture
    time_ns: int
    # B request ids
    requests: list[str] = []
    # B bit sets (verify)
    flags: list[int] = []
    # B (end)
    reasons: list[EndReason] = []
    # B labels, "" for a request without one (prefill, end); empty if none has one
    domains: list[str] = []
    num_steps: int = 0
    topk: int = 0
    # drafted tokens are draws from the draft, judged by rejection sampling
    rejection: bool = False
    frames: list[Frame] = []


class WireError(ValueError):
    """A message that must not be used. `cause` is a short constant for counters.

    `header` is the message's, if that is sound: whose message it was, where it stands in its
    session, what is missing.
    """

    def __init__(self, cause: str, detail: str):
        super().__init__(f"{cause}: {detail}")
        self.cause = cause
        self.header: Header | None = None


class Message(msgspec.Struct):
    """A decoded message: the header and its arrays (views of the received frames).

    `bad` {row: cause} are the requests whose row must not be used, by the causes of rows.py.
    """

    header: Header
    arrays: dict[str, np.ndarray]
    bad: dict[int, str] = {}

    def dtype(self, name: str) -> str:
        return next(f.dtype for f in self.header.frames if f.name == name)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Header)


def encode(header: Header, arrays: dict[str, tuple[str, np.ndarray]]) -> list[bytes | memoryview]:
    """Parts to send.

    `arrays` maps frame name to (wire dtype, C-contiguous array); frames are not copied.
    """
    header.frames = []
    if SCALES in arrays:
        header.schema = FLOAT8_SCHEMA
    views: list[bytes | memoryview] = []
    for name, (dtype, array) in arrays.items():
        assert array.dtype == DTYPES[dtype], (name, dtype, array.dtype)
        header.frames.append(Frame(name, dtype, array.shape))
        # TypeError if it is not contiguous
        views.append(array.data.cast("B") if array.size else b"")
    return [_encoder.encode(header), *views]


def decode(parts: Sequence[bytes | memoryview], *, max_bytes: int) -> Message:
    """Check and view a received message; nothing is allocated before it is checked, or copied.

    Raises WireError with cause one of: header, schema, frames, dtype, shape, size, values; a
    request whose row alone is at fault is in the message's `bad`.
    """
    if not parts or len(parts) > MAX_FRAMES + 1:
        raise WireError("header", f"{len(parts)} parts")
    header = read_header(parts[0])
    try:
        return _decode(header, parts, max_bytes)
    except WireError as error:
        error.header = header
        raise


def read_header(part: bytes | memoryview) -> Header:
    """Part 0 of a message, if it can be believed.

    Raises WireError with cause one of: header, schema, values.
    """
    if len(part) > MAX_HEADER_BYTES:
        raise WireError("header", f"header of {len(part)} bytes, at most {MAX_HEADER_BYTES}")
    try:
        header, problem = _decoder.decode(part), ""
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        header, problem = None, str(error)
    if header is None or header.schema not in SCHEMAS:
        refused = refusal(part)
        raise WireError("schema" if refused else "header", refused or problem)
    if not 0 < len(header.session) <= MAX_NAME or any(
        len(n) > MAX_NAME for n in (header.target, *header.dropped)
    ):
        raise WireError(
            "header",
            f"session, target or cause of an unexpected length, expected at most {MAX_NAME}",
        )
    if len(header.dropped) > MAX_CAUSES:
        raise WireError("header", f"{len(header.dropped)} causes of drops, at most {MAX_CAUSES}")
    if len(header.requests) > MAX_REQUESTS:
        raise WireError("values", f"{len(header.requests)} requests, at most {MAX_REQUESTS}")
    counters = (header.captured_seq, header.heartbeats, header.queued, *header.dropped.values())
    if header.sent_seq < 1 or min(counters) < 0 or max(header.sent_seq, *counters) >= 1 << 53:
        raise WireError("values", "counters out of bounds")
    # what send_queue.py keeps to: only a heartbeat counts what is queued behind it
    most = header.sent_seq - header.heartbeats + sum(header.dropped.values())
    most += header.queued if header.kind == "heartbeat" else 0
    if header.heartbeats > header.sent_seq or header.captured_seq > most:
        raise WireError("values", f"captured {header.captured_seq}, of which it tells {most}")
    if not (0 <= header.draft_version < 1 << 31 and 0 <= header.extend_version < 1 << 31):
        raise WireError("values", "version out of bounds")
    if not 0 <= header.time_ns < 1 << 63:
        raise WireError("values", "time out of bounds")
    return header


def missing(header: Header) -> list[bytes | memoryview]:
    """Parts of a message that stands in for one that was refused: all its requests, each with a bad
    row.

    Their samples end there and nobody else's do, in a recording as well.
    """
    none, nothing = np.zeros(len(header.requests), np.int32), np.zeros(0, np.int32)
    arrays = {name: ("int32", none) for name in list(FRAMES["prefill"])[:4]}
    arrays |= {"input_ids": ("int32", nothing), "next_tokens": ("int32", none)}
    arrays[FEATURES] = "float32", np.zeros((0, 1), np.float32)
    rest = {"flags": [], "reasons": [], "domains": [], "num_steps": 0, "topk": 0}
    rest |= {"kind": "prefill", "schema": SCHEMA_VERSION}
    return encode(msgspec.structs.replace(header, **rest), arrays)


def _decode(header: Header, parts: Sequence[bytes | memoryview], max_bytes: int) -> Message:
    if sum(map(len, parts)) > max_bytes:
        raise WireError("size", f"{sum(map(len, parts))} bytes, at most {max_bytes}")
    spec = frames_of(header.schema, header.kind)
    if [f.name for f in header.frames] != list(spec) or len(parts) != len(spec) + 1:
        raise WireError(
            "frames", f"{header.kind} has {[f.name for f in header.frames]}, expected {list(spec)}"
        )
    sizes = {"B": len(header.requests)}
    arrays = {}
    for frame, part in zip(header.frames, parts[1:]):
        allowed, shape = spec[frame.name]
        if frame.dtype not in allowed:
            raise WireError("dtype", f"{frame.name} is {frame.dtype}, expected one of {allowed}")
        if len(frame.shape) != len(shape) or any(
            not 0 <= n < 1 << 31 or sizes.setdefault(letter, n) != n
            for letter, n in zip(shape, frame.shape)
        ):
            raise WireError(
                "shape", f"{frame.name} is {frame.shape}, expected {shape} with {sizes}"
            )
        if len(part) != frame.nbytes:
            raise WireError(
                "size", f"{frame.name} has {len(part)} bytes, {frame.shape} needs {frame.nbytes}"
            )
        arrays[frame.name] = np.frombuffer(part, DTYPES[frame.dtype]).reshape(frame.shape)
    _check_structure(header, arrays, sizes)
    dtypes = {frame.name: frame.dtype for frame in header.frames}
    bad = bad_rows(header.kind, header.num_steps, header.requests, header.domains, arrays, dtypes)
    return Message(header, arrays, bad)


def _check_structure(header: Header, a: dict[str, np.ndarray], sizes: dict[str, int]) -> None:
    """What no row could be read without, or what concerns all rows alike."""
    b = sizes["B"]
    if header.domains and len(header.domains) != b:
        raise WireError("values", f"{len(header.domains)} domains for {b} requests")
    if header.kind == "end" and len(header.reasons) != b:
        raise WireError("values", f"{len(header.reasons)} reasons for {b} requests")
    for frame, lens in (("input_ids", "extend_lens"), (FEATURES, "feature_lens")):
        if frame in a and (
            (a[lens] < 0).any() or int(a[lens].sum(dtype=np.int64)) != len(a[frame])
        ):
            raise WireError(
                "values", f"{lens} do not add up to the {len(a[frame])} rows of {frame}"
            )
    if "F" in sizes and not 1 <= sizes["F"] <= MAX_FEATURES:
        raise WireError("values", f"features of width {sizes['F']}, expected 1 to {MAX_FEATURES}")
    if "A" in sizes and (not 1 <= sizes["A"] <= MAX_LAYERS or sizes["F"] % sizes["A"]):
        raise WireError("values", f"{sizes['A']} scales for features of width {sizes['F']}")
    if header.kind == "verify":
        n, p, k, s = sizes["N"], sizes["P"], sizes["K"], header.num_steps
        # a round may have had fewer steps than the server's most, or none
        if not (
            1 <= s <= MAX_STEPS
            and 1 <= p <= min(s + 1, n)
            and n <= MAX_NODES
            and 1 <= k <= MAX_KEPT
        ):
            raise WireError(
                "values", f"trees of {n} nodes in {s} steps, paths of {p}, {k} kept logits"
            )
        k = header.topk
        if 1 < k < MAX_NODES and n > 1 + k + (s - 1) * k * k:
            raise WireError("values", f"trees of {n} nodes from {k} a step in {s} steps")
        if not 1 <= header.topk <= MAX_NODES or len(header.flags) != b:
            raise WireError(
                "values", f"topk {header.topk}, {len(header.flags)} flags for {b} requests"
            )
