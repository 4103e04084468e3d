"""Which weights go to servers, and what training makes of what they serve.

    offer -> (written elsewhere) -> written      the draft that the gate chose
    apply_rollbacks                              what servers went back to

Training goes on from the weights that it has, whichever draft is published: the initial one too
(gate.py says why). It goes back to what is served where a server rolled a version back, and where
the candidate stays worse.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from aurora_trainer.learn.offer import Offer

if TYPE_CHECKING:
    from aurora_trainer.learn.gate import Decision
    from aurora_trainer.learn.trainer import Training

log = logging.getLogger(__name__)


def offer(training: Training) -> Offer | None:
    """What to publish, if the gate lets a draft pass: copies."""
    if training.updates == training._offered_at and not training.urgent:
        return None
    # in the dtype that they are served in
    roles = training.learner.finite(torch.finfo(training.served.dtype).max)
    anchor, coming = "", None
    if may_be_initial(training):
        anchor, coming = "initial", training.arrivals.drift.ahead()
    elif serves_initial(training):
        anchor = "served"
    decision = training.gate.decide(roles, training._walk, anchor, coming)
    if decision.role == "initial":
        return _offer(training, training.served.initial.checkpoint(training.served.dtype), decision)
    if decision.passed:
        weights = training.learner.weights(decision.role)
        tensors = training.draft.checkpoint(training.served.dtype, weights)
        return _offer(training, tensors, decision)
    training._offered_at, training.urgent = training.updates, 0
    training.published[f"refused_{decision.reason}"] += 1
    if training.gate.gives_up:
        version = training.served.version
        log.warning("candidate stayed worse, training goes back to version=%d", version)
        training.published["gone_back"] += 1
        training._take_served()
        training.gate.worse_in_a_row = 0
    return None


def publish(training: Training) -> int | None:
    """Offer, write and take it in, at once. Returns the version, or None."""
    found = training.offer()
    if found is None:
        return None
    version = found.write()
    training.written(found, version)
    return version


def written(training: Training, offer: Offer, version: int | None) -> None:
    """The offer is what servers have now, as `version`; None: they had it before."""
    _take_in(training, offer, version)
    # not before: what the disk refuses, or what could not be taken in, is offered again
    training._offered_at = offer.updates
    # what came meanwhile asks again
    training.urgent -= offer.asks


def _take_in(training: Training, offer: Offer, version: int | None) -> None:
    if version is None:
        training.published["unchanged"] += 1
        version = training.writer.newest
        if version == training.served.version or version in training.served.rolled_back:
            return
        # a run over a recording that was killed behind it
    else:
        training.published["published"] += 1
        training.published_roles[offer.role] += 1
    training.parent = version
    training.served.take(version, offer.tensors, offer.role)
    training.gate.serve(offer.role)
    training.arrivals.drift.serve()
    log.info(
        "weights published version=%d role=%s optimizer_step=%d",
        version, offer.role, offer.updates,
    )  # fmt: skip


def apply_rollbacks(training: Training) -> None:
    """If servers rolled the newest version back, go on from the one that they went back to."""
    if training.served.roll_back() is not None:
        rolled_back(training)
    if training._behind_served:
        training._take_served()
        training.gate.restart()
        training.arrivals.drift.serve()
        # what the draft of before accepts says nothing of traffic
        training.arrivals.drift.begin()
        training._behind_served = False


def rolled_back(training: Training) -> None:
    """A server rolled back what training published last."""
    version = training.served.version
    log.warning("version rolled back by a server, training goes on from version=%d", version)
    training.published["rolled_back"] += 1
    training._behind_served = True


def was_given(training: Training) -> bool:
    """Whether there is an initial draft worth coming back to. One that the trainer made itself was
    never trained, and servers that have no other do not draft with it."""
    return training.config.trainer.model.draft is not None


def serves_initial(training: Training) -> bool:
    """Whether servers draft with it, so that the gate asks more of any other."""
    return was_given(training) and training.served.draft is training.served.initial


def may_be_initial(training: Training) -> bool:
    """Whether the initial draft is one that could be published now."""
    served = training.served
    return was_given(training) and served.draft is not served.initial and not served.initial_barred


def _offer(training: Training, tensors: dict[str, torch.Tensor], decision: Decision) -> Offer:
    dtype = str(training.served.dtype).removeprefix("torch.")
    about: dict[str, Any] = dict(
        target=training.target,
        parent=training.parent,
        optimizer_step=training.updates,
        trained_until_ns=training.trained_until_ns,
        gate=decision.fields(),
    )
    config = training.draft.config.to_json(dtype)
    write = partial(training.writer.publish, tensors, config, **about)
    return Offer(decision.role, training.updates, training.urgent, tensors, write)
