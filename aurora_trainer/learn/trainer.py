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
from aurora_kernels.tree_loss import TreeLoss

from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.weights.manifest import target_fingerprint
from aurora_sglang_plugin.weights.writer import WeightsWriter
from aurora_trainer.checkpoint import Checkpoint
from aurora_trainer.drafts.batch import Batch, pack
from aurora_trainer.drafts.first import initial_draft
from aurora_trainer.drafts.kinds import Draft, load
from aurora_trainer.drafts.target import TargetTensors, open_target
from aurora_trainer.intake.assemble import Assembler
from aurora_trainer.intake.buffer import Buffer
from aurora_trainer.intake.sample import Sample
from aurora_trainer.intake.usable import unusable
from aurora_trainer.learn.accept_length import chains, measure, walked
from aurora_trainer.learn.gate import Decision, Gate
from aurora_trainer.learn.objective import losses, score
from aurora_trainer.learn.offer import Offer
from aurora_trainer.learn.optimizer import Optimizer
from aurora_trainer.learn.running_mean import RunningMean
from aurora_trainer.learn.served import Served
from aurora_trainer.learn.step_record import Step
from aurora_trainer.learn.training_state import restore, state_of

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

    def __init__(self, config: TrainerFile):
        self.config, trainer = config, config.trainer
        target = open_target(trainer.model.target)
        self.target = target_fingerprint(trainer.model.target)
        dtype = getattr(torch, trainer.model.compute_dtype)
        tensors = TargetTensors(target, trainer.model.device, dtype)
        model = trainer.model
        initial = initial_draft(model.target, model.draft, trainer.checkpoint.directory)
        self._train(load(initial, tensors))
        directory = config.weights.directory
        self.writer = WeightsWriter(directory, trainer.publish.keep)
        self.served = Served(directory, initial, self.target, tensors, trainer.publish.dtype)
        eos = trainer.assemble.eos_token_ids or target.eos_token_ids
        self.assembler = Assembler(trainer.assemble.model_copy(update={"eos_token_ids": eos}))
        self.buffer = Buffer(trainer.buffer, trainer.pace.seed)
        # by what became of them before the buffer
        self.samples: Counter[str] = Counter()
        self.gate = Gate(trainer.gate, self.samples)
        rejected = bool(trainer.loss.rejected) and trainer.batch.rejected
        self._packing = trainer.batch.model_copy(update={"rejected": rejected})
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
    def updates(self) -> int:
        """Optimizer steps that changed the weights."""
        return self.earlier_updates + self.optimizer.updates

    def feed(self, message: wire.Message, now_s: float) -> None:
        """Take one message; `now_s` is any clock that goes forward."""
        # a plain round says nothing of how long a draft is accepted
        if message.header.kind == "verify" and message.arrays["parents"].shape[1] > 1:
            good = [row for row in range(len(message.header.requests)) if row not in message.bad]
            self.traffic["steps"] += len(good)
            self.traffic["tokens"] += int(message.arrays["feature_lens"][good].sum())
        for sample in self.assembler.add(message) + self.assembler.idle(now_s):
            self._keep(sample)

    def idle(self, now_s: float) -> None:
        """Tell the time while nothing comes."""
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
        batch = pack(samples, self._packing).to(trainer.model.device)
        if not any(len(level.rows) for level in batch.on_cpu.levels):
            # nothing to learn: an update would only be the momentum's
            return None
        # Everything is queued on the device before anything is read from it.
        result = losses(self.draft, batch, trainer.loss)
        result.loss_sum.backward()
        scored = score(batch, result)
        every = trainer.metrics.rescore_every_steps
        rescored = bool(unseen) and every > 0 and self.steps % every == 0
        before = after = None
        # A chain's walk comes with the loss; a tree has to be grown.
        if unseen and (rescored or all(s.topk == 1 for s in unseen)):
            before = self._walk_batch(batch, samples, unseen, result)
        update = self.optimizer.step(result.loss_sum)
        if update.applied:
            self.mean.update(self.optimizer.masters, self.optimizer.updates)
            self.trained_until_ns = max(self.trained_until_ns, *(s.time_ns for s in samples))
        else:
            self._failed()
        positions = sum(len(s.features) for s in samples)
        self.positions += positions
        self._show(update.loss, before)
        if rescored:
            with torch.no_grad():
                again = losses(self.draft, batch, trainer.loss)
            after = self._walk_batch(batch, samples, unseen, again)
        return Step(
            update=update,
            score=scored,
            positions=positions,
            before=before,
            after=after,
            time_ns=[s.time_ns for s in samples],
            staleness=[
                self.served.version - int(s.tree_version[-1])
                for s in samples
                if len(s.tree_version)
            ],
        )

    def give_up(self) -> None:
        """The step that raised is over: no gradient stays, its batch is tried again in parts."""
        self.draft.zero_grad(set_to_none=True)
        self._failed()
        if self.config.trainer.model.device == "cuda":
            torch.cuda.empty_cache()

    def offer(self) -> Offer | None:
        """What to publish, if the draft was trained and the gate lets it pass: copies."""
        if self.updates == self._offered_at:
            return None
        weights = self.mean.weights or self.optimizer.masters
        tensors = self.draft.checkpoint(self.served.dtype, weights)
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

    def _failed(self) -> None:
        self._failed_steps.append(self.steps)
        self.buffer.failed()

    def _take_served(self) -> None:
        self.parent = self.served.version
        self.earlier_updates = self.updates
        self._train(self.served.to_train())

    def _train(self, draft: Draft) -> None:
        """Train `draft` from here on: its float32 weights become the masters of what computes."""
        model = self.config.trainer.model
        masters = {n: p.detach() for n, p in draft.named_parameters()}
        self.draft = draft.compute_in(model.device, getattr(torch, model.compute_dtype))
        config = self.config.trainer.optimizer
        width = self.draft.config.hidden_size
        self.optimizer = Optimizer(self.draft, config, masters, width)
        self.mean = RunningMean(config.average, self.optimizer.masters)

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
            draft = self.mean.draft(self.draft)
        return measure(draft, samples, trainer.batch, trainer.loss, trainer.model.device)

    @torch.no_grad()
    def _walk_batch(
        self, batch: Batch, samples: list[Sample], unseen: list[Sample], found: TreeLoss
    ) -> tuple[float, float]:
        """Steps and tokens of the walk over the `unseen` of a batch's samples."""
        chosen = {id(s) for s in unseen}
        some = [s if id(s) in chosen else None for s in samples]
        steps, tokens = walked(self.draft, batch, some, chains(self.draft, batch, found)).sum(0)
        return float(steps), float(tokens)

    def _show(self, loss: float, walk: tuple[float, float] | None) -> None:
        figures = {"loss": loss}
        if walk is not None and walk[0]:
            figures["accept_length"] = walk[1] / walk[0]
        for name, value in figures.items():
            self.shown[name] = SMOOTH * self.shown.get(name, value) + (1 - SMOOTH) * value
