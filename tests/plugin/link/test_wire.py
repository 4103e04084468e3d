"""The wire contract: what decodes, what is refused and by which cause, and that nothing else ever
happens.
"""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import NAMED_TREES, depths

from aurora_sglang_plugin.link import rows, wire

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


MESSAGES = {
    "prefill": lambda: (header("prefill"), prefill_arrays()),
    "verify": lambda: (header(), verify_arrays()),
    "end": lambda: (
        header("end", reasons=["stop", "abort"], domains=["", "code"]),
        {"committed_lens": i32(5, 6)},
    ),
    "heartbeat": lambda: (header("heartbeat", requests=[]), {}),
}


def parts_of(kind):
    return [bytes(part) for part in wire.encode(*MESSAGES[kind]())]


@pytest.mark.parametrize("kind", MESSAGES)
def test_round_trip(kind):
    sent, arrays = MESSAGES[kind]()
    message = wire.decode([bytes(part) for part in wire.encode(sent, arrays)], max_bytes=MAX)
    assert message.header == sent
    assert list(message.arrays) == list(arrays) and not message.bad
    for name, (dtype, array) in arrays.items():
        assert message.dtype(name) == dtype
        assert np.array_equal(message.arrays[name], array)


@pytest.mark.parametrize("name", NAMED_TREES)
def test_every_named_tree_travels(name):
    arrays = verify_arrays(NAMED_TREES[name])
    steps = arrays["accept_path"][1].shape[1] - 1
    message = wire.decode(wire.encode(header(num_steps=steps), arrays), max_bytes=MAX)
    nodes = len(NAMED_TREES[name])
    assert (
        message.arrays["parents"][:, :nodes].tolist() == [NAMED_TREES[name]] * 2 and not message.bad
    )


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


def cut(axis, stop, **fields):
    """Every frame of that letter cut to `stop`, e.g. no kept logits at all."""

    def mutate(header, arrays):
        for name, (dtype, array) in arrays.items():
            letters = wire.FRAMES[header.kind][name][1]
            if axis in letters:
                index = [slice(None)] * array.ndim
                index[letters.index(axis)] = slice(stop)
                arrays[name] = dtype, np.ascontiguousarray(array[tuple(index)])
        head(**fields)(header, arrays)

    return mutate


def wide(axis, size):
    """The same, repeated up to `size`."""

    def mutate(header, arrays):
        for name, (dtype, array) in arrays.items():
            letters = wire.FRAMES[header.kind][name][1]
            if axis in letters:
                at = letters.index(axis)
                arrays[name] = dtype, np.take(array, np.arange(size) % array.shape[at], axis=at)

    return mutate


# What costs the message: its header, ...
BAD_HEADER = {
    "old schema": ("verify", head(schema=0), "schema"),
    "empty session": ("verify", head(session=""), "header"),
    "long target": ("verify", head(target="x" * 65), "header"),
    "long cause": ("verify", head(dropped={"x" * 65: 1}), "header"),
    "many causes": ("verify", head(dropped={str(n): 1 for n in range(33)}), "header"),
    "negative counter": ("verify", head(dropped={"queue_full": -1}), "values"),
    "huge counter": ("verify", head(sent_seq=1 << 60), "values"),
    "version beyond int32": ("verify", head(draft_version=1 << 40), "values"),
    "time beyond int64": ("verify", head(time_ns=1 << 63), "values"),
}

# ... or what no row could be read without, or what all rows share.
REFUSED = BAD_HEADER | {
    "request missing": ("verify", head(requests=["a"]), "shape"),
    "flag missing": ("verify", head(flags=[0]), "values"),
    "reason missing": ("end", head(reasons=["stop"]), "values"),
    "domain missing": ("end", head(domains=["code"]), "values"),
    "float64 ids": ("verify", change(positions=("float32", np.zeros(2, np.float32))), "dtype"),
    "mismatched B": ("verify", change(positions=i32(1, 2, 3)), "shape"),
    "mismatched N": ("verify", change(draft_tokens=i32([1] * 8, [1] * 8)), "shape"),
    "extra dimension": ("verify", change(positions=i32([1], [2])), "shape"),
    "rows do not add up": ("verify", at("feature_lens", 1, 2), "values"),
    "negative length that adds up": ("verify", at("feature_lens", slice(None), (7, -1)), "values"),
    "huge feature_lens": ("verify", at("feature_lens", slice(None), 2**31 - 1), "values"),
    "tokens do not add up": ("prefill", at("extend_lens", 0, 9), "values"),
    "no kept logits": ("verify", cut("K", 0), "values"),
    "too many kept logits": ("verify", wide("K", 129), "values"),
    "no nodes": ("verify", cut("N", 0), "values"),
    "too many nodes": ("verify", wide("N", 65), "values"),
    "features without width": ("verify", cut("F", 0), "values"),
    "no steps": ("verify", cut("P", 1, num_steps=0), "values"),
    "a million steps": ("verify", head(num_steps=10**6), "values"),
    "negative steps": ("verify", head(num_steps=-1), "values"),
    "too many steps": ("verify", head(num_steps=17), "values"),
    "steps that are not the paths'": ("verify", head(num_steps=3), "values"),
    "no beams": ("verify", head(topk=0), "values"),
    "a million beams": ("verify", head(topk=10**6), "values"),
}

