"""The wire contract: what decodes, what is refused and by which cause, and that nothing else ever happens."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import NAMED_TREES, depths

from aurora_sglang_plugin import wire

MAX = 1 << 20


def header(kind="verify", **changes):
    fields = dict(
        schema=wire.SCHEMA_VERSION, kind=kind, epoch="e", captured_seq=1, sent_seq=1, heartbeats=0, dropped={},
        queued=0, target="t", draft_version=3, extend_version=3, time_ns=1, requests=["a", "b"],
    )  # fmt: skip
    if kind == "verify":
        fields.update(flags=[0, 1], num_steps=3, topk=2)
    return wire.Header(**(fields | changes))


def i32(*values):
    return "int32", np.array(values, np.int32)


def verify_arrays(parents=(-1, 0, 0, 1, 1, 2, 3, 3, 6), dtype="bfloat16", k=4):
    """Two requests: the first accepts the path to its deepest node, the second only the root."""
    n = len(parents)
    leaf, path = int(np.argmax(depths(list(parents)))), []
    while leaf >= 0:
        path.insert(0, leaf)
        leaf = parents[leaf]
    p = len(path)
    features = np.arange((p + 1) * 6).reshape(p + 1, 6).astype(wire.DTYPES[dtype])
    return {
        "positions": i32(10, 20),
        "draft_tokens": i32(*np.arange(2 * n).reshape(2, n)),
        "parents": i32(parents, parents),
        "accept_path": i32(path, [0] + [-1] * (p - 1)),
        "feature_lens": i32(p, 1),
        "next_tokens": i32([*path[1:], 99], [98] * p),
        "aux_hidden_states": (dtype, features),
        "topk_ids": i32(*np.arange(2 * n * k).reshape(2, n, k)),
        "topk_logits": ("float32", np.zeros((2, n, k), np.float32)),
        "logsumexp": ("float32", np.ones((2, n), np.float32)),
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


MESSAGES = {
    "prefill": lambda: (header("prefill"), prefill_arrays()),
    "verify": lambda: (header(), verify_arrays()),
    "end": lambda: (header("end", reasons=["stop", "abort"], domains=["", "code"]), {"committed_lens": i32(5, 6)}),
    "heartbeat": lambda: (header("heartbeat", requests=[]), {}),
}


def parts_of(kind):
    return [bytes(part) for part in wire.encode(*MESSAGES[kind]())]


@pytest.mark.parametrize("kind", MESSAGES)
def test_round_trip(kind):
    sent, arrays = MESSAGES[kind]()
    message = wire.decode([bytes(part) for part in wire.encode(sent, arrays)], max_bytes=MAX)
    assert message.header == sent
    assert list(message.arrays) == list(arrays)
    for name, (dtype, array) in arrays.items():
        assert message.dtype(name) == dtype
        assert np.array_equal(message.arrays[name], array)


@pytest.mark.parametrize("name", NAMED_TREES)
def test_every_named_tree_travels(name):
    arrays = verify_arrays(NAMED_TREES[name])
    message = wire.decode(wire.encode(header(), arrays), max_bytes=MAX)
    assert message.arrays["parents"].tolist() == [NAMED_TREES[name]] * 2


def test_frames_are_not_copied():
    array = np.arange(4, dtype=np.int32)
    parts = wire.encode(header("end"), {"committed_lens": ("int32", array)})
    assert np.shares_memory(np.frombuffer(parts[1], np.int32), array)


def change(**frames):
    return lambda head, arrays: arrays.update(frames)


def at(name, index, value):
    def mutate(head, arrays):
        arrays[name][1][index] = value

    return mutate


def head(**fields):
    def mutate(header, arrays):
        for name, value in fields.items():
            setattr(header, name, value)

    return mutate


REFUSED = {
    "old schema": ("verify", head(schema=0), "schema"),
    "empty epoch": ("verify", head(epoch=""), "header"),
    "negative counter": ("verify", head(dropped={"queue_full": -1}), "values"),
    "huge counter": ("verify", head(sent_seq=1 << 60), "values"),
    "version beyond int32": ("verify", head(draft_version=1 << 40), "values"),
    "request missing": ("verify", head(requests=["a"]), "shape"),
    "flag missing": ("verify", head(flags=[0]), "values"),
    "reason missing": ("end", head(reasons=["stop"]), "values"),
    "domain missing": ("end", head(domains=["code"]), "values"),
    "domain too long": ("end", head(domains=["", "x" * 33]), "values"),
    "domain with a control character": ("end", head(domains=["", "a\x1b[2J"]), "values"),
    "float64 ids": ("verify", change(positions=("float32", np.zeros(2, np.float32))), "dtype"),
    "mismatched B": ("verify", change(positions=i32(1, 2, 3)), "shape"),
    "mismatched N": ("verify", change(draft_tokens=i32([1] * 8, [1] * 8)), "shape"),
    "extra dimension": ("verify", change(positions=i32([1], [2])), "shape"),
    "negative position": ("verify", at("positions", 0, -1), "values"),
    "negative token": ("verify", at("draft_tokens", (0, 0), -5), "values"),
    "rows do not add up": ("verify", at("feature_lens", 1, 2), "values"),
    "huge feature_lens": ("verify", at("feature_lens", slice(None), 2**31 - 1), "values"),
    "parent after child": ("verify", at("parents", (0, 1), 5), "values"),
    "own parent": ("verify", at("parents", (0, 2), 2), "values"),
    "two roots": ("verify", at("parents", (0, 4), -1), "values"),
    "no root": ("verify", at("parents", (1, 0), 0), "values"),
    "path out of bounds": ("verify", at("accept_path", (0, 1), 200), "values"),
    "path leaves the tree": ("verify", at("accept_path", (0, 1), 2), "values"),
    "path not from the root": ("verify", at("accept_path", (0, 0), 1), "values"),
    "path stops early": ("verify", at("accept_path", (0, 1), -1), "values"),
    "bfloat16 NaN": ("verify", at("aux_hidden_states", (0, 0), 0x7FC0), "values"),
    "bfloat16 -inf": ("verify", at("aux_hidden_states", (0, 0), 0xFF80), "values"),
    "float16 inf": ("prefill", at("aux_hidden_states", (0, 0), np.inf), "values"),
    "float32 NaN": ("verify", at("topk_logits", (0, 0, 0), np.nan), "values"),
    "float32 inf": ("verify", at("logsumexp", (0, 0), -np.inf), "values"),
    "empty chunk": ("prefill", at("extend_lens", slice(None), (5, 0)), "values"),
    "features beyond chunk": ("prefill", at("feature_lens", slice(None), (4, 0)), "values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    kind, mutate, cause = REFUSED[name]
    sent, arrays = MESSAGES[kind]()
    mutate(sent, arrays)
    with pytest.raises(wire.WireError) as error:
        wire.decode(wire.encode(sent, arrays), max_bytes=MAX)
    assert error.value.cause == cause


@pytest.mark.parametrize(
    "shape", [(2**40, 2**40), (0, 2**62), (2**31, 2**33), (-1, -6), (-2, 3), (2**62,), (1 << 63, 2)], ids=str
)
def test_shapes_are_bounded_before_anything_is_allocated(shape):
    parts = parts_of("prefill")
    sent = msgspec.msgpack.decode(parts[0])
    sent["frames"][-1]["shape"] = shape
    parts[0] = msgspec.msgpack.encode(sent)
    for last in (b"", parts[-1]):
        with pytest.raises(wire.WireError) as error:
            wire.decode([*parts[:-1], last], max_bytes=MAX)
        assert error.value.cause in ("shape", "size", "header", "values")


@pytest.mark.parametrize("kind", MESSAGES)
def test_truncated_or_garbled_parts(kind):
    parts = parts_of(kind)
    for bad in ([], [b""], [b"garbage", *parts[1:]], [parts[0][:-1], *parts[1:]], [*parts, b""], [parts[0]] * 40):
        with pytest.raises(wire.WireError):
            wire.decode(bad, max_bytes=MAX)
    if len(parts) > 1:
        with pytest.raises(wire.WireError):
            wire.decode(parts[:-1], max_bytes=MAX)
        with pytest.raises(wire.WireError) as error:
            wire.decode([*parts[:-1], parts[-1][:-1]], max_bytes=MAX)
        assert error.value.cause == "size"


def test_size_caps():
    parts = parts_of("verify")
    total = sum(map(len, parts))
    wire.decode(parts, max_bytes=total)
    with pytest.raises(wire.WireError) as error:
        wire.decode(parts, max_bytes=total - 1)
    assert error.value.cause == "size"
    with pytest.raises(wire.WireError) as error:
        wire.decode([b"x" * (wire.MAX_HEADER_BYTES + 1)], max_bytes=1 << 30)
    assert error.value.cause == "header"


@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(sorted(MESSAGES)), st.floats(0, 1, exclude_max=True), st.floats(0, 1), st.integers(1, 255))
def test_any_changed_byte_is_refused_or_still_valid(kind, where, place, xor):
    """A WireError or a message: never another exception. Half of the draws hit the header."""
    parts = parts_of(kind)
    part = 0 if place < 0.5 else int((place - 0.5) * 2 * (len(parts) - 1) + 0.5)
    changed = bytearray(parts[part])
    changed[int(where * len(changed))] ^= xor
    parts[part] = bytes(changed)
    try:
        wire.decode(parts, max_bytes=MAX)
    except wire.WireError as error:
        assert error.cause in ("header", "schema", "frames", "dtype", "shape", "size", "values")


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.binary(max_size=200), max_size=12))
def test_any_bytes_are_refused(parts):
    with pytest.raises(wire.WireError):
        wire.decode(parts, max_bytes=MAX)
