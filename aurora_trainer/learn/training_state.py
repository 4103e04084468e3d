"""What a resume checkpoint holds of a Training: weights, masters, moments, random states, counters;
the same for any number of ranks.

Samples are not in it: over a recording they come again, live they are lost and counted.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from aurora_trainer.checkpoint import Checkpoint
from aurora_trainer.learn import publishing

if TYPE_CHECKING:
    from aurora_trainer.learn.trainer import Training


def state_of(training: Training) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `restore` goes on from: tensors, copied to training.snapshot, and JSON."""
    tensors = training.learner.snapshot(training.snapshot)
    tensors["random/torch"] = torch.get_rng_state()
    state = {
        "target": training.target,
        "parent": training.parent,
        "served": training.served.version,
        "rolled_back": sorted(training.served.rolled_back),
        "steps": training.steps,
        "positions": training.positions,
        "pending_tokens": training._pending_tokens,
        "samples": dict(training.samples),
        "published": dict(training.published),
        "published_roles": dict(training.published_roles),
        "arrivals": training.arrivals.state(),
        "barred": sorted(training.served.barred),
        "urgent": training.urgent,
        "offered_at": training._offered_at,
        "average_began": training.mean.began,
        "traffic": dict(training.traffic),
        "rows": dict(training.rows),
        "earlier_updates": training.earlier_updates,
        "trained_until_ns": training.trained_until_ns,
        "optimizer": training.optimizer.state_dict()[1],
        "gate": training.gate.state(),
        "buffer": training.buffer.state(),
        "failed_steps": list(training._failed_steps),
        "open_requests": training.assembler.open_requests,
    }
    return tensors, state


def restore(training: Training, found: Checkpoint, live: bool) -> None:
    """Go on from a checkpoint. `live`: buffered samples and open requests are lost, and counted.

    Otherwise they come from replaying the trace, with all that counts them. Raises ValueError for
    another target.
    """
    tensors, state = found.tensors, found.state
    if state["target"] != training.target:
        raise ValueError(
            f"checkpoint of step {found.step} is for target {state['target']}, this one is"
            f" {training.target}; expected the same target: set trainer.checkpoint.directory to a"
            " new directory for a new target"
        )
    whose, began = f"checkpoint of step {found.step}", state.get("average_began", 0)
    training.learner.restore(tensors, state["optimizer"], began, whose)
    torch.set_rng_state(tensors["random/torch"])
    training.parent, training.positions = state["parent"], state["positions"]
    training.earlier_updates = state["earlier_updates"]
    training.trained_until_ns = state.get("trained_until_ns", 0)
    training._failed_steps.extend(() if live else state.get("failed_steps", ()))
    training.published = Counter(state["published"])
    training.served.rolled_back = set(state["rolled_back"])
    training.published_roles = Counter(state.get("published_roles", {}))
    training.served.barred = set(state.get("barred", ()))
    training.urgent = int(state.get("urgent", 0))
    training._offered_at = state.get("offered_at", 0)
    if "arrivals" in state:
        training.arrivals.restore(state["arrivals"], live)
    training.gate.restore(state["gate"], live)
    if not live:
        training.replayed_steps = found.step
        training.served.go_back_to(state["served"])
    elif training.served.was_rejected(state["served"]):
        # while no trainer ran
        publishing.rolled_back(training)
    if state["served"] != training.served.version:
        training.gate.restart()
        training.arrivals.drift.serve()
    if live:
        training.steps = state["steps"]
        training.samples = Counter(state["samples"])
        training.samples["lost_open"] += state["open_requests"]
        training.samples["lost_held"] += state["gate"]["held"]
        training.traffic = dict(state["traffic"])
        training.rows = Counter(state["rows"])
        training.buffer.restore(state["buffer"])
