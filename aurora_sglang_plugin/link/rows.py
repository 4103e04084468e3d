"""CONTRACT 1, row by row: what one request's share of a message must be.

A row that cannot be used costs its request and nobody else. The server leaves it out before it
sends (`excluded`); a trainer that gets one all the same ends the sample of that request there.
What is wrong with a whole message is for wire.decode.

Dimensions: B requests, T packed feature rows, N tree nodes, S draft steps, P = S + 1, K kept
    logits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from aurora_kernels.limits import E4M3_MAX

from aurora_sglang_plugin.link.frames import FEATURES, FLOAT8, SCALES

CAUSES = (
    "request", "domain", "position", "length", "token", "not_finite", "tree", "path", "logits",
)  # fmt: skip

# of its UTF-8: so MAX_REQUESTS of them fit in a header
MAX_REQUEST_ID_BYTES = 256
# Token positions and lengths: far above any context, far below what an int32 holds.
MAX_POSITION = 1 << 24
# Features beyond it overflow when a norm squares and sums them. No model comes near.
MAX_FEATURE = 1e12
# its bits
MAX_BFLOAT16 = int(np.array(MAX_FEATURE, np.float32).view(np.uint32) >> 16)
# of float8
MAX_SCALE = MAX_FEATURE / E4M3_MAX
MAX_LOGSUMEXP = 1e9
UNUSED = -2

# A label that the client gave its request, to tell kinds of traffic apart: short and harmless
# wherever it is printed.
DOMAIN = re.compile(r"[A-Za-z0-9_.-]{1,32}")

# Frames that hold a run of rows for each request, and the frame that says how many.
PACKED = {"input_ids": "extend_lens", FEATURES: "feature_lens", SCALES: "feature_lens"}

Arrays = Mapping[str, np.ndarray]


def bad_rows(
    kind: str,
    num_steps: int,
    requests: Sequence[str],
    domains: Sequence[str],
    arrays: Arrays,
    dtypes: Mapping[str, str],
) -> dict[int, str]:
    """{row: cause} of the rows that must not be used.

    The shapes are right, as wire.decode checks.
    """
    bad: dict[int, str] = {}
    for row, request in enumerate(requests):
        if not request_id_fits(request):
            bad[row] = "request"
    for row, domain in enumerate(domains):
        if domain and not DOMAIN.fullmatch(domain):
            bad.setdefault(row, "domain")
    if kind not in _FAULTS or not requests:
        return bad
    if kind == "verify" and good_chains(num_steps, arrays, dtypes):
        return bad
    faults = _FAULTS[kind](num_steps, arrays, dtypes)
    for cause in CAUSES:
        if cause in faults:
            for row in np.flatnonzero(faults[cause]).tolist():
                bad.setdefault(row, cause)
    return bad


def request_id_fits(rid: object) -> bool:
    """Whether a message may carry this request id: text of 1 to MAX_REQUEST_ID_BYTES in UTF-8."""
    # no character takes less than a byte
    if not isinstance(rid, str) or not 0 < len(rid) <= MAX_REQUEST_ID_BYTES:
        return False
    if rid.isascii():
        return True
    try:
        return len(rid.encode()) <= MAX_REQUEST_ID_BYTES
    except UnicodeEncodeError:
        # JSON can hold half of a UTF-16 pair, which has no UTF-8
        return False


def excluded(
    bad: Mapping[int, str], fields: Mapping[str, Any], arrays: Mapping[str, tuple[str, np.ndarray]]
) -> tuple[dict[str, Any], dict[str, tuple[str, np.ndarray]]]:
    """A message's header fields and frames without the bad rows.

    A message of no rows is a message.
    """
    keep = np.array([row not in bad for row in range(len(fields["requests"]))], bool)
    rows = np.flatnonzero(keep).tolist()
    # a header's list has an entry for each row, or none at all
    kept_fields = {
        name: [value[row] for row in rows] if isinstance(value, list) and value else value
        for name, value in fields.items()
    }
    kept = {}
    for name, (dtype, array) in arrays.items():
        lens = PACKED.get(name)
        mask = keep if lens is None else np.repeat(keep, arrays[lens][1])
        kept[name] = dtype, np.ascontiguousarray(array[mask])
    return kept_fields, kept


def to_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """The values of a frame; bfloat16 travels as its bits."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def _prefill(num_steps: int, a: Arrays, dtypes: Mapping[str, str]) -> dict[str, np.ndarray]:
    positions, extend, lens = _int64(a, "positions", "extend_lens", "feature_lens")
    negative = _any_of(a["input_ids"] < 0, extend)
    return {
        "position": _outside(positions, extend) | _outside(a["prompt_lens"], 0),
        "length": (extend < 1) | (lens > extend),
        "token": negative | (a["next_tokens"] < 0),
        "not_finite": _any_of(~_small(a, dtypes), lens),
    }


