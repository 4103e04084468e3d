"""CONTRACT 1, version by version: which messages either side understands.

A message has the lowest schema that says all of it, so that servers and trainer may be upgraded one
after the other, in either order: a newer server is refused for what it says, not for what it is. A
header's field that a reader may pass over needs no new schema: readers ignore what they do not
know, and a field at its default is not written.
"""

from __future__ import annotations

import msgspec

# what is written unless a message needs more; what features in a byte each need
SCHEMA_VERSION, FLOAT8_SCHEMA = 2, 3
# what is read, ascending
SCHEMAS = (2, 3)


class _Any(msgspec.Struct):
    """The header of a message of any schema."""

    schema: int


_decoder = msgspec.msgpack.Decoder(_Any)


def refusal(part: bytes | memoryview) -> str | None:
    """Why a header is of a schema that this side does not read, whatever else is in it; else
    None.
    """
    try:
        schema = _decoder.decode(part).schema
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    if schema in SCHEMAS:
        return None
    side = "trainer" if schema > SCHEMAS[-1] else "server"
    return f"schema {schema}, this side reads {SCHEMAS[0]} to {SCHEMAS[-1]}: upgrade the {side}"
