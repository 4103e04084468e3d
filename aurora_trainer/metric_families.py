"""Every metric that the trainer exports, and where in the status its value is. docs/metrics.md
explains them.
"""

from __future__ import annotations

from aurora_sglang_plugin.link.reasons import DROPS, REFUSED_PEERS, REJECTED
from aurora_sglang_plugin.link.rows import CAUSES as ROW_CAUSES
from aurora_sglang_plugin.metric_families import Family, counter, gauge, histogram

ACTIVITIES = ("wait", "assemble", "train", "publish", "checkpoint", "other")
WHEN = ("before", "after")
NODES = ("accepted", "rejected")
# trainer.batch.depth is at most 16
DEPTHS = tuple(str(d) for d in range(1, 17))
EVENTS = (
    "after_end", "cut_back", "dropped_no_target", "dropped_short", "duplicate", "evicted", "holes",
    "rootless_trees",
)  # fmt: skip
PREFIX_POSITIONS = ("found", "missing")
UNUSABLE = (
    "wrong_feature_width", "token_out_of_vocabulary", "without_targets", "altered",
    "wrong_target_messages", "lost_open", "lost_held",
)  # fmt: skip
ROWS = ("with_target", "altered")
UNRECORDED = ("disk", "full")
LEFT = ("used_up", "evicted", "replaced", "stale", "failed", "lost")
# jobs of retry.py
JOBS = ("step", "message", "publish", "checkpoint", "rejected", "status", "tensorboard", "ledger")
DECISIONS = ("better", "off", "initial", "not_better", "worse", "few_requests", "not_finite")
OUTCOMES = (
    "published", "unchanged", "rolled_back", "gone_back", "failed", "refused_not_better",
    "refused_worse", "refused_few_requests", "refused_not_finite",
)  # fmt: skip

