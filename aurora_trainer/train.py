"""Training, without sockets and clocks: messages in, optimizer steps, versions out.

    feed(message)   assemble -> buffer
    step()          buffer -> batch -> score for the gate -> loss -> optimize
    publish()       gate -> publish_weights

What happens to the weights depends only on the messages and on the order of these calls, so that a recorded trace
trains to the bit as it did. `step(replay=True)` draws a batch and leaves it: after a restart it brings buffer and
schedule to where the checkpoint was, from the trace itself.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from typing import Any

import torch
from aurora_kernels.tree_loss import TreeLoss

from aurora_sglang_plugin import wire
from aurora_sglang_plugin.draft_check import check_draft
from aurora_sglang_plugin.manifest import target_fingerprint
from aurora_trainer.assemble import Assembler
from aurora_trainer.batch import Batch, pack
from aurora_trainer.buffer import Buffer
from aurora_trainer.checkpoint import Checkpoint
from aurora_trainer.config import TrainerFile
from aurora_trainer.draft import Draft
from aurora_trainer.gate import Gate
from aurora_trainer.loss import Score, losses, score
from aurora_trainer.optimize import Optimizer
from aurora_trainer.publish_weights import WeightsWriter
from aurora_trainer.sample import Sample
from aurora_trainer.served import Served
from aurora_trainer.step import Step, sample_scores, slots_of
from aurora_trainer.target import open_target

log = logging.getLogger(__name__)

SMOOTH = 0.9  # of what the status shows, per step


class Training:
    """Owns the draft, its optimizer, the buffer, and the books of what became of every sample.

    Raises ValueError where target, draft or weights directory cannot be used.
    """

    def __init__(self, config: TrainerFile):
        self.config, trainer = config, config.trainer
        target = open_target(trainer.model.target)
        self.target = target_fingerprint(trainer.model.target)
        embed = target.embedding().to(trainer.model.device, getattr(torch, trainer.model.compute_dtype))
        for note in check_draft(trainer.model.draft, target.config):
            log.warning("draft directory=%s note=%r", trainer.model.draft, note)
        self._train(Draft.load(trainer.model.draft, embed))
        self.writer = WeightsWriter(config.weights.directory, trainer.publish.keep)
        model = trainer.model
        self.served = Served(config.weights.directory, model.draft, self.target, embed, trainer.publish.dtype)
        eos = trainer.assemble.eos_token_ids or target.eos_token_ids
        self.assembler = Assembler(trainer.assemble.model_copy(update={"eos_token_ids": eos}))
        self.buffer = Buffer(trainer.buffer, trainer.pace.seed)
        self.gate = Gate(trainer.gate)
        self._packing = trainer.batch if trainer.loss.rejected else trainer.batch.model_copy(update={"rejected": False})
        self.parent = 0  # the version that training went on from
        self.earlier_updates = 0  # of optimizers before the last rollback
        self.steps = 0  # batches drawn; the optimizer may have skipped some
        self.slots = 0  # trained on, repetitions included
        self.trained_until_ns = 0  # when the newest step that the draft was trained on was captured
        self.samples: Counter[str] = Counter()  # by what became of them before the buffer
        self.published: Counter[str] = Counter()  # by outcome
        self.traffic = {"steps": 0, "tokens": 0}  # verify steps of requests, and tokens that they committed
        self.shown: dict[str, float] = {}  # smoothed figures for the status
        self._credit = 0  # slots that came in and were not answered by a step yet
        self._offered_at = 0  # optimizer step at which the gate was last asked
        self._trained: weakref.WeakValueDictionary[int, Sample] = weakref.WeakValueDictionary()
        torch.manual_seed(trainer.pace.seed)  # after the modules above were made, which draw

    @property
    def updates(self) -> int:
        """Optimizer steps that changed the weights."""
        return self.earlier_updates + self.optimizer.updates

    def feed(self, message: wire.Message, now_s: float) -> None:
        """Take one message; `now_s` is any clock that goes forward."""
        if message.header.kind == "verify":
            self.traffic["steps"] += len(message.header.requests)
            self.traffic["tokens"] += int(message.arrays["feature_lens"].sum())
        for sample in self.assembler.add(message) + self.assembler.idle(now_s):
            self._keep(sample)

    def idle(self, now_s: float) -> None:
        """Tell the time while nothing comes."""
        for sample in self.assembler.idle(now_s):
            self._keep(sample)

    def due(self) -> bool:
        """Whether enough came in for the next step."""
        pace = self.config.trainer.pace
        return pace.enabled and self._credit >= pace.new_slots_per_step and len(self.buffer) > 0

    def step(self, replay: bool = False) -> Step | None:
        """Train on one batch. `replay`: only draw it, and return None."""
        trainer = self.config.trainer
        samples = self.buffer.take(trainer.batch.max_slots)
        self._credit -= trainer.pace.new_slots_per_step
        self.steps += 1
        unseen = [s for s in samples if id(s) not in self._trained]
        self._trained.update((id(s), s) for s in samples)
        if replay:
            return None
        batch = pack(samples, self._packing).to(trainer.model.device)
        # Everything is queued on the device before anything is read from it.
        gated = self.steps % trainer.gate.score_every_steps == 0
        served = self._losses_served(unseen, batch.depth) if unseen and gated else None
        result = losses(self.draft, batch, trainer.loss)
        result.loss_sum.backward()
        scored = score(batch, result)
        if served is not None:
            scores = dict(zip(map(id, samples), sample_scores(batch, scored, len(samples)), strict=True))
            self.gate.record(sample_scores(served[0], score(*served), len(unseen)), [scores[id(s)] for s in unseen])
        update = self.optimizer.step(result.loss_sum)
        if update.applied:
            self.trained_until_ns = max(self.trained_until_ns, *(s.time_ns for s in samples))
        slots = sum(len(s.features) for s in samples)
        self.slots += slots
        self._show(update.loss, scored)
        rows = slots_of(batch, samples, unseen)
        every = trainer.metrics.rescore_every_steps
        rescored = unseen and every and self.steps % every == 0
        return Step(
            update=update,
            score=scored,
            slots=slots,
            before=scored.accept_length(rows),
            after=self._rescore(batch).accept_length(rows) if rescored else None,
            time_ns=[s.time_ns for s in samples],
            staleness=[self.served.version - int(s.tree_version[-1]) for s in samples if len(s.tree_version)],
        )

    def publish(self) -> int | None:
        """Publish the draft as it is, if it was trained and the gate lets it pass. Returns the version, or None."""
        if self.updates == self._offered_at:
            return None
        self._offered_at = self.updates
        tensors = self.draft.checkpoint(self.served.dtype, self.optimizer.masters)
        finite = all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())
        decision = self.gate.decide(finite)
        if not decision.passed:
            self.published[f"refused_{decision.reason}"] += 1
            return None
        version = self.writer.publish(
            tensors,
            self.draft.config.to_json(str(self.served.dtype).removeprefix("torch.")),
            target=self.target,
            parent=self.parent,
            optimizer_step=self.updates,
            trained_until_ns=self.trained_until_ns,
            gate=decision.fields(),
        )
        if version is None:
            self.published["unchanged"] += 1
            return None
        self.published["published"] += 1
        self.parent = version
        self.served.take(version, tensors)
        self.gate.restart()
        log.info("weights published version=%d optimizer_step=%d", version, self.updates)
        return version

    def heed_rejections(self) -> None:
        """Where servers rolled the newest version back, go on from the version that they went back to."""
        version = self.served.roll_back()
        if version is None:
            return
        log.warning("version rolled back by a server, training goes on from version=%d", version)
        self.published["rolled_back"] += 1
        self._take_served()
        self.gate.restart()

    def go_on_from_published(self) -> None:
        """Without a checkpoint: start from what servers serve now, not from the initial draft."""
        if self.served.version:
            self._take_served()
            log.info("no checkpoint, going on from published version=%d", self.parent)

    def checkpoint(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What `restore` goes on from: tensors, and JSON."""
        tensors = {f"draft/{n}": p.detach() for n, p in self.draft.named_parameters()}
        optimizer_tensors, optimizer_state = self.optimizer.state_dict()
        tensors |= {f"optimizer/{n}": t for n, t in optimizer_tensors.items()}
        tensors["random/torch"] = torch.get_rng_state()
        state = {
            "target": self.target,
            "parent": self.parent,
            "served": self.served.version,
            "rolled_back": sorted(self.served.rolled_back),
            "steps": self.steps,
            "slots": self.slots,
            "credit": self._credit,
            "samples": dict(self.samples),
            "published": dict(self.published),
            "traffic": self.traffic,
            "earlier_updates": self.earlier_updates,
            "trained_until_ns": self.trained_until_ns,
            "optimizer": optimizer_state,
            "gate": self.gate.state(),
            "buffer": self.buffer.state(),
            "open_requests": self.assembler.open_requests,
        }
        return tensors, state

    def restore(self, found: Checkpoint, live: bool) -> None:
        """Go on from a checkpoint. `live`: buffered samples and open requests are lost, and counted.

        Otherwise they come from replaying the trace, with all that counts them. Raises ValueError for another target.
        """
        tensors, state = found.tensors, found.state
        if state["target"] != self.target:
            raise ValueError(
                f"checkpoint of step {found.step} is for target {state['target']}, this one is {self.target}; expected "
                "the same target: set trainer.checkpoint.directory to a new directory for a new target"
            )
        own = {n.removeprefix("draft/"): t for n, t in tensors.items() if n.startswith("draft/")}
        self.draft.load_checkpoint(own, f"checkpoint of step {found.step}")
        self.optimizer.load_state_dict(
            {n.removeprefix("optimizer/"): t for n, t in tensors.items() if n.startswith("optimizer/")},
            state["optimizer"],
        )
        torch.set_rng_state(tensors["random/torch"])
        self.parent, self.slots, self.earlier_updates = state["parent"], state["slots"], state["earlier_updates"]
        self.trained_until_ns = state.get("trained_until_ns", 0)
        self.published = Counter(state["published"])
        self.served.rolled_back = set(state["rolled_back"])
        self.gate.restore(state["gate"])
        if state["served"] != self.served.version:
            self.gate.restart()
        if live:
            self.steps = state["steps"]
            self.samples = Counter(state["samples"])
            self.samples["lost_open"] += state["open_requests"]
            self.traffic = dict(state["traffic"])
            self.buffer.restore(state["buffer"])

    def close(self) -> None:
        self.writer.close()

    def _take_served(self) -> None:
        self.parent = self.served.version
        self.earlier_updates = self.updates
        self._train(self.served.to_train())

    def _train(self, draft: Draft) -> None:
        """Train `draft` from here on: its float32 weights become the masters of what computes."""
        model, masters = self.config.trainer.model, {n: p.detach() for n, p in draft.named_parameters()}
        self.draft = draft.compute_in(model.device, getattr(torch, model.compute_dtype))
        self.optimizer = Optimizer(self.draft, self.config.trainer.optimizer, masters)

    def _keep(self, sample: Sample) -> None:
        self.samples["assembled"] += 1
        cause = self._unusable(sample)
        if cause:
            self.samples[cause] += 1
            return
        self._credit += int((sample.slot_node >= 0).sum())
        self.buffer.put(sample)

    def _unusable(self, sample: Sample) -> str | None:
        """A cause where training cannot use the sample; ids that are too large would index out of the embedding."""
        config = self.draft.config
        if sample.features.shape[1] != config.feature_size:
            return "wrong_feature_width"
        ids = [t for t in (sample.tokens, sample.node_token, sample.topk_ids) if t.numel()]
        if any(int(t.max()) >= config.vocab_size for t in ids):
            return "token_out_of_vocabulary"
        if sample.num_steps < 1 or not bool((sample.slot_node >= 0).any()):
            return "without_targets"
        return None

    @torch.no_grad()
    def _losses_served(self, samples: list[Sample], depth: int) -> tuple[Batch, TreeLoss]:
        """The forward pass of the served weights."""
        trainer = self.config.trainer
        batch = pack(samples, trainer.batch.model_copy(update={"rejected": False, "depth": depth}))
        batch = batch.to(trainer.model.device)
        return batch, losses(self.served.draft, batch, trainer.loss)

    @torch.no_grad()
    def _rescore(self, batch: Batch) -> Score:
        return score(batch, losses(self.draft, batch, self.config.trainer.loss))

    def _show(self, loss: float, score: Score) -> None:
        total, count = score.accept_length()
        for name, value in (("loss", loss), ("accept_length", total / max(count, 1))):
            self.shown[name] = SMOOTH * self.shown.get(name, value) + (1 - SMOOTH) * value
