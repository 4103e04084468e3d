"""The wire contract: what decodes, and that whatever else arrives is refused with a cause, before
anything is allocated.
"""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import NAMED_TREES
from wire_messages import MAX, MESSAGES, header, parts_of, verify_arrays

from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.link.rows import MAX_REQUEST_ID_BYTES, request_id_fits


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
    about = header(num_steps=steps, topk=wire.MAX_NODES)
    message = wire.decode(wire.encode(about, arrays), max_bytes=MAX)
    nodes = len(NAMED_TREES[name])
    assert (
        message.arrays["parents"][:, :nodes].tolist() == [NAMED_TREES[name]] * 2 and not message.bad
    )


def test_only_what_is_float8_is_of_the_new_schema():
    """So that a trainer of the schema before takes everything else."""
    for kind in MESSAGES:
        sent, arrays = MESSAGES[kind]()
        sent.schema = wire.SCHEMA_VERSION
        assert wire.read_header(wire.encode(sent, arrays)[0]).schema == 2 + ("float8" in kind)


def test_frames_are_not_copied():
    array = np.arange(4, dtype=np.int32)
    parts = wire.encode(header("end"), {"committed_lens": ("int32", array)})
    assert np.shares_memory(np.frombuffer(parts[1], np.int32), array)


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


@pytest.mark.parametrize("kind", ["prefill", "verify", "end"])
def test_the_largest_message_that_is_allowed_fits_a_header(kind):
    """Each row is fit to be sent, so their number must not make a message that nobody takes."""
    b, large = wire.MAX_REQUESTS, (1 << 53) - 1
    sent = header(
        kind, requests=["😀" * (MAX_REQUEST_ID_BYTES // 4)] * b, domains=["x" * 32] * b,
        reasons=["retract"] * b, flags=[1] * b, session="s" * 64, target="t" * 64,
        dropped={f"{n:064d}": large for n in range(wire.MAX_CAUSES)},
    )  # fmt: skip
    assert all(map(request_id_fits, sent.requests))
    part = wire.encode(sent, MESSAGES[kind]()[1])[0]
    assert wire.read_header(part).requests == sent.requests


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
