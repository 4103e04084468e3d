"""Training, without sockets and clocks: messages in, optimizer steps, versions out.

    feed(message)   assemble -> gate (which holds some back) -> buffer
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
from functools import partial
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
from aurora_trainer.learn.accept_length import measure
from aurora_trainer.learn.gate import Decision, Gate
from aurora_trainer.learn.learner import Learner
from aurora_trainer.learn.offer import Offer
from aurora_trainer.learn.optimizer import Optimizer
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
        # the version that training went on from
        self.parent = 0
        # of optimizers before the last rollback
        self.earlier_updates = 0
        # batches drawn; the optimizer may have skipped some
        self.steps = 0
        # trained on, repetitions included
        self.positions = 0
        # capture of the newest step that the draft was trained on
        self.trained_until_ns = 0
        self.published: Counter[str] = Counter()
        # verify steps of requests, and tokens that they committed
        self.traffic = {"steps": 0, "tokens": 0}
        self.rows: Counter[str] = Counter(with_target=0, altered=0)
        # smoothed figures for the status
        self.shown: dict[str, float] = {}
        # positions that came in and were not answered by a step yet
        self._pending_tokens = 0
        # optimizer step at which the gate was last asked
        self._offered_at = 0
        # a version was rolled back, and training did not follow yet
        self._behind_served = False
        # the last checkpoint's tensors
        self.snapshot: dict[str, torch.Tensor] = {}
        self._failed_steps: deque[int] = deque(maxlen=MAX_FAILED_STEPS)
        self._trained: weakref.WeakValueDictionary[int, Sample] = weakref.WeakValueDictionary()
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
        for sample in self.assembler.add(message) + self.assembler.idle(now_s):
            self._keep(sample)

    def idle(self, now_s: float) -> None:
        """Tell the time while nothing comes."""
        self.ranks.keep_alive()
        for sample in self.assembler.idle(now_s):
            self._keep(sample)

    def due(self) -> bool:
        """Whether enough came in for the next step."""
        pace = self.config.trainer.pace
        return (
            pace.enabled
            and self._pending_tokens >= pace.new_positions_per_step
            and len(self.buffer) > 0
        )

    def step(self, replay: bool = False) -> Step | None:
        """Train on one batch; None if it has no targets.

        `replay`: only draw it, and return None.
        """
        trainer = self.config.trainer
        samples = self.buffer.take(trainer.batch.max_positions)
        self._pending_tokens -= trainer.pace.new_positions_per_step
        self.steps += 1
        unseen = [s for s in samples if id(s) not in self._trained]
        self._trained.update((id(s), s) for s in samples)
        if replay:
            if self.steps in self._failed_steps:
                self.buffer.failed()
            return None
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
        self._show(learned.update.loss, learned.before)
        return Step(
            update=learned.update,
            score=learned.score,
            positions=positions,
            before=learned.before,
            after=learned.after,
            time_ns=[s.time_ns for s in samples],
            staleness=[
                self.served.version - int(s.tree_version[-1])
                for s in samples
                if len(s.tree_version)
            ],
        )

    def give_up(self) -> None:
        """The step that raised is over: no gradient stays, its batch is tried again in parts."""
        self.learner.give_up()
        self._failed()

    def offer(self) -> Offer | None:
        """What to publish, if the draft was trained and the gate lets it pass: copies."""
        if self.updates == self._offered_at:
            return None
        tensors = self.draft.checkpoint(self.served.dtype, self.learner.weights())
        finite = all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())
        decision = self.gate.decide(finite, self._walk, initial_served=self.served.version == 0)
        if decision.reason == "initial":
            # It is clearly better than what is served: serve it, and train on from it.
            tensors = self.served.initial.checkpoint(self.served.dtype)
            return self._offer(tensors, decision, "initial")
        if decision.passed:
            return self._offer(tensors, decision, "candidate")
        self._offered_at = self.updates
        self.published[f"refused_{decision.reason}"] += 1
        if self.gate.gives_up:
            log.warning(
                "candidate stayed worse, training goes back to version=%d", self.served.version
            )
            self.published["gone_back"] += 1
            self._take_served()
            self.gate.restart()
        return None

    def written(self, offer: Offer, version: int | None) -> None:
        """The offer is what servers have now, as `version`; None: they had it before."""
        # not before: what the disk refuses is offered again
        self._offered_at = offer.updates
        if version is None:
            self.published["unchanged"] += 1
            return
        self.published["published"] += 1
        self.parent = version
        self.served.take(version, offer.tensors)
        self.gate.serve(offer.role)
        log.info("weights published version=%d optimizer_step=%d", version, offer.updates)
        if offer.role == "initial":
            self._take_served()
            self._offered_at = self.updates

    def publish(self) -> int | None:
        """Offer, write and take it in, at once. Returns the version, or None."""
        offer = self.offer()
        if offer is None:
            return None
        version = offer.write()
        self.written(offer, version)
        return version

    def _offer(self, tensors: dict[str, torch.Tensor], decision: Decision, role: str) -> Offer:
        config = self.draft.config.to_json(str(self.served.dtype).removeprefix("torch."))
        about: dict[str, Any] = dict(
            target=self.target,
            parent=self.parent,
            optimizer_step=self.updates,
            trained_until_ns=self.trained_until_ns,
            gate=decision.fields(),
        )
        write = partial(self.writer.publish, tensors, config, **about)
        return Offer(role, self.updates, tensors, write)

    def apply_rollbacks(self) -> None:
        """If servers rolled the newest version back, go on from the one that they went back to."""
        version = self.served.roll_back()
        if version is not None:
            log.warning(
                "version rolled back by a server, training goes on from version=%d", version
            )
            self.published["rolled_back"] += 1
            self._behind_served = True
        if self._behind_served:
            self._take_served()
            self.gate.restart()
            self._behind_served = False

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
        self.buffer.failed()

    def _take_served(self) -> None:
        self.parent = self.served.version
        self.earlier_updates = self.updates
        self.learner.start(self.served.to_train())

    def _keep(self, sample: Sample) -> None:
        self.samples["assembled"] += 1
        config = self.draft.config
        cause = unusable(sample, config.feature_size, config.vocab_size, self.rows)
        if cause:
            self.samples[cause] += 1
            return
        for given in self.gate.hold(sample):
            self._pending_tokens += int(given.has_target.sum())
            self.buffer.put(given)

    def _walk(self, role: str, samples: list[Sample]) -> np.ndarray:
        """float64 [len(samples), 2]: steps and tokens of each sample's walk with a role's draft."""
        trainer, served = self.config.trainer, self.served
        draft = served.draft if role == "served" else served.initial
        if role == "candidate":
            draft = self.learner.candidate()
        return measure(draft, samples, trainer.batch, trainer.loss, trainer.model.device)

    def _show(self, loss: float, walk: tuple[float, float] | None) -> None:
        figures = {"loss": loss}
        if walk is not None and walk[0]:
            figures["accept_length"] = walk[1] / walk[0]
        for name, value in figures.items():
            self.shown[name] = SMOOTH * self.shown.get(name, value) + (1 - SMOOTH) * value
