"""`aurora-trainer plan`: what a target needs, from its config.json alone: bytes on the link, memory
of the server and the trainer, size of a version, optimizer steps, what many servers cost together.
No weights, no network. The formulas are in `sizes.py` and `fleet.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from aurora_trainer.config import TrainerFile
from aurora_trainer.drafts.kinds import (
    described,
    draft_config,
    parameter_count,
    rank_bytes,
    version_bytes,
)
from aurora_trainer.drafts.target import Target
from aurora_trainer.tools.fleet import fleet
from aurora_trainer.tools.sizes import (
    Load,
    checkpoint_bytes,
    largest_draft,
    prefill_bytes,
    queued_row_bytes,
    ranks_bytes,
    sample_bytes,
    step_flops,
    trainer_device_bytes,
    verify_bytes,
)

# of a device that a draft must fit, e.g. an H100
DEVICE_BYTES = 80e9
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def plan(
    target: Target, config: TrainerFile, load: Load, draft_vocab: int | None = None, dtype: str = ""
) -> dict:
    """Everything, by section, in bytes and per second; rates are of all servers together.

    draft_vocab: None for what `init-draft` makes.
    dtype: of the server and of published weights; "" for the target's own. Raises ValueError for a
        target that a draft
    cannot be made for.
    """
    dtype = dtype or target_dtype(target)
    if dtype not in SIZES:
        raise ValueError(f"dtype {dtype}: expected one of {', '.join(SIZES)}")
    size, trainer, capture = SIZES[dtype], config.trainer, config.plugin.capture
    draft = draft_config(target.config, draft_vocab)
    rate = capture.sample_rate * load.servers
    per_step = verify_bytes(draft, load, size, capture.topk_logits, capture.features)
    # requests of a step that are captured
    few = replace(load, running=max(1, round(load.running * capture.sample_rate)))
    message = verify_bytes(draft, few, size, capture.topk_logits, capture.features)
    per_token = per_step / (load.running * load.accept_length)
    prompt = min(load.prompt_tokens, capture.max_prompt_features)
    per_prompt = prefill_bytes(draft, prompt, size, capture.features)
    prompts_per_s = load.requests_per_s * capture.prompt_sample_rate
    link = rate * (load.tokens_per_s * per_token + prompts_per_s * per_prompt)
    row = queued_row_bytes(draft, load, size, capture.topk_logits, capture.features)
    # of one server, a second
    queued = capture.sample_rate * (
        load.tokens_per_s / load.accept_length * row + prompts_per_s * per_prompt
    )
    positions = rate * load.tokens_per_s
    version, parameters = version_bytes(draft, target, size), parameter_count(draft, target)
    every_s = trainer.publish.every_s
    compute = SIZES[trainer.model.compute_dtype]
    checkpoint = checkpoint_bytes(draft, target, compute, bool(trainer.optimizer.average))
    device = trainer_device_bytes(draft, target, trainer, compute, load)
    # float8 is bfloat16 in the trainer
    held = 2 if capture.features == "float8" else size
    position = sample_bytes(draft, load, held, capture.topk_logits)
    return {
        "draft": {
            "parameters": parameters,
            **described(draft),
            "dtype": dtype,
        },
        "link": {
            "bytes_per_generated_token": per_token,
            "bytes_per_prompt_token": per_prompt / max(1, prompt),
            "bytes_per_s": link,
            "seconds_of_traffic_in_the_publishers_queue": (
                config.plugin.publish.queue_bytes / queued if queued else math.inf
            ),
            "recording_bytes_per_hour": 3600 * link,
        },
        "server": {
            "extra_device_bytes_per_rank": 2 * rank_bytes(draft, target, load.tp, size),
            "publisher_queue_bytes": config.plugin.publish.queue_bytes,
            "pinned_bytes": capture.pinned_buffers * capture.pinned_buffer_bytes,
            "verify_message_bytes": per_step,
        },
        "trainer_host": {
            "receive_queue_bytes": trainer.receive.queue_bytes,
            "assemble_bytes": trainer.assemble.max_bytes,
            "buffer_bytes": trainer.buffer.max_bytes,
            # while a sample is in the buffer as well, its memory is the buffer's
            "prefix_bytes": trainer.assemble.prefix_bytes,
            # of the last checkpoint, and a version while it is written
            "snapshot_bytes": checkpoint + version,
            "bytes_per_buffered_token": position,
            "seconds_of_traffic_in_the_buffer": trainer.buffer.max_bytes / (position * positions)
            if positions
            else math.inf,
            "seconds_of_traffic_in_the_prefixes": trainer.assemble.prefix_bytes
            / (draft.feature_size * held * positions)
            if positions
            else math.inf,
        },
        "trainer_device": device | {"total_bytes": sum(device.values())},
        # of processes that train one draft, a device each; the figures above are of the fullest
        "trainer_ranks": {
            "ranks": load.ranks,
            "positions_of_a_batch_each": -(-trainer.batch.max_positions // load.ranks),
            "bytes_between_them_per_step": ranks_bytes(draft, target, compute)
            if load.ranks > 1
            else 0,
            "parameters_that_a_device_of_80_gb_holds": largest_draft(
                device, parameters, DEVICE_BYTES
            ),
        },
        "training": {
            "optimizer_steps_per_s": positions / trainer.pace.new_positions_per_step,
            "seconds_per_step_at_most": trainer.pace.new_positions_per_step / positions
            if positions
            else math.inf,
            "flops_per_step": step_flops(draft, trainer, load),
            "flops_per_s": step_flops(draft, trainer, load)
            * positions
            / trainer.pace.new_positions_per_step,
        },
        "weights": {
            "version_bytes": version,
            "write_bytes_per_s": version / every_s if every_s else 0.0,
            "disk_bytes": version * trainer.publish.keep,
            "checkpoint_bytes": checkpoint,
            "checkpoints_disk_bytes": trainer.checkpoint.keep * checkpoint,
        },
        "fleet": fleet(config, load, message, version),
    }


def target_dtype(target: Target) -> str:
    """The target's own, as its config names it; bfloat16 if it names none."""
    found = target.config.get("dtype") or target.config.get("torch_dtype") or "bfloat16"
    return str(found).removeprefix("torch.")


def lines(name: str, result: dict[str, dict[str, Any]]) -> list[str]:
    """The plan for a terminal."""
    out = [f"{name}, by arithmetic from its config.json; nothing of it was measured on a GPU"]
    for section, values in result.items():
        out.append(section.replace("_", " "))
        out += [
            f"  {key.replace('_', ' '):<46} {_shown(key, value)}" for key, value in values.items()
        ]
    return out


def _shown(key: str, value: Any) -> str:
    if isinstance(value, list | str):
        return str(value)
    if "bytes" in key:
        return f"{_scaled(float(value))}B{'/s' if key.endswith('_per_s') else ''}"
    if "flops" in key:
        return f"{_scaled(float(value))}FLOP{'/s' if key.endswith('_per_s') else ''}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"


def _scaled(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 1000 or unit == "T":
            return f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError
