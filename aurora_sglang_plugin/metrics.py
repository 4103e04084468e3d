"""Every metric of the server, declared once: name, help, what to look for (`make docs` prints all
three into docs/metrics.md), how its value is read, and its labels.

To add one, write its declaration here. What it reads is counted in a plain attribute of who knows
it: scheduler and publisher count the same without metrics.

Every series has the labels tp_rank and dp_rank of its scheduler. Each tensor-parallel rank exports
what each rank does (attached, version, swaps); only rank 0 captures, so sums over ranks count
nothing twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING, Any

from aurora_sglang_plugin.link.reasons import DROPS, REFUSED_BY_TRAINER, REFUSED_WEIGHTS
from aurora_sglang_plugin.link.rows import CAUSES as ROW_CAUSES
from aurora_sglang_plugin.link.wire import MAX_STEPS
from aurora_sglang_plugin.metric_families import Family, counter, gauge, histogram
from aurora_sglang_plugin.serve.accepted_counts import ROLES, accepted, mean_length
from aurora_sglang_plugin.serve.audit import RESULTS
from aurora_sglang_plugin.serve.capture import KINDS
from aurora_sglang_plugin.serve.capture_boundary import SECONDS
from aurora_sglang_plugin.serve.excluded import CAUSES
from aurora_sglang_plugin.serve.swap_times import FRESHNESS_S, STALL_S, SWAP_S

if TYPE_CHECKING:
    from aurora_sglang_plugin.serve.capture import Capture
    from aurora_sglang_plugin.serve.control import Control
    from aurora_sglang_plugin.serve.swap import Reloader

MODES = ("live", "warm", "cold")
ROUNDS = ("cold", *(str(steps) for steps in range(MAX_STEPS + 1)))


@dataclass(frozen=True)
class State:
    """What the readers below read, taken once for each refresh."""

    control: Control
    reloader: Reloader
    # Reloader.counters()
    swaps: Mapping[str, Any]
    # None: off, or another rank's
    capture: Capture | None
    # Publisher.counters()
    link: Mapping[str, Any]


def starting_with(prefix: str, counters: Mapping[str, Any]) -> dict[str, Any]:
    """Those counters, without the prefix."""
    return {n.removeprefix(prefix): c for n, c in counters.items() if n.startswith(prefix)}


def by_position(counts: list[int]) -> dict[str, int]:
    return {str(position): count for position, count in enumerate(counts, 1)}


def each_role(s: State, figure: Callable[[list[int]], float]) -> dict[str, float]:
    """A figure of the current version's accept lengths, and of the previous one's."""
    return {role: figure(lengths) for role, lengths in s.capture.acceptance.of_role.items()}


def acceptance_ratios(s: State) -> dict[tuple[str, str], float]:
    return {
        (role, position): count / max(sum(lengths), 1)
        for role, lengths in s.capture.acceptance.of_role.items()
        for position, count in by_position(accepted(lengths)).items()
    }


# What every tensor-parallel rank exports.
OF_RANK: dict[str, Family] = {
    "aurora_attached": gauge(
        "1 where AURORA runs in this scheduler process",
        look="First of all. Absent or 0: the server runs without Aurora; see its log for `aurora`.",
        read=lambda s: 1,
    ),
    "aurora_mode": gauge(
        "1 for the present mode: live drafts, warm and cold decode plainly",
        look="`live`: the draft speculates. `warm`: plain decoding is faster for this many"
        " requests, the draft's KV is written all the same. `cold`: plain decoding is faster, and"
        " no pass of the draft runs; a better version or 20,000 rounds end it.",
        read=lambda s: {mode: mode == s.control.mode for mode in MODES},
        mode=MODES,
    ),
    "aurora_decode_rounds": counter(
        "Decode rounds by the draft steps that they had",
        look="What the server found fastest: `0` are plain rounds, `cold` those that left out the"
        " draft's passes as well. All at `--speculative-num-steps`: `plugin.speculation.adaptive`"
        " is off, or the log says why the count is fixed.",
        read=lambda s: s.control.rounds(),
        steps=ROUNDS,
    ),
    "aurora_explored_rounds": counter(
        "Decode rounds spent on measuring what other draft steps cost",
        look="At most `plugin.speculation.explore` of all, and a few bursts for each new batch"
        " size.",
        read=lambda s: s.control.speculation.explored if s.control.speculation else 0,
    ),
    "aurora_speculation_gain_ratio": gauge(
        "Tokens a second over those of plain decoding, as measured, at the present batch size",
        look="What speculation saves (above 1); 1 while plain decoding is chosen. NaN until the"
        " costs are measured, or if the step count is fixed.",
        read=lambda s: s.control.speculation.gain() if s.control.speculation else nan,
    ),
    "aurora_versions_suspected": counter(
        "Versions that accepted clearly less than the one before, which went back for a trial",
        look="Each costs a trial of 16 blocks of verify steps. Many without a rejection: traffic"
        " changes often.",
        read=lambda s: s.control.canary.suspected,
    ),
    "aurora_versions_rejected": counter(
        "Versions that were rolled back and written to REJECTED",
        look="Any: the trainer's gate let a bad version pass; see both logs.",
        read=lambda s: s.control.canary.rejected,
    ),
    "aurora_audited_requests": counter(
        "Requests that were decoded again without speculation, by what came of it",
        look="`plugin.audit.share` of the greedy ones, while the server is idle. `different`:"
        " output that plain decoding does not give; report it. `tie`: two tokens were as good as"
        " equal. `interrupted`: others ran meanwhile.",
        read=lambda s: dict(s.control.audit.results) if s.control.audit else {},
        result=RESULTS,
    ),
    "aurora_draft_version": gauge(
        "Version of the draft's weights that drafts now, 0: those the server started with",
        look="Ranks that differ for longer than a step are a defect. Compare with"
        " `aurora_trainer_draft_version`: lasting difference means that swaps fail.",
        read=lambda s: s.swaps["draft_version"],
    ),
    "aurora_weights_age_seconds": gauge(
        "Time since the weights that draft now were published, or the server started",
        look="Stale weights: it grows while the trainer publishes, or because it does not.",
        read=lambda s: max(0.0, time.time() - s.reloader.created_unix_s),
    ),
    "aurora_swaps": counter(
        "Swaps of the draft's weights, rollbacks included",
        look="How often weights change.",
        read=lambda s: s.swaps["swaps"],
    ),
    "aurora_prefix_renewals": counter(
        "Times that cached prefixes were given up because the draft had learned much since",
        look="After each, prompts of at most `plugin.swap.renew_prompt_tokens` are computed once"
        " more: a dip of the cache's hit rate.",
        read=lambda s: s.swaps["prefix_renewals"],
    ),
    "aurora_swap_stall_seconds": histogram(
        "Time that the copies of a swap, a rollback or a repair took, on the device",
        look="What a swap costs running requests: on a GPU by events in the stream of the steps, "
        "which the new version is copied in; on a CPU of the scheduler's thread, which also copies "
        "the version before aside, a step before.",
        read=lambda s: s.reloader.times.stalls,
        bounds=STALL_S,
    ),
    "aurora_swap_seconds": histogram(
        "Time from noticing a new version to drafting with it",
        look="Reading, checking and staging a version, and waiting for the next verify step. An"
        " idle server swaps when it next works, so long tails at night are no fault. Versions"
        " found at the start are not counted.",
        read=lambda s: s.reloader.times.durations,
        bounds=SWAP_S,
    ),
    "aurora_freshness_seconds": histogram(
        "At each swap: age of the newest verify step that the new weights were trained on",
        look="How far weights lag behind traffic, the whole way round: verify, capture, link,"
        " sample, batch, gate, publication, swap. By the trainer's clock up to the publication,"
        " and the server's own from noticing it; the time between the two is left out. Its best"
        " case: older steps were trained on too.",
        read=lambda s: s.reloader.times.freshness,
        bounds=FRESHNESS_S,
    ),
    "aurora_target_changes": counter(
        "Operator's calls that gave the server another target",
        look="Above 0: only a trainer of the new target learns from this server"
        " ([algorithm.md](algorithm.md)).",
        read=lambda s: s.swaps["target_changes"],
    ),
    "aurora_weights_refused": counter(
        "Published versions that were not loaded, or not swapped in",
        look="Any growth. `missing` is a race and is tried again; everything else names what is"
        " wrong with the files.",
        read=lambda s: starting_with("refused_", s.swaps),
        cause=REFUSED_WEIGHTS,
    ),
}


def of_capture(num_steps: int) -> dict[str, Family]:
    """What the first tensor-parallel rank, which captures, exports; trees have that many levels."""
    positions = [str(position) for position in range(1, num_steps + 1)]
    return {
        "aurora_captured_messages": counter(
            "Messages captured: sent, dropped or still queued",
            look="Captured = sent + dropped + queued, always.",
            read=lambda s: s.link["captured"],
        ),
        "aurora_sent_messages": counter(
            "Captured messages sent to the trainer",
            look="Flat while messages are captured: no trainer takes them.",
            read=lambda s: s.link["sent"],
        ),
        "aurora_sent_bytes": counter(
            "Bytes sent to the trainer, heartbeats included",
            look="Bandwidth of the link.",
            read=lambda s: s.link["bytes_sent"],
        ),
        "aurora_dropped_messages": counter(
            "Captured messages dropped, never sent",
            look="Data that training will never see; serving does not notice. `queue_full`: the"
            " trainer is slower than traffic or away. `no_buffer`: more steps in flight than"
            " `plugin.capture.pinned_buffers`. `too_large`: above `link.max_message_bytes` or a"
            " pinned buffer. `build`, `publish`: faults, see the log. `closed`: at the end of the"
            " server.",
            read=lambda s: s.link["dropped"],
            cause=DROPS,
        ),
        "aurora_excluded_rows": counter(
            "Requests left out of a captured message: unfit to be used",
            look="The rest of the message goes. `not_finite`: NaN or infinite features or logits,"
            " a broken target or token. `request`: a client's id of more than 256 bytes."
            " Others: a fault, report it.",
            read=lambda s: s.link["excluded"],
            cause=ROW_CAUSES,
        ),
        "aurora_queued_messages": gauge(
            "Captured messages that wait for the trainer",
            look="Near `plugin.publish.queue_messages`: drops follow.",
            read=lambda s: s.link["queued"],
        ),
        "aurora_queued_bytes": gauge(
            "Memory of the captured messages that wait for the trainer",
            look="Near `plugin.publish.queue_bytes`: drops follow.",
            read=lambda s: s.link["queued_bytes"],
        ),
        "aurora_link_blocked_seconds": gauge(
            "Time since the link to the trainer took a message or a heartbeat",
            look="More than a few heartbeats (`plugin.publish.heartbeat_s`): the trainer is away,"
            " stopped or full.",
            read=lambda s: s.link["blocked_s"],
        ),
        "aurora_link_refused": counter(
            "Attempts to connect that failed at the trainer's handshake",
            look="`key`: this server is not on the trainer's list. `protocol`: one side has keys"
            " and the other has not, or the wrong ones. `unfinished`: no trainer answers there.",
            read=lambda s: s.link["refused"],
            cause=REFUSED_BY_TRAINER,
        ),
        "aurora_capture_seconds": histogram(
            "Time that the scheduler's thread spent on capturing a message",
            look="What capture costs serving; one verify step is one `verify`. Compare with the"
            " time of a step.",
            read=lambda s: s.capture.boundary.seconds,
            bounds=SECONDS,
            kind=KINDS,
        ),
        "aurora_capture_errors": counter(
            "Steps whose capture failed; they were served as usual",
            look="Must be 0. The first one is in the log.",
            read=lambda s: s.capture.boundary.errors,
        ),
        "aurora_excluded_requests": counter(
            "Requests that are not captured, by why",
            look="Each is counted once. `opt_out`: the client's own wish, written in any way."
            " `sample_rate`: `plugin.capture.sample_rate`. `no_trainer`: nobody takes messages, so"
            " that 1 request in 256 is captured. `multimodal`, `embeddings`: what no token id says."
            " `request_id`: an id that no message may carry. `scoring`, `lora`:"
            " another attention or another target. `health_check`: SGLang's own, `audit`: Aurora's."
            " `failing`: capture failed three times in a row and rests, at first for a minute.",
            read=lambda s: dict(s.capture.excluded),
            cause=CAUSES,
        ),
        "aurora_skipped_prompt_tokens": counter(
            "Prompt tokens left out by plugin.capture.max_prompt_features and prompt_sample_rate",
            look="Features of long prompts' beginnings, and of prompts that are not among the"
            " sample, do not travel.",
            read=lambda s: s.capture.prompt_tokens_skipped,
        ),
        "aurora_accept_length_tokens": histogram(
            "Tokens committed by a verify step that drafted, of a captured request, bonus included",
            look="The figure that speculation is for. Rates of `_sum` and `_count` give the mean"
            " over any window; of all captured requests, sent or not. Plain rounds are left out.",
            read=lambda s: s.capture.acceptance.lengths(),
            bounds=range(1, num_steps + 2),
        ),
        "aurora_accepted_drafts": counter(
            "Draft tokens accepted, by position in the draft",
            look="Divided by `aurora_accept_length_tokens_count`: the acceptance at each position."
            " In a tree the position is the depth.",
            read=lambda s: by_position(accepted(s.capture.acceptance.by_length)),
            position=positions,
        ),
        "aurora_version_accept_length_tokens": gauge(
            "Mean accept length of all steps drafted by the current and by the previous version",
            look="Did the last version help? Each role counts since its version began to draft;"
            " after a swap `current` starts anew and is noise until its verify steps are many."
            " Traffic differs between the two, so this is a hint and the gate's paired scores are"
            " the proof.",
            read=lambda s: each_role(s, mean_length),
            role=ROLES,
        ),
        "aurora_version_acceptance_ratio": gauge(
            "Share of the version's verify steps that accepted this position",
            look="The same, at each position.",
            read=acceptance_ratios,
            role=ROLES,
            position=positions,
        ),
        "aurora_version_verify_steps": gauge(
            "Verify steps that the two figures above rest on",
            look="Below a few hundred, do not believe the two above.",
            read=lambda s: each_role(s, sum),
            role=ROLES,
        ),
    }
