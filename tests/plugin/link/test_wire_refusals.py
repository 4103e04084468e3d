"""What can be wrong with a message, and what it costs: all of it, or the one request whose row is
bad.
"""

import numpy as np
import pytest
from wire_messages import MAX, MESSAGES, i32

from aurora_sglang_plugin.link import rows, wire


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


def scales(*shape):
    return change(aux_scales=("float32", np.ones(shape, np.float32)))


# What costs the message: its header, ...
BAD_HEADER = {
    "old schema": ("verify", head(schema=0), "schema"),
    "new schema": ("verify", head(schema=4), "schema"),
    "empty session": ("verify", head(session=""), "header"),
    "long target": ("verify", head(target="x" * 65), "header"),
    "long cause": ("verify", head(dropped={"x" * 65: 1}), "header"),
    "many causes": ("verify", head(dropped={str(n): 1 for n in range(33)}), "header"),
    "negative counter": ("verify", head(dropped={"queue_full": -1}), "values"),
    "huge counter": ("verify", head(sent_seq=1 << 60), "values"),
    "captured more than it tells of": ("verify", head(captured_seq=1 << 52), "values"),
    "captured what is still queued": ("verify", head(captured_seq=5, queued=4), "values"),
    "heartbeat of more than it tells of": (
        "heartbeat",
        head(captured_seq=7, queued=4, dropped={"queue_full": 1}),
        "values",
    ),
    "more heartbeats than messages": (
        "verify",
        head(heartbeats=2, dropped={"queue_full": 9}),
        "values",
    ),
    "version beyond int32": ("verify", head(draft_version=1 << 40), "values"),
    "more requests than a step has": ("heartbeat", head(requests=["r"] * 4097), "values"),
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
    "float8 of an older schema": (
        "verify",
        change(aux_hidden_states=("float8", np.zeros((6, 6), np.uint8))),
        "dtype",
    ),
    "scales of a dtype without": (
        "verify in float8",
        change(aux_hidden_states=("float32", np.zeros((6, 6), np.float32))),
        "dtype",
    ),
    "scales missing": ("verify", head(schema=3), "frames"),
    "a scale for less than a feature": ("verify in float8", scales(6, 12), "values"),
    "scales that no layers have": ("verify in float8", scales(6, 4), "values"),
    "no scales": ("verify in float8", scales(6, 0), "values"),
    "scales of fewer rows": ("prefill in float8", scales(3, 1), "shape"),
    "no steps": ("verify", cut("P", 1, num_steps=0), "values"),
    "a million steps": ("verify", head(num_steps=10**6), "values"),
    "negative steps": ("verify", head(num_steps=-1), "values"),
    "too many steps": ("verify", head(num_steps=17), "values"),
    "steps that are not the paths'": ("verify", head(num_steps=3), "values"),
    "no beams": ("verify", head(topk=0), "values"),
    "a million beams": ("verify", head(topk=10**6), "values"),
    "more nodes than beams make": ("verify", wide("N", 17), "values"),
}

# What costs one request: the other one of the message goes on.
BAD_ROW = {
    "long id": ("verify", head(requests=["x" * 257, "b"]), "request"),
    "long id in bytes": ("verify", head(requests=["😀" * 65, "b"]), "request"),
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
    "float8 NaN": ("verify in float8", at("aux_hidden_states", (0, 0), 0x7F), "not_finite"),
    "float8 -NaN": ("verify in float8", at("aux_hidden_states", (1, 0), 0xFF), "not_finite"),
    "float8 of NaN": ("verify in float8", at("aux_scales", (0, 1), np.nan), "not_finite"),
    "float8 of inf": ("prefill in float8", at("aux_scales", (0, 0), np.inf), "not_finite"),
    "float8 turned around": ("verify in float8", at("aux_scales", (1, 0), -1), "not_finite"),
    "float8 beyond squares": ("prefill in float8", at("aux_scales", (1, 0), 1e10), "not_finite"),
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


@pytest.mark.parametrize("kind", ["prefill", "verify", "end", "verify in float8"])
def test_a_refused_message_has_a_stand_in(kind):
    sent, arrays = MESSAGES[kind]()
    stand_in = wire.decode([bytes(p) for p in wire.missing(sent)], max_bytes=MAX)
    assert stand_in.bad == {0: "length", 1: "length"} and stand_in.header.requests == sent.requests
    for name in ("session", "captured_seq", "sent_seq", "dropped", "time_ns", "draft_version"):
        assert getattr(stand_in.header, name) == getattr(sent, name)