def _verify(num_steps: int, a: Arrays, dtypes: Mapping[str, str]) -> dict[str, np.ndarray]:
    positions, lens = _int64(a, "positions", "feature_lens")
    parents, path, tokens = a["parents"], a["accept_path"], a["draft_tokens"]
    nodes, columns = parents.shape[1], path.shape[1]
    rows = np.arange(len(path))[:, None]
    on_path = np.arange(columns) < lens[:, None]
    used = parents != UNUSED

    not_a_tree = (parents[:, 0] != -1) | (parents[:, 1:] == -1).any(1) | (parents < UNUSED).any(1)
    not_a_tree |= (parents >= np.arange(nodes)).any(1)
    above = np.where(parents < np.arange(nodes), parents, 0).clip(0)
    not_a_tree |= (used & ~used[rows, above]).any(1)
    depth = np.zeros_like(parents)
    # parents come before children
    for node in range(1, nodes):
        depth[:, node] = depth[rows[:, 0], above[:, node]] + 1
    not_a_tree |= (depth * used).max(1) > num_steps

    inside = path.clip(0, nodes - 1)
    off_path = (path[:, 0] != 0) | ((path != inside) & on_path).any(1)
    follows = on_path[:, 1:]
    off_path |= ((parents[rows, inside][:, 1:] != path[:, :-1]) & follows).any(1)
    # The token of an accepted node is the one that was committed after its parent.
    off_path |= ((tokens[rows, inside][:, 1:] != a["next_tokens"][:, :-1]) & follows).any(1)

    logits = to_float32(a["topk_logits"], dtypes["topk_logits"])
    logsumexp = a["logsumexp"]
    finite = np.isfinite(logits).all((1, 2)) & (np.abs(logsumexp) <= MAX_LOGSUMEXP).all(1)
    return {
        "position": _outside(positions, lens),
        "length": (lens < 1) | (lens > columns),
        "token": (tokens < 0).any(1)
        | ((a["next_tokens"] < 0) & on_path).any(1)
        | (a["topk_ids"] < 0).any((1, 2)),
        "not_finite": ~finite | _any_of(~_small(a, dtypes), lens),
        "tree": not_a_tree,
        "path": off_path,
        "logits": (_not_a_distribution(logits, logsumexp) & used).any(1),
    }


def good_chains(num_steps: int, a: Arrays, dtypes: Mapping[str, str]) -> bool:
    """Whether every row of a verify message is a chain without a fault. False says nothing.

    The usual message: told in a fraction of _verify's time, which the server pays at each step.
    Lists if rows are short: numpy takes as long for 1 as for 1,000 elements.
    """
    nodes = a["parents"].shape[1]
    names = ("positions", "feature_lens", "parents", "accept_path", "draft_tokens", "next_tokens")
    if nodes > min(num_steps + 1, a["accept_path"].shape[1]) or dtypes["topk_logits"] != "float32":
        return False
    chain, above = list(range(nodes)), list(range(-1, nodes - 1))
    for position, length, parents, path, tokens, following in zip(*(a[n].tolist() for n in names)):
        if not (
            0 <= position <= MAX_POSITION - nodes
            and 1 <= length <= nodes
            and parents == above
            and path[:length] == chain[:length]
            and min(tokens) >= 0
            and tokens[1:length] == following[: length - 1]
            and following[length - 1] >= 0
        ):
            return False
    logits, logsumexp = a["topk_logits"], a["logsumexp"]
    # in an order that lets nothing overflow
    return bool(
        a["topk_ids"].min() >= 0
        and _all_small(a, dtypes)
        and (logits[..., 1:] <= logits[..., :-1]).all()
        and -MAX_LOGSUMEXP <= logsumexp.min()
        and logsumexp.max() <= MAX_LOGSUMEXP
        # Half of what _not_a_distribution allows: rounding lets nothing pass.
        and (shares := logits - logsumexp[..., None]).max() <= 0.005
        and shares.min() > -np.inf
        and np.exp(shares).sum(-1).max() <= 1.005
    )


