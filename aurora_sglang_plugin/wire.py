"""CONTRACT 1, the wire: what a server publishes to a trainer over ZeroMQ (PUSH -> PULL).

One multipart message per scheduler step: part 0 is the header (msgpack), the others are raw frames, C order,
little endian, as the header's `frames` names them. No pickle. Delivery is at most once: a message may be dropped
(and is counted by cause in every later header), never altered, and messages of one epoch arrive in order.

    captured = sent + sum(dropped) + queued          (messages, checked when the publisher is quiet)
    sent     = received + lost                       (the trainer's side of the same books)

Kinds
    prefill    a chunk of prompt (or re-prefilled) tokens and the features that the target computed for them
    verify     one verify step: draft trees, what was accepted, the distribution that judged every node
    end        requests that gave back their KV rows: finished, aborted or retracted
    heartbeat  counters only, sent when nothing else was for a while

Dimensions: B requests, T packed feature rows, N tree nodes, S draft steps, K kept target logits, F = aux layers x H.

This module imports neither torch nor sglang, so that both sides can read it cheaply.
"""

from __future__ import annotations

import math
import re
from typing import Literal

import msgspec
import numpy as np

SCHEMA_VERSION = 1
MAX_HEADER_BYTES = 1 << 20
MAX_FRAMES = 32
MAX_REQUEST_ID_CHARS = 1024

# dtype on the wire -> numpy dtype that carries it. bfloat16 has no numpy type and travels as its bits.
DTYPES = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int32": np.dtype("<i4"),
}

# Per-request flags of a verify message.
# A grammar's mask or a watermark judged this row: its distribution is nothing to learn from.
FLAG_ALTERED_DISTRIBUTION = 1

# A label that the client gave its request, to tell kinds of traffic apart: short and harmless wherever it is printed.
DOMAIN = re.compile(r"[A-Za-z0-9_.-]{1,32}")

Kind = Literal["prefill", "verify", "end", "heartbeat"]
EndReason = Literal["stop", "length", "abort", "retract"]

# kind -> frame name -> (allowed dtypes, shape). A letter that repeats must be the same number in a whole message.
_FLOAT = ("float32", "float16", "bfloat16")
FRAMES: dict[str, dict[str, tuple[tuple[str, ...], tuple[str | int, ...]]]] = {
    "prefill": {
        "positions": (("int32",), ("B",)),  # absolute position of the chunk's first token
        "extend_lens": (("int32",), ("B",)),  # tokens of the chunk
        "feature_lens": (("int32",), ("B",)),  # features sent, of the LAST feature_lens tokens of the chunk
        "prompt_lens": (("int32",), ("B",)),
        "input_ids": (("int32",), ("C",)),  # C = sum(extend_lens)
        "next_tokens": (("int32",), ("B",)),  # the token after the chunk: next prompt token, or the sampled one
        "aux_hidden_states": (_FLOAT, ("T", "F")),  # T = sum(feature_lens)
    },
    "verify": {
        "positions": (("int32",), ("B",)),  # absolute position of the root
        "draft_tokens": (("int32",), ("B", "N")),  # node 0 is the root, the last committed token
        "parents": (("int32",), ("B", "N")),  # -1 for the root; -2 for an unused node; parents come before children
        "accept_path": (("int32",), ("B", "P")),  # P = S + 1; node ids from the root on, -1 past accept_lens
        "feature_lens": (("int32",), ("B",)),  # = accept_length, bonus token included
        "next_tokens": (("int32",), ("B", "P")),  # tokens committed after path nodes; valid for the first feature_lens
        "aux_hidden_states": (_FLOAT, ("T", "F")),  # features of the path nodes, T = sum(feature_lens)
        "topk_ids": (("int32",), ("B", "N", "K")),
        # As they judged: after penalties and bias, before temperature and truncation.
        "topk_logits": (_FLOAT, ("B", "N", "K")),
        "logsumexp": (("float32",), ("B", "N")),
    },
    "end": {"committed_lens": (("int32",), ("B",))},  # prompt + output tokens that the client may see
    "heartbeat": {},
}


