"""Training, without sockets and clocks: messages in, optimizer steps, versions out.

    feed(message)   assemble -> gate (which holds some back), arrivals (what they say) -> buffer
    step()          buffer -> batch -> loss -> optimize
    offer()         gate, on the requests that it held back -> weights/writer.py -> written()

What happens to the weights depends only on the messages and on the order of these calls, so that a
recorded trace trains to the bit as it did. `step(replay=True)` draws a batch and leaves it: after a
restart it brings buffer and schedule to where the checkpoint was, from the trace itself.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.weights.manifest import target_fingerprint
from aurora_sglang_plugin.weights.writer import WeightsWriter
from aurora_trainer.checkpoint import Checkpoint
from aurora_trainer.drafts.first import initial_draft
from aurora_trainer.drafts.kinds import Draft, load
from aurora_trainer.drafts.target import TargetTensors, open_target
from aurora_trainer.intake.assemble import Assembler
from aurora_trainer.intake.buffer import Buffer
from aurora_trainer.intake.sample import Sample
from aurora_trainer.intake.usable import unusable
from aurora_trainer.learn import publishing
from aurora_trainer.learn.accept_length import measure
from aurora_trainer.learn.arrivals import Arrivals
from aurora_trainer.learn.drift import Event
from aurora_trainer.learn.gate import Gate
from aurora_trainer.learn.learner import Learner
from aurora_trainer.learn.offer import Offer
from aurora_trainer.learn.optimizer import Optimizer
from aurora_trainer.learn.running_mean import RunningMean
from aurora_trainer.learn.served import Served
from aurora_trainer.learn.shares import Dealer
from aurora_trainer.learn.step_record import Step
from aurora_trainer.learn.training_state import restore, state_of
from aurora_trainer.ranks import Ranks

if TYPE_CHECKING:
    from aurora_trainer.config import TrainerFile

log = logging.getLogger(__name__)

# of what the status shows, per step
SMOOTH = 0.9
# that are remembered: a resumed run over a recording has its batches fail as they did
MAX_FAILED_STEPS = 1 << 16


class Training:
    """Owns the draft, its optimizer, the buffer, and the ledger of what became of every sample.

    Raises ValueError if target, draft or weights directory cannot be used.
    """

    def __init__(self, config: TrainerFile, ranks: Ranks | None = None):
        self.config, trainer = config, config.trainer
        self.ranks = ranks or Ranks()
        self.learner, self.dealer = Learner(trainer, self.ranks), Dealer(self.ranks.size)
        target = open_target(trainer.model.target)
        self.target = target_fingerprint(trainer.model.target)
        dtype = getattr(torch, trainer.model.compute_dtype)
        tensors = TargetTensors(target, trainer.model.device, dtype)
        model = trainer.model
        initial = initial_draft(model.target, model.draft, trainer.checkpoint.directory)
        self.learner.start(load(initial, tensors))
        directory = config.weights.directory
        self.writer = WeightsWriter(directory, trainer.publish.keep)
        self.served = Served(directory, initial, self.target, tensors, trainer.publish.dtype)
        eos = trainer.assemble.eos_token_ids or target.eos_token_ids
        self.assembler = Assembler(trainer.assemble.model_copy(update={"eos_token_ids": eos}))
        self.buffer = Buffer(trainer.buffer, trainer.pace.seed)
        # by what became of them before the buffer
        self.samples: Counter[str] = Counter()
        self.gate = Gate(trainer.gate, self.samples)
        self.arrivals = Arrivals(trainer.drift, self.gate, self._walk)
        # steps of the run before that are drawn again, over a recording
        self.replayed_steps = 0
        # events that the gate is to be asked about at once, and was not yet
        self.urgent = 0
        # the newest version that servers were given
        self.parent = 0
        # of optimizers before the last rollback
        self.earlier_updates = 0
        # batches drawn; the optimizer may have skipped some
        self.steps = 0
        # updates when the newest batch was drawn
        self._updates_before = 0
        # trained on, repetitions included
        self.positions = 0
        # capture of the newest step that the draft was trained on
        self.trained_until_ns = 0
        self.published: Counter[str] = Counter()
        # versions, by what they were
        self.published_roles: Counter[str] = Counter()
        # verify steps of requests, and tokens that they committed
        self.traffic = {"steps": 0, "tokens": 0}
        self.rows: Counter[str] = Counter(with_target=0, altered=0)
        # smoothed figures for the status
        self.shown: dict[str, float] = {}
        # positions that came in and were not answered by a step yet
        self._pending_tokens = 0
        # to training: positions with a target, and all
        self._given = [1, 1]
        # optimizer step at which the gate was last asked
        self._offered_at = 0
        # a version was rolled back, and training did not follow yet
        self._behind_served = False
        # the last checkpoint's tensors
        self.snapshot: dict[str, torch.Tensor] = {}
        self._failed_steps: deque[int] = deque(maxlen=MAX_FAILED_STEPS)
        self._trained: weakref.WeakValueDictionary[int, Sample] = weakref.WeakValueDictionary()
        # of the newest batch, what it was the first time for
        self._unseen: list[Sample] = []
        # after the modules above were made, which draw
        torch.manual_seed(trainer.pace.seed)

    @property
    def draft(self) -> Draft:
        """The one that is trained."""
        return self.learner.draft

    @property
    def optimizer(self) -> Optimizer:
        return self.learner.optimizer

    @property
    def mean(self) -> RunningMean:
        return self.learner.mean

    @property
    def updates(self) -> int:
        """Optimizer steps that changed the weights."""
        return self.earlier_updates + self.optimizer.updates

    def feed(self, message: wire.Message, now_s: float) -> None:
        """Take one message; `now_s` is any clock that goes forward."""
        self.ranks.keep_alive()
        # a plain round says nothing of how long a draft is accepted
        if message.header.kind == "verify" and message.arrays["parents"].shape[1] > 1:
            good = [row for row in range(len(message.header.requests)) if row not in message.bad]
            self.traffic["steps"] += len(good)
            self.traffic["tokens"] += int(message.arrays["feature_lens"][good].sum())
        self._keep_all(self.assembler.add(message))
        self._keep_all(self.assembler.idle(now_s))

    def idle(self, now_s: float) -> None:
        """Tell the time while nothing comes."""
        self.ranks.keep_alive()
        self._keep_all(self.assembler.idle(now_s))

    @property
    def new_positions_per_step(self) -> int:
        """More while training rests, but no more than a batch takes of what is new."""
        config = self.config.trainer
        per_step = config.pace.new_positions_per_step
        if not self.arrivals.resting:
            return per_step
        # positions without a target fill a batch too
        targets, positions = self._given
        room = config.batch.max_positions * config.buffer.fresh_fraction * targets / positions
        return max(per_step, min(per_step * config.drift.rest_factor, int(room)))

    def due(self) -> bool:
        """Whether enough came in for the next step."""
        enough = self._pending_tokens >= self.new_positions_per_step
        return self.config.trainer.pace.enabled and enough and len(self.buffer) > 0

    def step(self, replay: bool = False) -> Step | None:
        """Train on one batch; None if it has no targets.

        `replay`: only draw it, and return None.
        """
        trainer = self.config.trainer
        samples = self.buffer.take(trainer.batch.max_positions)
        self._pending_tokens -= self.new_positions_per_step
        self.steps += 1
        self._updates_before = self.updates
        unseen = self._unseen = [s for s in samples if id(s) not in self._trained]
        self._trained.update((id(s), s) for s in samples)
        if replay:
            self._look_again()
            if self.steps in self._failed_steps:
                self._try_again()
            return None
        self._look(behind=True)
        every = trainer.metrics.rescore_every_steps
        after = bool(unseen) and every > 0 and self.steps % every == 0
        # A chain's walk comes with the loss; a tree has to be grown.
        before = bool(unseen) and (after or all(s.topk == 1 for s in unseen))
        depth = trainer.batch.depth or max(s.num_steps for s in samples)
        learned = self.learner.learn(self.dealer.deal(samples, unseen, depth, before, after))
        if learned is None:
            return None
        if learned.update.applied:
            self.trained_until_ns = max(self.trained_until_ns, *(s.time_ns for s in samples))
        else:
            self._failed()
        positions = sum(len(s.features) for s in samples)
        self.positions += positions
        self.arrivals.trained(positions)
        self._show(learned.update.loss, learned.before)
        drawn = [int(s.tree_version[-1]) for s in samples if len(s.tree_version)]
        return Step(
            update=learned.update,
            score=learned.score,
            positions=positions,
            before=learned.before,
            after=learned.after,
            time_ns=[s.time_ns for s in samples],
            staleness=[self.served.version - version for version in drawn],
        )

    def give_up(self) -> None:
        """The step that raised is over: no gradient stays, and its batch is tried again in parts,
        unless the weights have changed by it."""
        self.learner.give_up()
        if self.updates == self._updates_before:
            self._failed()

    def offer(self) -> Offer | None:
        """As publishing.offer."""
        return publishing.offer(self)

    def written(self, offer: Offer, version: int | None) -> None:
        """As publishing.written."""
        publishing.written(self, offer, version)

    def publish(self) -> int | None:
        """As publishing.publish."""
        return publishing.publish(self)

    def apply_rollbacks(self) -> None:
        """As publishing.apply_rollbacks."""
        publishing.apply_rollbacks(self)

    def resume_from_published(self) -> None:
        """Without a checkpoint: start from what servers serve now, not from the initial draft."""
        if self.served.version:
            self._take_served()
            log.info("no checkpoint, going on from published version=%d", self.parent)

    def checkpoint(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What `restore` goes on from: tensors, and JSON."""
        return state_of(self)

    def restore(self, found: Checkpoint, live: bool) -> None:
        """As training_state.restore."""
        restore(self, found, live)

    def close(self) -> None:
        self.writer.close()
        self.ranks.tell("stop")

    def _failed(self) -> None:
        self._failed_steps.append(self.steps)
        self._try_again()

    def _try_again(self) -> None:
        """The newest batch, in parts: nothing was learnt of it."""
        self.buffer.failed()
        for sample in self._unseen:
            self._trained.pop(id(sample), None)

    def _take_served(self) -> None:
        self.parent = self.served.version
        self.earlier_updates = self.updates
        self.learner.start(self.served.to_train())

    def _keep_all(self, samples: list[Sample]) -> None:
        """Each of them, whatever another one raises: what does is raised at last."""
        errors: list[Exception] = []
        for sample in samples:
            try:
                self._keep(sample)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _keep(self, sample: Sample) -> None:
        self.samples["assembled"] += 1
        config = self.draft.config
        cause = unusable(sample, config.feature_size, config.vocab_size, self.rows)
        if cause:
            self.samples[cause] += 1
            return
        number = self.samples["assembled"]
        self._give(self.gate.held.hold(sample, number))
        self.arrivals.add(number, sample)
        if self.steps < self.replayed_steps:
            self._look_again()
        elif not self.due():
            self._look(behind=False)

    def _give(self, samples: list[Sample]) -> None:
        for sample in samples:
            targets = int(sample.has_target.sum())
            self._pending_tokens += targets
            self._given[0] += targets
            self._given[1] += len(sample.features)
            self.buffer.put(sample)

    def _look(self, behind: bool) -> None:
        """At what came and was not trained on yet; answer what it says."""
        initial, waits = publishing.may_be_initial(self), publishing.serves_initial(self)
        for event in self.arrivals.look(self._when(), initial, behind, waits):
            self._give(self._forgotten(event))
            self.urgent += event.kind in ("changed", "initial")
            if event.kind == "changed":
                self.served.barred.clear()
                self.learner.begin_again()

    def _look_again(self) -> None:
        """Over a recording: what the run before found by now, with the drafts that it had."""
        for event in self.arrivals.replayed(self._when()):
            self._give(self._forgotten(event))

    def _when(self) -> tuple[int, int]:
        return self.samples["assembled"], self.steps

    def _forgotten(self, event: Event) -> list[Sample]:
        return self.gate.held.forget(event.since) if event.kind in ("changed", "initial") else []

    def _walk(self, role: str, samples: list[Sample]) -> np.ndarray:
        """float64 [len(samples), 2]: steps and tokens of each sample's walk with a role's draft."""
        trainer = self.config.trainer
        draft = {
            "live": lambda: self.draft,
            "mean": self.learner.mean_draft,
            "served": lambda: self.served.draft,
            "initial": lambda: self.served.initial,
        }[role]()
        return measure(draft, samples, trainer.batch, trainer.loss, trainer.model.device)

    def _show(self, loss: float, walk: tuple[float, float] | None) -> None:
        figures = {"loss": loss}
        if walk is not None and walk[0]:
            figures["accept_length"] = walk[1] / walk[0]
        for name, value in figures.items():
            self.shown[name] = SMOOTH * self.shown.get(name, value) + (1 - SMOOTH) * value
