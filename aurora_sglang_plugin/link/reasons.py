"""Why something is not used: every closed list of reasons of server and link, once.

They are label values of metrics, keys of counters, and words of messages. Those of a request's row
are in rows.py, those of a request that is not captured in serve/excluded.py.
"""

from aurora_sglang_plugin.drafts.kinds import BAD_MAP

# Why a captured message was never sent (the server).
DROPS = ("queue_full", "no_buffer", "too_large", "build", "publish", "closed")

# Why a received message was not used (the trainer): what wire.py finds, then what the receiver
# finds.
UNREADABLE = ("header", "schema", "frames", "dtype", "shape", "size", "values")
REJECTED = (*UNREADABLE, "target", "order", "failed")

# Why a connection was refused at the handshake, as the server and as the trainer see it.
REFUSED_BY_TRAINER = ("key", "protocol", "unfinished")
REFUSED_PEERS = (*REFUSED_BY_TRAINER, "garbage", "unwatched")

# Why a published version was not loaded, or not swapped in (the server).
REFUSED_WEIGHTS = (
    "config", "current", BAD_MAP, "dtype", "format", "hash", "header", "manifest", "missing",
    "name", "names", "rejected", "shape", "size", "stage", "swap", "target", "values",
)  # fmt: skip