_STEP_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_WRITE_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_AGE_S = (1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_LENGTH = (1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.5, 4, 4.5, 5, 6, 7, 8)
_VERSIONS = (0, 1, 2, 3, 5, 10, 20, 50, 100)

FAMILIES: dict[str, Family] = {
    # the stream
    "aurora_trainer_received_messages": counter(
        "Messages accepted from servers, heartbeats included"
    ),
    "aurora_trainer_received_bytes": counter("Bytes of the messages accepted from servers"),
    "aurora_trainer_lost_messages": counter(
        "Messages that a server sent and that never arrived (gaps in its count)"
    ),
    "aurora_trainer_rejected_messages": counter(
        "Messages that arrived and could not be used", cause=REJECTED
    ),
    "aurora_trainer_refused_peers": counter(
        "Connections that were refused at the handshake", cause=REFUSED_PEERS
    ),
    "aurora_trainer_reported_drops": counter(
        "Messages that servers dropped, as they report it", cause=DROPS
    ),
    "aurora_trainer_receive_queue_bytes": gauge(
        "Received messages that wait for the training loop"
    ),
    "aurora_trainer_servers": gauge("Servers that were heard within the last 10 s"),
    "aurora_trainer_message_age_seconds": gauge(
        "Time since the last message or heartbeat of any server"
    ),
    "aurora_trainer_verify_steps": counter("Verify steps received, one for each request in a step"),
    "aurora_trainer_committed_tokens": counter(
        "Tokens that the received verify steps committed, bonus included"
    ),
    # the recording (run --record)
    "aurora_trainer_recorded_messages": counter("Messages written to the recording"),
    "aurora_trainer_unrecorded_messages": counter(
        "Messages that were not written to the recording", cause=UNRECORDED
    ),
    "aurora_trainer_recording_bytes": gauge("Size of the recording on disk, 0 where there is none"),
    # samples
    "aurora_trainer_samples": counter("Samples put together from messages"),
    "aurora_trainer_unusable_samples": counter(
        "Samples or messages that training could not use", cause=UNUSABLE
    ),
    "aurora_trainer_rows": counter(
        "Generated positions, with a target or under a grammar's mask or a watermark (altered)",
        target=ROWS,
    ),
    "aurora_trainer_assembly_events": counter(
        "Unusual things that happened while samples were put together", event=EVENTS
    ),
    "aurora_trainer_prefix_positions": counter(
        "Positions of prefixes that the server had cached, wanted as context of a sample",
        outcome=PREFIX_POSITIONS,
    ),
    "aurora_trainer_bad_rows": counter(
        "Requests' rows in received messages that could not be used", cause=ROW_CAUSES
    ),
    "aurora_trainer_open_requests": gauge("Requests whose end was not seen yet"),
    "aurora_trainer_open_bytes": gauge("Memory of requests whose end was not seen yet"),
    # the buffer
    "aurora_trainer_buffer_bytes": gauge("Memory of the samples in the buffer"),
    "aurora_trainer_buffer_samples": gauge("Samples in the buffer"),
    "aurora_trainer_buffer_fresh_samples": gauge(
        "Samples in the buffer that were never trained on"
    ),
    "aurora_trainer_buffer_left_samples": counter("Samples that left the buffer", cause=LEFT),
    "aurora_trainer_buffer_largest_share": gauge(
        "Share of the buffer's bytes that one domain and server hold at most"
    ),
    "aurora_trainer_sample_age_seconds": histogram(
        "Age of a sample when it is trained on, since its capture", bounds=_AGE_S
    ),
    "aurora_trainer_staleness_versions": histogram(
        "Newest version minus the one that drafted a sample, when it is trained on",
        bounds=_VERSIONS,
    ),
    # training
    "aurora_trainer_steps": counter("Batches taken for training, skipped ones included"),
    "aurora_trainer_skipped_steps": counter(
        "Steps that changed nothing: this was not finite", cause=("loss", "gradient")
    ),
    "aurora_trainer_trained_tokens": counter("Tokens trained on, repetitions included"),
    "aurora_trainer_step_seconds": histogram("Duration of a training step", bounds=_STEP_S),
    "aurora_trainer_time_seconds": counter("Where the trainer's time goes", activity=ACTIVITIES),
    "aurora_trainer_optimizer_step": gauge("Updates of the draft so far, over restarts"),
    "aurora_trainer_loss": gauge("Objective of the last step"),
    "aurora_trainer_gradient_norm": gauge(
        "Norm of the whole gradient in the last step, before clipping"
    ),
    "aurora_trainer_learning_rate": gauge("Learning rate of the last step"),
    "aurora_trainer_batch_accept_length_tokens": histogram(
        "Mean accept length of a batch's unseen samples, before and after training on it",
        bounds=_LENGTH,
        when=WHEN,
    ),
    "aurora_trainer_scored_nodes": counter(
        "Draft predictions that were compared with the target", depth=DEPTHS, nodes=NODES
    ),
    "aurora_trainer_node_loss": counter(
        "Sum over scored nodes of their distance to the target", depth=DEPTHS, nodes=NODES
    ),
    "aurora_trainer_greedy_matches": counter(
        "Scored nodes whose first choice is the target's", depth=DEPTHS, nodes=NODES
    ),
    "aurora_trainer_overlap": counter(
        "Sum over scored nodes of sum min(p, q), the chance that rejection sampling accepts",
        depth=DEPTHS,
        nodes=NODES,
    ),
    # versions
    "aurora_trainer_draft_version": gauge("Newest published version"),
    "aurora_trainer_publications": counter(
        "What became of the draft each time that it was offered", outcome=OUTCOMES
    ),
    "aurora_trainer_gate_decisions": counter(
        "The gate's answers; better and off let pass, initial publishes the initial draft",
        reason=DECISIONS,
    ),
    "aurora_trainer_gate_served_accept_length_tokens": gauge(
        "Accept length of the served weights, at the gate's last answer"
    ),
    "aurora_trainer_gate_candidate_accept_length_tokens": gauge(
        "Accept length of the candidate, at the gate's last answer"
    ),
    "aurora_trainer_gate_initial_accept_length_tokens": gauge(
        "Accept length of the initial draft, at the gate's last answer"
    ),
    "aurora_trainer_gate_requests": gauge("Requests that the gate's last answer rests on"),
    "aurora_trainer_publish_seconds": histogram(
        "Time to write and publish a version", bounds=_WRITE_S
    ),
    "aurora_trainer_publication_age_seconds": gauge(
        "Time since a version was published, or since the start"
    ),
    "aurora_trainer_checkpoint_seconds": histogram("Time to write a checkpoint", bounds=_WRITE_S),
    "aurora_trainer_checkpoint_age_seconds": gauge(
        "Time since a checkpoint was written, or since the start"
    ),
    "aurora_trainer_checkpoint_errors": counter("Checkpoints that could not be written"),
    "aurora_trainer_faults": counter(
        "Faults of disk or device that were survived; the job is tried again", job=JOBS
    ),
}

# family -> where in the status its total is
COUNTED = {
    "aurora_trainer_received_messages": "received",
    "aurora_trainer_received_bytes": "received_bytes",
    "aurora_trainer_lost_messages": "lost",
    "aurora_trainer_rejected_messages": "rejected",
    "aurora_trainer_refused_peers": "refused_peers",
    "aurora_trainer_reported_drops": "dropped",
    "aurora_trainer_verify_steps": "traffic.steps",
    "aurora_trainer_committed_tokens": "traffic.tokens",
    "aurora_trainer_recorded_messages": "recording.messages",
    "aurora_trainer_unrecorded_messages": "unrecorded",
    "aurora_trainer_samples": "samples.assembled",
    "aurora_trainer_unusable_samples": "unusable",
    "aurora_trainer_rows": "rows",
    "aurora_trainer_assembly_events": "assembly_events",
    "aurora_trainer_prefix_positions": "prefix_positions",
    "aurora_trainer_bad_rows": "bad_rows",
    "aurora_trainer_buffer_left_samples": "buffer_dropped",
    "aurora_trainer_steps": "steps",
    "aurora_trainer_trained_tokens": "tokens",
    "aurora_trainer_publications": "published",
    "aurora_trainer_gate_decisions": "gate",
    "aurora_trainer_faults": "faults",
}

# family -> where in the status its value is
SHOWN = {
    "aurora_trainer_receive_queue_bytes": "receive_queue_bytes",
    "aurora_trainer_servers": "servers",
    "aurora_trainer_message_age_seconds": "message_age_s",
    "aurora_trainer_recording_bytes": "recording.bytes",
    "aurora_trainer_open_requests": "open_requests",
    "aurora_trainer_open_bytes": "open_bytes",
    "aurora_trainer_buffer_bytes": "buffer.bytes",
    "aurora_trainer_buffer_samples": "buffer.samples",
    "aurora_trainer_buffer_fresh_samples": "buffer.fresh_samples",
    "aurora_trainer_buffer_largest_share": "buffer.largest_share",
    "aurora_trainer_optimizer_step": "optimizer_step",
    "aurora_trainer_draft_version": "draft_version",
    "aurora_trainer_gate_served_accept_length_tokens": "accept_length_served",
    "aurora_trainer_gate_candidate_accept_length_tokens": "accept_length_candidate",
    "aurora_trainer_gate_initial_accept_length_tokens": "accept_length_initial",
    "aurora_trainer_gate_requests": "gate_requests",
}
