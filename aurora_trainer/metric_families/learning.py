"""The metrics of what was learned: steps, and the versions and checkpoints made of them.

Declared like those of intake.py.
"""

from __future__ import annotations

from aurora_sglang_plugin.metric_families import Family, counter, gauge, histogram
from aurora_trainer.metric_families.readers import (
    NODES,
    WHEN,
    accept_lengths,
    at,
    by_depth,
    if_applied,
    not_finite,
)

ACTIVITIES = ("wait", "assemble", "train", "publish", "checkpoint", "other")
# trainer.batch.depth is at most 16
DEPTHS = tuple(str(d) for d in range(1, 17))
# jobs of disk_faults.py
JOBS = ("step", "message", "publish", "checkpoint", "rejected", "status", "tensorboard", "ledger")
# the gate's answers
REFUSALS = ("not_better", "worse", "few_requests", "not_finite")
DECISIONS = ("better", "off", "initial", *REFUSALS)
ROLES = ("live", "mean", "initial")
# what said that traffic changed
CHANGES = ("accept_length", "initial")
OUTCOMES = (
    "published",
    "unchanged",
    "rolled_back",
    "gone_back",
    "failed",
    *(f"refused_{reason}" for reason in REFUSALS),
)

_STEP_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_WRITE_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LENGTH = (1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.5, 4, 4.5, 5, 6, 7, 8)

# training steps
TRAINING: dict[str, Family] = {
    "aurora_trainer_steps": counter(
        "Batches taken for training, skipped ones included",
        look="Flat while messages come: `trainer.pace`, or nothing usable.",
        read=at("steps"),
    ),
    "aurora_trainer_skipped_steps": counter(
        "Steps that changed nothing: this was not finite",
        look="Any growth: a too high learning rate, or broken data.",
        read=not_finite,
        on="step",
        cause=("loss", "gradient"),
    ),
    "aurora_trainer_trained_tokens": counter(
        "Tokens trained on, repetitions included",
        look="Its rate is the tokens per second.",
        read=at("tokens"),
    ),
    "aurora_trainer_step_seconds": histogram(
        "Duration of a training step",
        look="Speed of training. Host time of the whole step.",
        read=lambda event: [event.seconds],
        on="step",
        bounds=_STEP_S,
    ),
    "aurora_trainer_time_seconds": counter(
        "Where the trainer's time goes",
        look="The rate of each activity is its share of the time; all add up to 1. `wait`: no"
        " data to be had, the trainer is faster than traffic. `train` near 1: it is the"
        " bottleneck.",
        read=at("time_s"),
        activity=ACTIVITIES,
    ),
    "aurora_trainer_optimizer_step": gauge(
        "Updates of the draft so far, over restarts",
        look="As in checkpoints and manifests.",
        read=at("optimizer_step"),
    ),
    "aurora_trainer_loss": gauge(
        "Objective of the last step",
        look="Noisy; see the loss by depth for a trend.",
        read=if_applied("loss"),
        on="step",
    ),
    "aurora_trainer_gradient_norm": gauge(
        "Norm of the whole gradient in the last step, before clipping",
        look="Spikes; `trainer.optimizer.clip_norm` is the bound that is applied.",
        read=if_applied("grad_norm"),
        on="step",
    ),
    "aurora_trainer_learning_rate": gauge(
        "Learning rate of the last step",
        look="Schedule.",
        read=lambda event: event.step.update.lr,
        on="step",
    ),
    "aurora_trainer_batch_accept_length_tokens": histogram(
        "Mean accept length of a batch's unseen samples, before and after training on it",
        look="Test-then-train: each batch is scored before it is trained on, on samples that were"
        " never trained on, by the walk of `aurora_trainer/learn/accept_length.py`; trees (topk"
        " > 1) on every `rescore_every_steps`-th batch. `before` rising: the draft learns the"
        " traffic. `after` is measured on every `trainer.metrics.rescore_every_steps`-th batch; far"
        " above `before`: it memorises.",
        read=accept_lengths,
        on="step",
        bounds=_LENGTH,
        when=WHEN,
    ),
    "aurora_trainer_scored_nodes": counter(
        "Draft predictions that were compared with the target",
        look="The count under the next three. Depth 1 is the first draft token. `rejected` is 0"
        " unless `trainer.loss.rejected` is above 0.",
        read=by_depth("count"),
        on="step",
        depth=DEPTHS,
        nodes=NODES,
    ),
    "aurora_trainer_node_loss": counter(
        "Sum over scored nodes of their distance to the target",
        look="Divided by scored nodes: the mean distance D (docs/algorithm.md) at each depth, for"
        " nodes on the accepted path and for rejected ones.",
        read=by_depth("loss"),
        on="step",
        depth=DEPTHS,
        nodes=NODES,
    ),
    "aurora_trainer_greedy_matches": counter(
        "Scored nodes whose first choice is the target's",
        look="Divided by scored nodes: acceptance of greedy requests at each depth, given the"
        " true tokens above.",
        read=by_depth("greedy_match"),
        on="step",
        depth=DEPTHS,
        nodes=NODES,
    ),
    "aurora_trainer_overlap": counter(
        "Sum over scored nodes of sum min(p, q), the chance that rejection sampling accepts",
        look="Divided by scored nodes: acceptance with `--speculative-use-rejection-sampling`, p"
        " at temperature 1, its tail an upper bound. SGLang's default verification accepts by p"
        " alone: see the accept length.",
        read=by_depth("overlap"),
        on="step",
        depth=DEPTHS,
        nodes=NODES,
    ),
}

