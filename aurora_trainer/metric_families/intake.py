"""The metrics of what came in: messages, the recording, samples and the buffer.

A metric is declared once: name, help, what to look for (`make docs` prints all three into
docs/metrics.md), how its value is read, and its labels. Most are read from the daemon's status
record, `read=at("buffer.bytes")`; those with `on` from what just happened (readers.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aurora_sglang_plugin.link.reasons import DROPS, REFUSED_PEERS, REJECTED
from aurora_sglang_plugin.link.rows import CAUSES as ROW_CAUSES
from aurora_sglang_plugin.metric_families import Family, counter, gauge, histogram
from aurora_trainer.metric_families.readers import at

if TYPE_CHECKING:
    from aurora_trainer.metric_families.readers import Trained

UNUSABLE = (
    "wrong_feature_width", "token_out_of_vocabulary", "without_targets", "altered",
    "wrong_target_messages", "lost_open", "lost_held", "unwalkable",
)  # fmt: skip
EVENTS = (
    "after_end", "cut_back", "dropped_no_target", "dropped_short", "duplicate", "evicted", "holes",
    "rootless_trees", "trimmed",
)  # fmt: skip
PREFIX_POSITIONS = ("found", "missing")
ROWS = ("with_target", "altered")
UNRECORDED = ("disk", "full")
LEFT = ("used_up", "evicted", "replaced", "stale", "failed", "lost")

_AGE_S = (1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_VERSIONS = (0, 1, 2, 3, 5, 10, 20, 50, 100)


def sample_ages(event: Trained) -> list[float]:
    return [max(0.0, event.now_s - time_ns / 1e9) for time_ns in event.step.time_ns]


# from servers
STREAM: dict[str, Family] = {
    "aurora_trainer_received_messages": counter(
        "Messages accepted from servers, heartbeats included",
        look="Flat: no server sends, or nothing reaches this port.",
        read=at("received"),
    ),
    "aurora_trainer_received_bytes": counter(
        "Bytes of the messages accepted from servers",
        look="Bandwidth of the link.",
        read=at("received_bytes"),
    ),
    "aurora_trainer_lost_messages": counter(
        "Messages that a server sent and that never arrived (gaps in its count)",
        look="A server or this trainer was killed, or a connection broke within messages. Sent ="
        " received + lost + rejected, per server.",
        read=at("lost"),
    ),
    "aurora_trainer_rejected_messages": counter(
        "Messages that arrived and could not be used",
        look="`target`: a server with another target. `order`: repeats. `failed`: a fault of the"
        " trainer, see its log. All others: damaged, of another version of Aurora, or not from a"
        " server at all.",
        read=at("rejected"),
        cause=REJECTED,
    ),
    "aurora_trainer_refused_peers": counter(
        "Connections that were refused at the handshake",
        look="`key`: a server whose key is not on the list, or a stranger. `protocol`: plaintext"
        " against keys, or another trainer's key. `unfinished`, `garbage`: port scans and the"
        " like. `unwatched`: seconds in which too many came to be counted. See"
        " [security.md](security.md).",
        read=at("refused_peers"),
        cause=REFUSED_PEERS,
    ),
    "aurora_trainer_reported_drops": counter(
        "Messages that servers dropped, as they report it",
        look="The servers' `aurora_dropped_messages_total`, for those who only see the trainer.",
        read=at("dropped"),
        cause=DROPS,
    ),
    "aurora_trainer_receive_queue_bytes": gauge(
        "Received messages that wait for the training loop",
        look="At `trainer.receive.queue_bytes`: the trainer is too slow, and drops begin at the"
        " servers.",
        read=at("receive_queue_bytes"),
    ),
    "aurora_trainer_servers": gauge(
        "Servers that were heard within the last 10 s",
        look="Fewer than you run: some do not reach it.",
        read=at("servers"),
    ),
    "aurora_trainer_message_age_seconds": gauge(
        "Time since the last message or heartbeat of any server",
        look="Above a few seconds: no server is there (they send heartbeats).",
        read=at("message_age_s"),
    ),
    "aurora_trainer_verify_steps": counter(
        "Verify steps received, one for each request in a step",
        look="Traffic.",
        read=at("traffic.steps"),
    ),
    "aurora_trainer_committed_tokens": counter(
        "Tokens that the received verify steps committed, bonus included",
        look="Divided by the verify steps: the accept length of the traffic, as in the server.",
        read=at("traffic.tokens"),
    ),
}

# run --record
RECORDING: dict[str, Family] = {
    "aurora_trainer_recorded_messages": counter(
        "Messages written to the recording",
        look="Flat beside a growing `aurora_trainer_received_messages_total`: see the next one.",
        read=at("recording.messages"),
    ),
    "aurora_trainer_unrecorded_messages": counter(
        "Messages that were not written to the recording",
        look="`disk`: the disk refused them, full perhaps, or their file was removed; it is"
        " tried again every second."
        " `full`: `trainer.record.max_bytes` is reached and `when_full` is `stop`.",
        read=at("unrecorded"),
        cause=UNRECORDED,
    ),
    "aurora_trainer_recording_bytes": gauge(
        "Size of the recording on disk, 0 where there is none",
        look="At `trainer.record.max_bytes` the oldest files go.",
        read=at("recording.bytes"),
    ),
}

# samples, and the buffer that keeps them
SAMPLES: dict[str, Family] = {
    "aurora_trainer_samples": counter(
        "Samples put together from messages",
        look="Flat while messages come: requests are long, or their ends are lost.",
        read=at("samples.assembled"),
    ),
    "aurora_trainer_unusable_samples": counter(
        "Samples or messages that training could not use",
        look="`wrong_*`: a server whose target or layers differ. `lost_open`: were open at a"
        " restart. `unwalkable`: the gate could not score them, and holds them no longer.",
        read=at("unusable"),
        cause=UNUSABLE,
    ),
    "aurora_trainer_rows": counter(
        "Generated positions, with a target or under a grammar's mask or a watermark (altered)",
        look="Only `altered` grows: this traffic teaches nothing (alert AuroraNothingToLearn).",
        read=at("rows"),
        target=ROWS,
    ),
    "aurora_trainer_prefix_positions": counter(
        "Positions of prefixes that the server had cached, wanted as context of a sample",
        look="`found`: an earlier request had computed them. `missing`: the draft learns these"
        " requests without that much of their beginning; raise"
        " `plugin.capture.max_prompt_features` and `trainer.assemble.prefix_bytes`.",
        read=at("prefix_positions"),
        outcome=PREFIX_POSITIONS,
    ),
    "aurora_trainer_assembly_events": counter(
        "Unusual things that happened while samples were put together",
        look="`holes`: messages are missing. `evicted`: `trainer.assemble` bounds are too small."
        " `cut_back`, `after_end`, `rootless_trees`: ordinary. `trimmed`: chunks of prompts longer"
        " than `trainer.assemble.max_positions`.",
        read=at("assembly_events"),
        event=EVENTS,
    ),
    "aurora_trainer_bad_rows": counter(
        "Requests' rows in received messages that could not be used",
        look="Each ends one request's sample and nothing else. `length` also stands for each"
        " request of a refused message. A server leaves such rows out, so any growth comes from"
        " another version of Aurora, or from no server.",
        read=at("bad_rows"),
        cause=ROW_CAUSES,
    ),
    "aurora_trainer_open_requests": gauge(
        "Requests whose end was not seen yet",
        look="Grows without end: ends are lost; `trainer.assemble.idle_s` takes them.",
        read=at("open_requests"),
    ),
    "aurora_trainer_open_bytes": gauge(
        "Memory of requests whose end was not seen yet",
        look="Memory.",
        read=at("open_bytes"),
    ),
    "aurora_trainer_buffer_bytes": gauge(
        "Memory of the samples in the buffer",
        look="At `trainer.buffer.max_bytes`: the oldest leave.",
        read=at("buffer.bytes"),
    ),
    "aurora_trainer_buffer_samples": gauge(
        "Samples in the buffer",
        look="0 while messages come: samples are unusable.",
        read=at("buffer.samples"),
    ),
    "aurora_trainer_buffer_fresh_samples": gauge(
        "Samples in the buffer that were never trained on",
        look="Grows: training is slower than traffic.",
        read=at("buffer.fresh_samples"),
    ),
    "aurora_trainer_buffer_left_samples": counter(
        "Samples that left the buffer",
        look="`evicted` never were trained on. `used_up` is the ordinary end. `stale`: older than"
        " `trainer.buffer.max_age_s`. `failed`: training on it alone raised, or was not finite."
        " `lost`: at a restart.",
        read=at("buffer_dropped"),
        cause=LEFT,
    ),
    "aurora_trainer_buffer_largest_share": gauge(
        "Share of the buffer's bytes that one domain and server hold at most",
        look="Near 1 with several domains or servers at a full buffer: `trainer.buffer.share_by`"
        " is off.",
        read=at("buffer.largest_share"),
    ),
    "aurora_trainer_sample_age_seconds": histogram(
        "Age of a sample when it is trained on, since its capture",
        look="Old samples teach old traffic. A server's clock that is wrong by more than 5 s is"
        " put right by its heartbeats.",
        read=sample_ages,
        on="step",
        bounds=_AGE_S,
    ),
    "aurora_trainer_staleness_versions": histogram(
        "Newest version minus the one that drafted a sample, when it is trained on",
        look="How far off-policy training is: trees of older versions than the newest.",
        read=lambda event: [max(0, versions) for versions in event.step.staleness],
        on="step",
        bounds=_VERSIONS,
    ),
}