class Frame(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One raw frame, e.g. Frame("positions", "int32", (8,))."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)  # Python integers: nothing to overflow


class Header(msgspec.Struct, forbid_unknown_fields=True):
    """Part 0 of every message. Counters are cumulative for the epoch."""

    schema: int
    kind: Kind
    epoch: str  # one publisher's life, random; a restarted server has a new one
    captured_seq: int  # messages captured up to and including this one (heartbeats are not captured)
    sent_seq: int  # messages sent up to and including this one (heartbeats included)
    heartbeats: int  # heartbeats sent up to and including this one: sent = sent_seq - heartbeats
    dropped: dict[str, int]  # messages dropped so far, by cause
    queued: int  # messages still queued behind this one
    target: str  # fingerprint of the target (manifest.target_fingerprint)
    draft_version: int  # version that drafted these trees
    extend_version: int  # version that wrote the draft KV of this message's features
    time_ns: int  # wall clock at capture
    requests: list[str] = []  # B request ids
    flags: list[int] = []  # B bit sets (verify)
    reasons: list[EndReason] = []  # B (end)
    domains: list[str] = []  # B labels, "" for a request without one (prefill, end); empty where none has one
    num_steps: int = 0
    topk: int = 0
    rejection: bool = False  # drafted tokens are draws from the draft, judged by rejection sampling
    frames: list[Frame] = []


class WireError(ValueError):
    """A message that must not be used. `cause` is a short constant for counters."""

    def __init__(self, cause: str, detail: str):
        super().__init__(f"{cause}: {detail}")
        self.cause = cause


class Message(msgspec.Struct):
    """A decoded message: the header and its arrays (views of the received frames)."""

    header: Header
    arrays: dict[str, np.ndarray]

    def dtype(self, name: str) -> str:
        return next(f.dtype for f in self.header.frames if f.name == name)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Header)


def encode(header: Header, arrays: dict[str, tuple[str, np.ndarray]]) -> list[bytes | memoryview]:
    """Parts to send. `arrays` maps frame name to (wire dtype, C-contiguous array); frames are not copied."""
    header.frames = [Frame(name, dtype, array.shape) for name, (dtype, array) in arrays.items()]
    views = []
    for name, (dtype, array) in arrays.items():
        assert array.dtype == DTYPES[dtype] and array.flags.c_contiguous, (name, dtype, array.dtype)
        views.append(memoryview(array).cast("B") if array.size else b"")
    return [_encoder.encode(header), *views]


def decode(parts: list[bytes | memoryview], *, max_bytes: int) -> Message:
    """Check and view a received message; nothing is allocated before it is checked, nothing is copied.

    Raises WireError with cause one of: header, schema, frames, dtype, shape, size, values.
    """
    if not parts or len(parts[0]) > MAX_HEADER_BYTES or len(parts) > MAX_FRAMES + 1:
        raise WireError("header", f"{len(parts)} parts, header of {len(parts[0]) if parts else 0} bytes")
    try:
        header = _decoder.decode(parts[0])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WireError("header", str(error)) from None
    if header.schema != SCHEMA_VERSION:
        raise WireError("schema", f"schema {header.schema}, this side speaks {SCHEMA_VERSION}")
    if sum(map(len, parts)) > max_bytes:
        raise WireError("size", f"{sum(map(len, parts))} bytes, at most {max_bytes}")
    spec = FRAMES[header.kind]
    if [f.name for f in header.frames] != list(spec) or len(parts) != len(spec) + 1:
        raise WireError("frames", f"{header.kind} has {[f.name for f in header.frames]}, expected {list(spec)}")
    if not 0 < len(header.epoch) <= 64 or not all(map(request_id_fits, header.requests)):
        raise WireError("header", "epoch or request id of an unexpected length")
    sizes = {"B": len(header.requests)}
    arrays = {}
    for frame, part in zip(header.frames, parts[1:]):
        dtypes, shape = spec[frame.name]
        if frame.dtype not in dtypes:
            raise WireError("dtype", f"{frame.name} is {frame.dtype}, expected one of {dtypes}")
        if len(frame.shape) != len(shape) or any(
            not 0 <= n < 1 << 31 or sizes.setdefault(letter, n) != n for letter, n in zip(shape, frame.shape)
        ):
            raise WireError("shape", f"{frame.name} is {frame.shape}, expected {shape} with {sizes}")
        if len(part) != frame.nbytes:
            raise WireError("size", f"{frame.name} has {len(part)} bytes, {frame.shape} needs {frame.nbytes}")
        arrays[frame.name] = np.frombuffer(part, DTYPES[frame.dtype]).reshape(frame.shape)
    message = Message(header, arrays)
    _check_values(message, sizes)
    return message


