"""The trainer's process: the loop over live traffic or over a recorded trace, its cadences, and its end.

Live, a step follows when enough new slots came in, versions and checkpoints by time or by steps; SIGTERM or SIGINT
ends it after the running step, with a checkpoint. Over a trace, everything that changes the weights depends on the
position in the trace alone, so that a killed run, resumed from its last checkpoint, ends with the same bits.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from aurora_sglang_plugin import wire
from aurora_trainer.checkpoint import load_newest, save_checkpoint, steps
from aurora_trainer.config import TrainerFile
from aurora_trainer.metrics import Metrics
from aurora_trainer.receive import Receiver
from aurora_trainer.trace import TraceWriter, read_trace
from aurora_trainer.train import Training

log = logging.getLogger(__name__)

WAIT_S = 0.05  # for a message, when nothing is to be done
MESSAGES_PER_TURN = 256  # taken in between two looks at the rest
REJECTED_EVERY_S = 1.0
BOOKS = "books.json"
LINE = (
    "steps", "draft_version", "loss", "accept_length", "accept_length_traffic", "tokens_per_s", "published", "buffer",
    "dropped", "lost", "rejected",
)  # fmt: skip


def open_daemon(config: TrainerFile) -> Daemon:
    """Load everything, and go on from the newest checkpoint or published version. Raises ValueError, OSError."""
    pace = config.trainer.pace
    torch.set_num_threads(pace.threads)
    os.nice(max(0, pace.nice - os.nice(0)))
    return Daemon(config)


class Daemon:
    """Owns the training, the cadences and the signals."""

    def __init__(self, config: TrainerFile):
        self.config = config
        self.stopping = False
        self.training = Training(config)
        self.checkpoints = config.trainer.checkpoint.directory
        self.resumed = load_newest(self.checkpoints)
        self.metrics = Metrics(config.trainer.metrics)
        publish, checkpoint = config.trainer.publish, config.trainer.checkpoint
        self._publish = Cadence(publish.every_s, publish.every_steps)
        self._checkpoint = Cadence(checkpoint.every_s, checkpoint.every_steps)
        self._status = Cadence(config.trainer.metrics.every_s, 0)
        self._rejected = Cadence(REJECTED_EVERY_S, 0)
        self._rate = (time.monotonic(), 0)  # when, slots trained by then

    def run_live(self, max_steps: int | None = None, record: Path | None = None) -> None:
        """Train on what servers send until a signal comes, or for `max_steps` more steps."""
        training, trainer = self.training, self.config.trainer
        if self.resumed:
            training.restore(self.resumed, live=True)
            log.info("resumed step=%d damaged=%d", self.resumed.step, self.resumed.damaged)
        else:
            training.go_on_from_published()
        trace = TraceWriter(record) if record else None
        books = self.checkpoints / BOOKS
        receiver = Receiver(self.config.link, trainer.receive, books, target=training.target, trace=trace)
        last = None if max_steps is None else training.steps + max_steps
        log.info("trainer ready endpoint=%s target=%s", self.config.link.endpoint, training.target)
        self._catch_signals()
        self._start_cadences()
        try:
            while not self.stopping and (last is None or training.steps < last):
                self._take_in(receiver, 0.0 if training.due() else WAIT_S)
                if training.due():
                    training.step()
                self._keep_cadences(receiver)
        finally:
            receiver.close()
            if trace is not None:
                trace.close()
        while (message := receiver.get()) is not None:  # received and in the books: let it count as assembled too
            training.feed(message, time.monotonic())
        self._end(receiver)

    def run_trace(self, path: Path, max_steps: int | None = None) -> None:
        """Train over a recorded trace up to its end, or to `max_steps` steps in all."""
        training, cursor = self.training, 0
        replayed = self.resumed.step if self.resumed else 0
        if self.resumed:
            training.restore(self.resumed, live=False)
        self._catch_signals()
        self._start_cadences()
        last = max_steps if max_steps is not None else 1 << 62
        for parts in read_trace(path):
            if self.stopping or training.steps >= last:
                break
            cursor += 1
            message = wire.decode(parts, max_bytes=self.config.link.max_message_bytes)
            if message.header.target != training.target:
                training.samples["wrong_target_messages"] += 1
                continue
            training.feed(message, message.header.time_ns / 1e9)  # the trace's own clock
            while training.due() and training.steps < last and not self.stopping:
                training.step(replay=training.steps < replayed)
                if training.steps == replayed:
                    self._check_replay(path, cursor)
                if training.steps > replayed:
                    self._keep_cadences(None, cursor)
        if training.steps < replayed and not self.stopping:
            raise ValueError(
                f"trace {path} ends after {training.steps} steps, the checkpoint is of step {replayed}; expected the "
                "trace that it was made from: set trainer.checkpoint.directory to a new directory for another trace"
            )
        if training.steps > replayed:
            self._save(cursor)
        self._end(None)

    def status(self, receiver: Receiver | None) -> dict[str, Any]:
        """One record of figures: numbers, and numbers by cause."""
        training = self.training
        now, (then, slots) = time.monotonic(), self._rate
        self._rate = (now, training.slots)
        decided = training.gate.newest
        status = {
            "time_unix_s": time.time(),
            "pid": os.getpid(),
            "steps": training.steps,
            "optimizer_step": training.updates,
            "draft_version": training.served.version,
            "tokens": training.slots,
            "tokens_per_s": (training.slots - slots) / max(now - then, 1e-9),
            **training.shown,  # loss; accept_length: of a greedy chain, on batches before they were trained on
            "accept_length_served": decided.served if decided else None,
            "accept_length_candidate": decided.candidate if decided else None,
            "accept_length_traffic": training.traffic["tokens"] / max(training.traffic["steps"], 1),
            "traffic": dict(training.traffic),
            "published": dict(training.published),
            "gate": dict(training.gate.decisions),
            "samples": dict(training.samples),
            "assembler": dict(training.assembler.counters),
            "buffer": training.buffer.stats(),
            "buffer_dropped": dict(training.buffer.dropped),
            "skipped_updates": training.optimizer.skipped,
        }
        if receiver is not None:
            books = receiver.books()
            epochs = books["epochs"].values()
            status["books"] = books["epochs"]
            status["received"] = sum(e["received"] for e in epochs)
            status["lost"] = sum(e["lost"] for e in epochs)
            status["rejected"] = books["rejected"]
            status["dropped"] = _sum_by_cause(e["dropped"] for e in epochs)  # by the publishers
        return status

    def _take_in(self, receiver: Receiver, timeout_s: float) -> None:
        for _ in range(MESSAGES_PER_TURN):
            message = receiver.get(timeout_s)
            if message is None:
                break
            self.training.feed(message, time.monotonic())
            timeout_s = 0.0
        else:
            return
        self.training.idle(time.monotonic())

    def _keep_cadences(self, receiver: Receiver | None, cursor: int | None = None) -> None:
        training, now = self.training, time.monotonic()
        if cursor is None and self._rejected.due(now, 0):
            training.heed_rejections()
        if self._publish.due(now, training.steps):
            training.publish()
        if self._checkpoint.due(now, training.steps):
            self._save(cursor)
        if self._status.due(now, 0):
            self.metrics.report(self.status(receiver), LINE)

    def _save(self, cursor: int | None) -> None:
        started = time.monotonic()
        tensors, state = self.training.checkpoint()
        keep = self.config.trainer.checkpoint.keep
        try:
            save_checkpoint(self.checkpoints, self.training.steps, tensors, state | {"cursor": cursor}, keep)
        except OSError as error:  # a full disk: training and publishing are worth going on with
            log.error("checkpoint not written step=%d error=%s", self.training.steps, error)
            return
        log.info("checkpoint step=%d seconds=%.2f", self.training.steps, time.monotonic() - started)

    def _check_replay(self, path: Path, cursor: int) -> None:
        """The buffer must stand where it stood, or the trace is another one than the checkpoint's."""
        state = self.resumed.state
        if state["cursor"] != cursor or state["buffer"] != _as_json(self.training.buffer.state()):
            raise ValueError(
                f"trace {path} does not lead to the checkpoint of step {self.resumed.step} (message {cursor}, "
                f"the checkpoint was at {state['cursor']}); expected the same trace and settings as before"
            )
        log.info("resumed step=%d cursor=%d damaged=%d", self.resumed.step, cursor, self.resumed.damaged)

    def _end(self, receiver: Receiver | None) -> None:
        """The last checkpoint (live), the last status."""
        if receiver is not None and self.training.steps not in steps(self.checkpoints)[-1:]:
            self._save(None)
        self.metrics.report(self.status(receiver), LINE)
        self.training.close()
        log.info("trainer ended steps=%d draft_version=%d", self.training.steps, self.training.served.version)

    def _catch_signals(self) -> None:
        def stop(number: int, frame: object) -> None:
            self.stopping = True

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)

    def _start_cadences(self) -> None:
        for cadence in (self._publish, self._checkpoint, self._status, self._rejected):
            cadence.restart(time.monotonic(), self.training.steps)


class Cadence:
    """Due every so many seconds or steps, whichever comes first; 0 switches one off."""

    def __init__(self, every_s: float, every_steps: int):
        self.every_s, self.every_steps = every_s, every_steps
        self._at_s, self._at_step = 0.0, 0

    def restart(self, now_s: float, step: int) -> None:
        self._at_s, self._at_step = now_s, step

    def due(self, now_s: float, step: int) -> bool:
        by_time = self.every_s and now_s - self._at_s >= self.every_s
        by_steps = self.every_steps and step - self._at_step >= self.every_steps
        if by_time or by_steps:
            self.restart(now_s, step)
        return bool(by_time or by_steps)


def _sum_by_cause(counts) -> dict[str, int]:
    total: dict[str, int] = {}
    for by_cause in counts:
        for cause, count in by_cause.items():
            total[cause] = total.get(cause, 0) + count
    return total


def _as_json(value: Any) -> Any:
    import json

    return json.loads(json.dumps(value))
