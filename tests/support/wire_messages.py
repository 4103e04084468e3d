"""A valid message of every kind, for tests of the wire contract to change."""

import numpy as np
import torch
from aurora_kernels.pack_step import float8_ref
from trees import depths

from aurora_sglang_plugin.link import rows, wire
from aurora_sglang_plugin.link.frames import FEATURES, SCALES
from aurora_sglang_plugin.link.schemas import FLOAT8_SCHEMA

MAX = 1 << 20


def header(kind="verify", **changes):
    fields = dict(
        schema=wire.SCHEMA_VERSION, kind=kind, session="e", captured_seq=1, sent_seq=1,
        heartbeats=0,
        dropped={},
        queued=0, target="t", draft_version=3, extend_version=3, time_ns=1, requests=["a", "b"],
    )  # fmt: skip
    if kind == "verify":
        fields.update(flags=[0, 1], num_steps=4, topk=2)
    return wire.Header(**(fields | changes))


def i32(*values):
    return "int32", np.array(values, np.int32)


def verify_arrays(parents=(-1, 0, 0, 1, 1, 2, 3, 3, 6), dtype="bfloat16", k=4):
    """Two requests: the first accepts the path to its deepest node, the second only the root.

    Two nodes at least.
    """
    parents = [*parents, -2][: max(2, len(parents))]
    n = len(parents)
    leaf, path = int(np.argmax(depths(list(parents)))), []
    while leaf >= 0:
        path.insert(0, leaf)
        leaf = parents[leaf]
    length, p = len(path), max(2, len(path))
    features = np.arange((length + 1) * 6).reshape(length + 1, 6).astype(wire.DTYPES[dtype])
    return {
        "positions": i32(10, 20),
        "draft_tokens": i32(*np.arange(2 * n).reshape(2, n)),
        "parents": i32(parents, parents),
        "accept_path": i32([*path, -1][:p], [0] + [-1] * (p - 1)),
        "feature_lens": i32(length, 1),
        "next_tokens": i32([*path[1:], 99, 99][:p], [98] * p),
        "aux_hidden_states": (dtype, features),
        "topk_ids": i32(*np.arange(2 * n * k).reshape(2, n, k)),
        "topk_logits": ("float32", np.zeros((2, n, k), np.float32)),
        "logsumexp": ("float32", np.full((2, n), 2, np.float32)),
    }


def prefill_arrays():
    return {
        "positions": i32(0, 7),
        "extend_lens": i32(3, 2),
        "feature_lens": i32(2, 2),
        "prompt_lens": i32(3, 30),
        "input_ids": i32(1, 2, 3, 4, 5),
        "next_tokens": i32(6, 7),
        "aux_hidden_states": ("float16", np.ones((4, 6), np.float16)),
    }


def as_float8(arrays, layers=2):
    """The same message with features that are float8, of so many layers."""
    features = torch.from_numpy(rows.to_float32(arrays[FEATURES][1], arrays[FEATURES][0]))
    codes, scales = float8_ref(features, layers)
    changed = {}
    for name, frame in arrays.items():
        changed[name] = ("float8", codes.numpy()) if name == FEATURES else frame
        if name == FEATURES:
            changed[SCALES] = "float32", scales.numpy()
    return changed


MESSAGES = {
    "prefill": lambda: (header("prefill"), prefill_arrays()),
    "verify": lambda: (header(), verify_arrays()),
    "end": lambda: (
        header("end", reasons=["stop", "abort"], domains=["", "code"]),
        {"committed_lens": i32(5, 6)},
    ),
    "heartbeat": lambda: (header("heartbeat", requests=[]), {}),
    "prefill in float8": lambda: (
        header("prefill", schema=FLOAT8_SCHEMA),
        as_float8(prefill_arrays(), 1),
    ),
    "verify in float8": lambda: (header(schema=FLOAT8_SCHEMA), as_float8(verify_arrays(), 2)),
}


def parts_of(kind):
    return [bytes(part) for part in wire.encode(*MESSAGES[kind]())]