# versions and checkpoints
VERSIONS: dict[str, Family] = {
    "aurora_trainer_watched_samples": counter(
        "Samples that were walked when they came, with the served and the initial draft",
        look="All of them, unless the trainer is slower than its traffic: then an eighth of the"
        " positions that it trains on.",
        read=at("watched_samples"),
    ),
    "aurora_trainer_traffic_changes": counter(
        "Alarms that traffic changed: the served draft accepts less than it did, or the initial one"
        " is clearly ahead of it",
        look="The gate lets go of requests from before, and training works at full pace; where the"
        " accept length fell, schedule and mean begin again. Many a day: traffic that comes in"
        " blocks.",
        read=at("traffic_changes"),
        cause=CHANGES,
    ),
    "aurora_trainer_change_score": gauge(
        "How near the alarm is: the CUSUM of `aurora_trainer/learn/drift.py` over its limit",
        look="At 0 most of the time; above 1 is the alarm, and it begins again.",
        read=at("change_score"),
    ),
    "aurora_trainer_samples_since_change": gauge(
        "Samples since the last alarm that traffic changed, or since the start",
        look="Beside the accept length: how long a draft takes to follow.",
        read=at("samples_since_change"),
    ),
    "aurora_trainer_resting": gauge(
        "1 while training rests: fewer steps, because the served draft gains nothing any more",
        look="See `trainer.drift.rest_samples`. An alarm ends it, and so does a gain.",
        read=at("resting"),
    ),
    "aurora_trainer_draft_version": gauge(
        "Newest published version",
        look="See `aurora_draft_version`.",
        read=at("draft_version"),
    ),
    "aurora_trainer_publications": counter(
        "What became of the draft each time that it was offered",
        look="`refused_*`: the gate. `unchanged`: the newest version has these weights."
        " `rolled_back`: by a server. `gone_back`: the candidate stayed worse, and training began"
        " again from the served weights. `failed`: the disk refused, see the log; it is tried"
        " again.",
        read=at("published"),
        outcome=OUTCOMES,
    ),
    "aurora_trainer_published_drafts": counter(
        "Versions by the draft that they are: live, the weights; mean, their running mean; initial",
        look="`initial`: the draft that training began with was ahead of what was served, ordinary"
        " after a change of traffic. Again and again: training does harm, see the gate's figures.",
        read=at("published_roles"),
        role=ROLES,
    ),
    "aurora_trainer_gate_decisions": counter(
        "The gate's answers; better and off let pass, initial publishes the initial draft",
        look="`not_better`: not ahead by a standard error, the ordinary answer of a draft that has"
        " learned its traffic. Mostly `worse`: training does harm, see the loss. `few_requests`:"
        " too few were held back so far.",
        read=at("gate"),
        reason=DECISIONS,
    ),
    "aurora_trainer_gate_served_accept_length_tokens": gauge(
        "Accept length of the served weights, at the gate's last answer",
        look="The proof that a version helps: the same unseen requests under both.",
        read=at("accept_length_served"),
    ),
    "aurora_trainer_gate_candidate_accept_length_tokens": gauge(
        "Accept length of the candidate, at the gate's last answer",
        look="See above.",
        read=at("accept_length_candidate"),
    ),
    "aurora_trainer_gate_initial_accept_length_tokens": gauge(
        "Accept length of the initial draft, at the gate's last answer",
        look="What all the training is worth on today's traffic.",
        read=at("accept_length_initial"),
    ),
    "aurora_trainer_gate_requests": gauge(
        "Requests that the gate's last answer rests on",
        look="Below `trainer.gate.min_requests` nothing is published.",
        read=at("gate_requests"),
    ),
    "aurora_trainer_publish_seconds": histogram(
        "Time to write and publish a version",
        look="Slow disk or network file system; training goes on meanwhile. Includes the gate.",
        read=lambda event: [event.seconds],
        on="publish",
        bounds=_WRITE_S,
    ),
    "aurora_trainer_publication_age_seconds": gauge(
        "Time since a version was published, or since the start",
        look="Publishing stalled.",
        read=at("publication_age_s"),
    ),
    "aurora_trainer_checkpoint_seconds": histogram(
        "Time to write a checkpoint",
        look="Slow disk; training goes on meanwhile, but for the snapshot.",
        read=lambda event: [event.seconds] if event.whole else [],
        on="checkpoint",
        bounds=_WRITE_S,
    ),
    "aurora_trainer_checkpoint_age_seconds": gauge(
        "Time since a checkpoint was written, or since the start",
        look="What a crash would lose.",
        read=at("checkpoint_age_s"),
    ),
    "aurora_trainer_checkpoint_errors": counter(
        "Checkpoints that could not be written",
        look="Any growth: a full disk.",
        read=lambda event: int(not event.whole),
        on="checkpoint",
    ),
    "aurora_trainer_faults": counter(
        "Faults of disk or device that were survived; the job is tried again",
        look="`publish`, `checkpoint`, `rejected` (reading what servers rolled back), `status`,"
        " `tensorboard`, `ledger`: the disk is full, read-only or gone. `step`: the device, or"
        " one sample; its batch is tried again in parts. `message`: a defect, report it. Each"
        " episode is logged once.",
        read=at("faults"),
        job=JOBS,
    ),
}