def request_id_fits(rid: object) -> bool:
    """Whether a message may carry this request id: text of 1 to MAX_REQUEST_ID_CHARS characters."""
    if not isinstance(rid, str) or not 0 < len(rid) <= MAX_REQUEST_ID_CHARS:
        return False
    # JSON can hold half of a UTF-16 pair, which has no UTF-8: the encoder would raise.
    return rid.isascii() or not any("\ud800" <= character <= "\udfff" for character in rid)


def _check_values(message: Message, sizes: dict[str, int]) -> None:
    header, a = message.header, message.arrays
    counters = (header.captured_seq, header.heartbeats, header.queued, *header.dropped.values())
    if header.sent_seq < 1 or min(counters) < 0 or max(header.sent_seq, *counters) >= 1 << 53:
        raise WireError("values", "counters out of bounds")
    if not (0 <= header.draft_version < 1 << 31 and 0 <= header.extend_version < 1 << 31):
        raise WireError("values", "version out of bounds")
    if header.domains and len(header.domains) != sizes["B"]:
        raise WireError("values", f"{len(header.domains)} domains for {sizes['B']} requests")
    if any(domain and not DOMAIN.fullmatch(domain) for domain in header.domains):
        raise WireError("values", f"a domain is not {DOMAIN.pattern}")
    if not 0 <= header.time_ns < 1 << 63:
        raise WireError("values", "time out of bounds")
    if header.kind in ("prefill", "verify"):
        if int(a["feature_lens"].sum(dtype=np.int64)) != sizes["T"] or (a["feature_lens"] < 0).any():
            raise WireError("values", f"feature_lens sum to {a['feature_lens'].sum()}, {sizes['T']} rows came")
        if (a["positions"] < 0).any():
            raise WireError("values", "negative position")
        for name in ("aux_hidden_states", "topk_logits", "logsumexp"):
            if name in a and not _finite(a[name], message.dtype(name)):
                raise WireError("values", f"{name} is not finite")
    if header.kind == "prefill":
        if int(a["extend_lens"].sum(dtype=np.int64)) != sizes["C"] or (a["extend_lens"] < a["feature_lens"]).any():
            raise WireError("values", "extend_lens disagree with input_ids or feature_lens")
        if (a["extend_lens"] < 1).any() or (a["input_ids"] < 0).any() or (a["next_tokens"] < 0).any():
            raise WireError("values", "empty chunk or negative token id")
    if header.kind == "verify":
        _check_trees(header, a, sizes)
    if header.kind == "end" and len(header.reasons) != sizes["B"]:
        raise WireError("values", f"{len(header.reasons)} reasons for {sizes['B']} requests")


def _check_trees(header: Header, a: dict[str, np.ndarray], sizes: dict[str, int]) -> None:
    n, p = sizes["N"], sizes["P"]
    if not 1 <= n <= 256 or not 1 <= p <= n or len(header.flags) != sizes["B"]:
        raise WireError("values", f"trees of {n} nodes, paths of {p}, {len(header.flags)} flags")
    parents, path, lens = a["parents"], a["accept_path"], a["feature_lens"]
    if (parents[:, :1] != -1).any() or (parents >= np.arange(n)).any() or (parents[:, 1:] < -2).any():
        raise WireError("values", "parents are not a tree")
    if (parents[:, 1:] == -1).any():
        raise WireError("values", "more than one root")
    if (lens < 1).any() or (lens > p).any() or (path >= n).any():
        raise WireError("values", "accept_path or feature_lens out of bounds")
    on_path = np.arange(p) < lens[:, None]
    if (path[:, :1] != 0).any() or (path[on_path] < 0).any():
        raise WireError("values", "accept_path does not start at the root")
    rows = np.arange(len(path))[:, None]
    if (parents[rows, path.clip(0)][:, 1:] != path[:, :-1])[on_path[:, 1:]].any():
        raise WireError("values", "accept_path does not follow parents")
    if (a["draft_tokens"] < 0).any() or (a["next_tokens"][on_path] < 0).any() or (a["topk_ids"] < 0).any():
        raise WireError("values", "negative token id")


def _finite(array: np.ndarray, dtype: str) -> bool:
    """No inf, no NaN. For bfloat16 bits: the exponent is not all ones."""
    if dtype == "bfloat16":
        return not ((array & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(array).all())