def _end(num_steps: int, a: Arrays, dtypes: Mapping[str, str]) -> dict[str, np.ndarray]:
    return {"length": _outside(a["committed_lens"], 0)}


_FAULTS: dict[str, Callable[..., dict[str, np.ndarray]]] = {
    "prefill": _prefill,
    "verify": _verify,
    "end": _end,
}


def _not_a_distribution(logits: np.ndarray, logsumexp: np.ndarray) -> np.ndarray:
    """bool [B, N]: not sorted, largest first, or more than all of the mass, beyond rounding."""
    # what is not finite is another cause
    with np.errstate(all="ignore"):
        unsorted = (logits[..., 1:] > logits[..., :-1]).any(-1)
        top = logits[..., 0].astype(np.float64)
        kept = top + np.log(np.exp(logits - top[..., None]).sum(-1))
        return unsorted | ~(kept <= logsumexp + 1e-2 * (1 + np.abs(logsumexp)))


def _small(a: Arrays, dtypes: Mapping[str, str]) -> np.ndarray:
    """bool [T]: rows of which all features are finite and at most MAX_FEATURE."""
    array, dtype = a[FEATURES], dtypes[FEATURES]
    if dtype == FLOAT8:
        scales = a[SCALES]
        good = ((array & 0x7F) != 0x7F).all(1) & ((scales >= 0) & (scales <= MAX_SCALE)).all(1)
    elif dtype == "bfloat16":
        good = ((array & 0x7FFF) <= np.uint16(MAX_BFLOAT16)).all(1)
    elif dtype == "float16":
        good = np.isfinite(array).all(1)
    else:
        good = (np.abs(array) <= MAX_FEATURE).all(1)
    return cast(np.ndarray, good)


def _all_small(a: Arrays, dtypes: Mapping[str, str]) -> bool:
    """Whether _small holds for every row, without a copy."""
    array, dtype = a[FEATURES], dtypes[FEATURES]
    if dtype == FLOAT8:
        # NaN is the largest code of either sign, 0x7F and 0xFF
        return bool(
            array.view(np.int8).max() < 0x7F
            and array.max() < 0xFF
            and 0 <= a[SCALES].min()
            and a[SCALES].max() <= MAX_SCALE
        )
    if dtype == "bfloat16":
        # The largest positive number has the largest bits of all that are not negative as int16,
        # and the most negative one the largest as uint16.
        return bool(
            array.view(np.int16).max() <= MAX_BFLOAT16 and array.max() <= 0x8000 + MAX_BFLOAT16
        )
    return -MAX_FEATURE <= float(array.min()) and float(array.max()) <= MAX_FEATURE


def _any_of(packed: np.ndarray, lens: np.ndarray) -> np.ndarray:
    """bool [B]: whether any of a request's packed rows is set."""
    if not packed.any():
        return np.zeros(len(lens), bool)
    owners = np.repeat(np.arange(len(lens)), lens)[packed]
    return np.bincount(owners, minlength=len(lens)) > 0


def _outside(first: np.ndarray, length: np.ndarray | int) -> np.ndarray:
    return (first < 0) | (first + length > MAX_POSITION)


def _int64(a: Arrays, *names: str) -> list[np.ndarray]:
    return [a[name].astype(np.int64) for name in names]