# What costs one request: the other one of the message goes on.
BAD_ROW = {
    "long id": ("verify", head(requests=["x" * 1025, "b"]), "request"),
    "domain too long": ("end", head(domains=["x" * 33, ""]), "domain"),
    "domain with a control character": ("end", head(domains=["a\x1b[2J", ""]), "domain"),
    "negative position": ("verify", at("positions", 0, -1), "position"),
    "huge position": ("verify", at("positions", 0, 2**31 - 1), "position"),
    "huge chunk position": ("prefill", at("positions", 0, 1 << 24), "position"),
    "negative prompt": ("prefill", at("prompt_lens", 0, -1), "position"),
    "negative end": ("end", at("committed_lens", 0, -1), "length"),
    "negative token": ("verify", at("draft_tokens", (0, 0), -5), "token"),
    "negative committed token": ("verify", at("next_tokens", (0, 4), -5), "token"),
    "negative kept token": ("verify", at("topk_ids", (0, 3, 2), -5), "token"),
    "negative prompt token": ("prefill", at("input_ids", 1, -1), "token"),
    "empty chunk": ("prefill", at("extend_lens", slice(None), (0, 5)), "length"),
    "features beyond chunk": ("prefill", at("feature_lens", slice(None), (4, 0)), "length"),
    "nothing accepted": (
        "verify",
        change(feature_lens=i32(0, 1), aux_hidden_states=("float16", np.ones((1, 6), np.float16))),
        "length",
    ),
    "parent after child": ("verify", at("parents", (0, 1), 5), "tree"),
    "own parent": ("verify", at("parents", (0, 2), 2), "tree"),
    "two roots": ("verify", at("parents", (0, 4), -1), "tree"),
    "no root": ("verify", at("parents", (0, 0), 0), "tree"),
    "parent unused": ("verify", at("parents", (0, 3), -2), "tree"),
    "deeper than its steps": ("verify", at("parents", (0, slice(1, None)), np.arange(8)), "tree"),
    "path out of bounds": ("verify", at("accept_path", (0, 1), 200), "path"),
    "path leaves the tree": ("verify", at("accept_path", (0, 1), 2), "path"),
    "path not from the root": ("verify", at("accept_path", (0, 0), 1), "path"),
    "path stops early": ("verify", at("accept_path", (0, 1), -1), "path"),
    "accepted another token": ("verify", at("next_tokens", (0, 1), 77), "path"),
    "bfloat16 NaN": ("verify", at("aux_hidden_states", (0, 0), 0x7FC0), "not_finite"),
    "bfloat16 -inf": ("verify", at("aux_hidden_states", (0, 0), 0xFF80), "not_finite"),
    "bfloat16 beyond squares": ("verify", at("aux_hidden_states", (0, 0), 0x7F7F), "not_finite"),
    "float16 inf": ("prefill", at("aux_hidden_states", (0, 0), np.inf), "not_finite"),
    "float32 NaN": ("verify", at("topk_logits", (0, 0, 0), np.nan), "not_finite"),
    "float32 inf": ("verify", at("logsumexp", (0, 0), -np.inf), "not_finite"),
    "logsumexp of nothing": ("verify", at("logsumexp", (0, 0), -3e38), "not_finite"),
    "unsorted logits": ("verify", at("topk_logits", (0, 0, 0), -1), "logits"),
    "more than all of the mass": ("verify", at("topk_logits", (0, 0), 1), "logits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    kind, mutate, cause = REFUSED[name]
    sent, arrays = MESSAGES[kind]()
    mutate(sent, arrays)
    with pytest.raises(wire.WireError) as error:
        wire.decode(wire.encode(sent, arrays), max_bytes=MAX)
    assert error.value.cause == cause
    assert (error.value.header is None) == (name in BAD_HEADER)


@pytest.mark.parametrize("name", BAD_ROW)
def test_a_bad_row_is_its_own_and_can_be_left_out(name):
    kind, mutate, cause = BAD_ROW[name]
    sent, arrays = MESSAGES[kind]()
    mutate(sent, arrays)
    message = wire.decode([bytes(p) for p in wire.encode(sent, arrays)], max_bytes=MAX)
    assert message.bad == {0: cause}
    fields = {name: getattr(sent, name) for name in ("requests", "flags", "reasons", "domains")}
    fields, arrays = rows.excluded(message.bad, fields, arrays)
    for name, value in fields.items():
        setattr(sent, name, value)
    left = wire.decode([bytes(p) for p in wire.encode(sent, arrays)], max_bytes=MAX)
    assert not left.bad and left.header.requests == ["b"]
    fields, arrays = rows.excluded(
        {0: cause}, {name: getattr(left.header, name) for name in fields}, arrays
    )
    for name, value in fields.items():
        setattr(sent, name, value)
    assert (
        wire.decode([bytes(p) for p in wire.encode(sent, arrays)], max_bytes=MAX).header.requests
        == []
    )


@pytest.mark.parametrize("kind", ["prefill", "verify", "end"])
def test_a_refused_message_has_a_stand_in(kind):
    sent, arrays = MESSAGES[kind]()
    stand_in = wire.decode([bytes(p) for p in wire.missing(sent)], max_bytes=MAX)
    assert stand_in.bad == {0: "length", 1: "length"} and stand_in.header.requests == sent.requests
    for name in ("session", "captured_seq", "sent_seq", "dropped", "time_ns", "draft_version"):
        assert getattr(stand_in.header, name) == getattr(sent, name)


@pytest.mark.parametrize(
    "shape",
    [(2**40, 2**40), (0, 2**62), (2**31, 2**33), (-1, -6), (-2, 3), (2**62,), (1 << 63, 2)],
    ids=str,
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
    for bad in (
        [],
        [b""],
        [b"garbage", *parts[1:]],
        [parts[0][:-1], *parts[1:]],
        [*parts, b""],
        [parts[0]] * 40,
    ):
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
@given(
    st.sampled_from(sorted(MESSAGES)),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1),
    st.integers(1, 255),
)
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
