"""Servers and trainer are upgraded one after the other, in either order: each side takes what the
other one wrote before, refuses only what it cannot understand, and says which side to upgrade.
"""

import json
import logging
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
from deadline import until
from wire_messages import MAX, MESSAGES, header

from aurora_sglang_plugin.link import schemas, wire

# What Aurora wrote when schema 2 was the newest: the parts of a message of each kind, in hex.
BEFORE = json.loads((Path(__file__).parents[2] / "support" / "schema_2.json").read_text())


class Frame2(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    dtype: str
    shape: tuple[int, ...]


class Header2(msgspec.Struct, forbid_unknown_fields=True):
    """As the trainers of that time read it: any other field was refused."""

    schema: int
    kind: str
    session: str
    captured_seq: int
    sent_seq: int
    heartbeats: int
    dropped: dict[str, int]
    queued: int
    target: str
    draft_version: int
    extend_version: int
    time_ns: int
    requests: list[str] = []
    flags: list[int] = []
    reasons: list[str] = []
    domains: list[str] = []
    num_steps: int = 0
    topk: int = 0
    rejection: bool = False
    frames: list[Frame2] = []


def with_fields(part: bytes, **fields) -> bytes:
    return msgspec.msgpack.encode(msgspec.msgpack.decode(part) | fields)


@pytest.mark.parametrize("kind", BEFORE)
def test_a_newer_trainer_takes_what_an_older_server_sends(kind):
    sent, arrays = MESSAGES[kind]()
    message = wire.decode([bytes.fromhex(part) for part in BEFORE[kind]], max_bytes=MAX)
    assert message.header.schema == 2
    assert msgspec.structs.replace(message.header, schema=sent.schema) == msgspec.structs.replace(
        sent, frames=message.header.frames
    )
    assert all(np.array_equal(message.arrays[name], array) for name, (_, array) in arrays.items())


@pytest.mark.parametrize("kind", BEFORE)
def test_an_older_trainer_takes_what_a_newer_server_sends(kind):
    """Whatever is new is not in a message that does not use it."""
    sent, arrays = MESSAGES[kind]()
    part = bytes(wire.encode(sent, arrays)[0])
    read = msgspec.msgpack.decode(part, type=Header2)
    before = msgspec.msgpack.decode(bytes.fromhex(BEFORE[kind][0]), type=Header2)
    assert read == before and read.schema == 2


@pytest.mark.parametrize("kind", MESSAGES)
def test_what_a_reader_may_pass_over_is_passed_over(kind):
    sent, arrays = MESSAGES[kind]()
    parts = [bytes(part) for part in wire.encode(sent, arrays)]
    parts[0] = with_fields(parts[0], added_later={"of": ["any", "type"]})
    assert wire.decode(parts, max_bytes=MAX).header == sent


@pytest.mark.parametrize(
    "schema, fields, side",
    [
        (schemas.SCHEMAS[-1] + 1, {}, "trainer"),
        # it has a kind and a type that this side never heard of
        (schemas.SCHEMAS[-1] + 7, {"kind": "gradient", "session": 7}, "trainer"),
        (schemas.SCHEMAS[0] - 1, {}, "server"),
        # schema 1 called it so
        (1, {"epoch": "e", "session": None}, "server"),
    ],
)
def test_another_schema_is_refused_whatever_is_in_it_with_the_side_to_upgrade(schema, fields, side):
    part = with_fields(bytes(wire.encode(header("heartbeat"), {})[0]), schema=schema, **fields)
    with pytest.raises(wire.WireError, match=f"schema {schema}, .* upgrade the {side}") as error:
        wire.decode([part], max_bytes=MAX)
    assert error.value.cause == "schema"


def test_what_is_written_is_read():
    assert list(schemas.SCHEMAS) == sorted(schemas.SCHEMAS) and 2 in schemas.SCHEMAS
    assert schemas.SCHEMA_VERSION in schemas.SCHEMAS


def test_a_server_of_tomorrow_disturbs_no_other(receive, link, caplog):
    """It is counted and said once; a server of before and one of today are learned from."""
    receiver = receive()
    push = zmq.Context.instance().socket(zmq.PUSH)
    push.linger = 0
    push.connect(link.endpoint)

    def send(number, **fields):
        end, arrays = MESSAGES["end"]()
        end = msgspec.structs.replace(end, sent_seq=number, captured_seq=number)
        parts = [bytes(part) for part in wire.encode(end, arrays)]
        push.send_multipart([with_fields(parts[0], **fields), *parts[1:]])

    with caplog.at_level(logging.ERROR):
        for number in (1, 2, 3):
            send(number, session="before", schema=2)
            send(number, session="tomorrow", schema=99, frames="otherwise")
            send(number, session="today")
        until(lambda: receiver.ledger()["rejected"].get("schema") == 3)
        found = [receiver.get(5.0) for _ in range(6)]
    assert [m.header.session for m in found] == ["before", "today"] * 3
    assert {s: e["lost"] for s, e in receiver.ledger()["sessions"].items()} == {
        "before": 0, "today": 0
    }  # fmt: skip
    assert len([r for r in caplog.records if "upgrade the trainer" in r.message]) == 1
    push.close()
