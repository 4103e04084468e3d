"""The trainer's process: the loop over live traffic or over a recording, its cadences, and its end.

No fault of disk or device ends it (disk_faults.py): what failed is tried again, while all else goes
on. A batch that cannot be trained on is tried again in parts, so that it costs the one sample that
is at fault.

Live, a step follows when enough new positions came in, versions and checkpoints by time or by
steps; SIGTERM or SIGINT ends it after the running step, with a checkpoint. Over a recording,
everything that changes the weights depends on the position in the recording alone, so that a killed
run, resumed from its last checkpoint, ends with the same bits.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aurora_sglang_plugin.disk_faults import Retry
from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.link.receiver import Receiver
from aurora_trainer.background_writer import Background
from aurora_trainer.checkpoint import check_replay, load_newest, save_checkpoint
from aurora_trainer.config import TrainerFile
from aurora_trainer.learn.follower import Follower
from aurora_trainer.learn.offer import Offer
from aurora_trainer.learn.trainer import Training
from aurora_trainer.metric_families.intake import UNRECORDED
from aurora_trainer.metrics import Metrics
from aurora_trainer.ranks import Ranks, join
from aurora_trainer.recordings.recording import CorruptionLog, Recording, read_messages
from aurora_trainer.recordings.replay import on_one_clock, paced
from aurora_trainer.schedule import Schedule
from aurora_trainer.status import Lessons, status_of

log = logging.getLogger(__name__)

# for a message, when nothing is to be done
WAIT_S = 0.05
# taken in between two looks at the rest
MESSAGES_PER_TURN = 256
REJECTED_EVERY_S = 1.0
# after one that raised: memory of the device may come back
STEP_WAITS_S = (0.1, 10.0)
LEDGER = "ledger.json"
# between two looks at whether traffic teaches anything
QUIET_S = 60.0
LINE = (
    "steps", "draft_version", "loss", "accept_length", "accept_length_traffic", "tokens_per_s",
    "published", "buffer", "dropped", "lost", "rejected",
)  # fmt: skip


def open_daemon(config: TrainerFile) -> Daemon | Follower:
    """Load everything, and go on from the newest checkpoint or published version. Of several ranks
    (ranks.py) only the first is a Daemon. Raises ValueError, OSError."""
    pace = config.trainer.pace
    torch.set_num_threads(pace.threads)
    os.nice(max(0, pace.nice - os.nice(0)))
    ranks = join(config.trainer.ranks, config.trainer.model.device)
    return Follower(config, ranks) if ranks.rank else Daemon(config, ranks)


class Daemon:
    """Owns the training, the schedules and the signals."""

    def __init__(self, config: TrainerFile, ranks: Ranks | None = None):
        self.config, self.stopping = config, False
        self.training = Training(config, ranks)
        self.checkpoints = config.trainer.checkpoint.directory
        self.resumed = load_newest(self.checkpoints)
        self.metrics = Metrics(config.trainer.metrics)
        self.damage = CorruptionLog()
        self._recording: Recording | None = None
        publish, checkpoint = config.trainer.publish, config.trainer.checkpoint
        self._publish = Schedule(publish.every_s, publish.every_steps)
        self._checkpoint = Schedule(checkpoint.every_s, checkpoint.every_steps)
        self._status = Schedule(config.trainer.metrics.every_s, 0)
        self._rejected = Schedule(REJECTED_EVERY_S, 0)
        self._rate = (time.monotonic(), 0)
        self._taught = Schedule(QUIET_S, 0)
        self._lessons = Lessons()
        self._saved_step = self.resumed.step if self.resumed else None
        self._unsaved = False
        self._jobs = {
            name: Retry(name) for name in ("message", "publish", "checkpoint", "rejected")
        }
        self._jobs["step"] = Retry("step", *STEP_WAITS_S)
        self._background = Background(self._jobs, meanwhile=self.training.ranks.keep_alive)

    def run_live(self, max_steps: int | None = None, record: Path | None = None) -> None:
        """Train on what servers send until a signal comes, or for `max_steps` more steps."""
        training, trainer = self.training, self.config.trainer
        if self.resumed:
            training.restore(self.resumed, live=True)
            log.info("resumed step=%d damaged=%d", self.resumed.step, self.resumed.damaged)
        else:
            training.resume_from_published()
        # what servers rolled back while no trainer ran
        self._jobs["rejected"].run(training.apply_rollbacks, time.monotonic())
        recording = self._recording = Recording(record, trainer.record) if record else None
        receiver = Receiver(
            self.config.link,
            trainer.receive,
            self.checkpoints / LEDGER,
            target=training.target,
            record=recording.write if recording else None,
        )
        self.metrics.begin(self.status(receiver))
        last = None if max_steps is None else training.steps + max_steps
        log.info("trainer ready endpoint=%s target=%s", self.config.link.endpoint, training.target)
        self._catch_signals()
        self._start_cadences(time.monotonic())
        try:
            while not self.stopping and (last is None or training.steps < last):
                due = training.due() and not self._jobs["step"].waits(time.monotonic())
                self._take_in(receiver, 0.0 if due else WAIT_S)
                if training.due():
                    self._step(time.time())
                self._keep_cadences(receiver, time.monotonic())
        finally:
            receiver.close()
            if recording is not None:
                recording.close()
        # received and in the ledger: let it count as assembled too
        while (message := receiver.get()) is not None:
            self._feed(message, time.monotonic())
        self._end(receiver)

    def run_recording(
        self, path: Path, max_steps: int | None = None, *, original_pace: bool = False
    ) -> None:
        """Train over a recording up to its end, or to `max_steps` steps in all.

        Versions and checkpoints follow the recording's own clock, and its end offers the last
        version. Damage is logged, counted and passed over.
        """
        self._background = Background(self._jobs, True, self.training.ranks.keep_alive)
        training, cursor = self.training, 0
        replayed = self.resumed.step if self.resumed else 0
        if self.resumed:
            training.restore(self.resumed, live=False)
        self.metrics.begin(self.status(None))
        self._catch_signals()
        last = max_steps if max_steps is not None else 1 << 62
        now_s, started, ended = 0.0, False, False
        records = on_one_clock(read_messages(path, self.damage))
        if original_pace:
            records = paced(records, lambda: self.stopping, training.ranks.keep_alive)
        for _, message in records:
            if self.stopping or training.steps >= last:
                break
            cursor += 1
            if message.header.target != training.target:
                training.samples["wrong_target_messages"] += 1
                continue
            now_s = max(now_s, message.header.time_ns / 1e9)
            if not started:
                self._start_cadences(now_s)
                started = True
            self._feed(message, now_s)
            while training.due() and training.steps < last and not self.stopping:
                self._step(now_s, replay=training.steps < replayed)
                if training.steps == replayed:
                    check_replay(self.resumed, path, cursor, training.buffer.state())
                    self._start_cadences(now_s)
                    # what is served, and when, is part of what drift.py sees
                    self._publish.restart(*self.resumed.state.get("publish", self._publish.last))
                if training.steps > replayed:
                    self._keep_cadences(None, now_s, cursor)
        else:
            ended = True
        if training.steps < min(replayed, last) and not self.stopping:
            raise ValueError(
                f"recording {path} ends after {training.steps} steps, the checkpoint is of step"
                f" {replayed}; expected the recording that it was made from: set"
                " trainer.checkpoint.directory to a new one for another"
            )
        if training.steps > replayed:
            if ended:
                self._offer(now_s, at_once=True)
            self._save_last(cursor, now_s)
        self._end(None)

    def status(self, receiver: Receiver | None) -> dict[str, Any]:
        """One record of figures: numbers, and numbers by cause."""
        training, now, (then, positions) = self.training, time.monotonic(), self._rate
        self._rate = (now, training.positions)
        status = {
            "time_unix_s": time.time(),
            "pid": os.getpid(),
            "tokens_per_s": (training.positions - positions) / max(now - then, 1e-9),
            **status_of(training),
        }
        jobs = self._jobs | self.metrics.jobs
        status["faults"] = {name: job.faults for name, job in jobs.items()}
        if self.damage.count:
            status["damaged_records"] = self.damage.count
        if (recording := self._recording) is not None:
            counters = recording.counters
            status["recording"] = {"messages": counters["messages"], "bytes": recording.nbytes}
            status["unrecorded"] = {cause: counters[cause] for cause in UNRECORDED}
        if receiver is not None:
            status |= receiver.status()
            status["faults"]["ledger"] = receiver.ledger()["write_faults"]
        return status

    def _take_in(self, receiver: Receiver, timeout_s: float) -> None:
        for _ in range(MESSAGES_PER_TURN):
            self.metrics.clock.turn_to("wait")
            message = receiver.get(timeout_s)
            self.metrics.clock.turn_to("assemble")
            if message is None:
                break
            self._feed(message, time.monotonic())
            timeout_s = 0.0
        else:
            return
        now = time.monotonic()
        self._jobs["message"].run(lambda: self.training.idle(now), now, at_once=True)

    def _feed(self, message: wire.Message, now_s: float) -> None:
        self._jobs["message"].run(lambda: self.training.feed(message, now_s), now_s, at_once=True)

    def _step(self, now_s: float, replay: bool | None = None) -> None:
        """`replay` None: live, where a step that raised makes the next one wait."""

        def train() -> None:
            started = time.monotonic()
            try:
                step = self.training.step(bool(replay))
            except Exception:
                self.training.give_up()
                raise
            if step is not None:
                self.metrics.trained(step, time.monotonic() - started, now_s)

        self.metrics.clock.turn_to("train")
        self._jobs["step"].run(train, time.monotonic(), at_once=replay is not None)
        self.metrics.clock.turn_to("other")

    def _offer(self, now: float, at_once: bool = False) -> None:
        """Publish, if the draft was trained and the gate lets it pass."""
        started, training = time.monotonic(), self.training
        offered: list[Offer] = []

        def offer() -> Callable[[], int | None] | None:
            offered.extend(filter(None, [training.offer()]))
            return offered[0].write if offered else None

        def written(version: int | None) -> None:
            training.written(offered[0], version)
            if version is not None:
                # a checkpoint that was taken meanwhile knows nothing of it
                self._saved_step = None
                self.metrics.published(time.monotonic() - started)

        def failed() -> None:
            training.published["failed"] += 1

        self.metrics.clock.turn_to("publish")
        self._background.start("publish", offer, written, failed, now, at_once)
        self.metrics.clock.turn_to("other")

    def _keep_cadences(
        self, receiver: Receiver | None, now: float, cursor: int | None = None
    ) -> None:
        """`now`: this machine's clock, or over a recording (`cursor`: the message) that one's."""
        training, jobs, background = self.training, self._jobs, self._background
        background.poll(now)
        # not while a version is written: it names its parent
        if cursor is None and not background.busy("publish") and self._rejected.due(now, 0):
            jobs["rejected"].run(training.apply_rollbacks, now)
        for name, schedule, urgent, start in (
            ("publish", self._publish, training.urgent, lambda: self._offer(now)),
            ("checkpoint", self._checkpoint, False, lambda: self._save(cursor, now)),
        ):
            # what is still being written keeps its turn
            if not background.busy(name):
                if schedule.due(now, training.steps) or jobs[name].due(now) or urgent:
                    start()
        if self._status.due(time.monotonic(), 0):
            self.metrics.report(self.status(receiver), LINE)
        if self._taught.due(now, 0):
            self._lessons.look(self.training)

    def _save(self, cursor: int | None, now: float, at_once: bool = False) -> None:
        started, step = time.monotonic(), self.training.steps
        keep = self.config.trainer.checkpoint.keep

        def snapshot() -> Callable[[], object]:
            tensors, state = self.training.checkpoint()
            state |= {"cursor": cursor, "publish": self._publish.last}
            return lambda: save_checkpoint(self.checkpoints, step, tensors, state, keep)

        def saved(path: object) -> None:
            seconds, self._saved_step = time.monotonic() - started, step
            self.metrics.saved(seconds, True)
            log.info("checkpoint step=%d seconds=%.2f", step, seconds)

        def failed() -> None:
            self.metrics.saved(time.monotonic() - started, False)

        self.metrics.clock.turn_to("checkpoint")
        self._background.start("checkpoint", snapshot, saved, failed, now, at_once)
        self.metrics.clock.turn_to("other")

    def _save_last(self, cursor: int | None, now: float) -> None:
        self._save(cursor, now, at_once=True)
        self._background.wait(now)
        self._unsaved = self._saved_step != self.training.steps

    def _end(self, receiver: Receiver | None) -> None:
        """The last checkpoint (live), the last status.

        Raises OSError where the last checkpoint could not be written.
        """
        self._background.wait(time.monotonic())
        if receiver is not None and self.training.steps != self._saved_step:
            self._save_last(None, time.monotonic())
        self._background.close()
        self._lessons.look(self.training)
        self.metrics.report(self.status(receiver), LINE)
        self.training.close()
        steps, version = self.training.steps, self.training.served.version
        log.info("trainer ended steps=%d draft_version=%d", steps, version)
        if self._unsaved:
            unsaved = (
                f"no checkpoint of the last step, {self.training.steps}, in {self.checkpoints}"
            )
            log.error("%s", unsaved)
            raise OSError(f"{unsaved}; expected a directory that can be written, with room for it")

    def _catch_signals(self) -> None:
        def stop(number: int, frame: object) -> None:
            self.stopping = True

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)

    def _start_cadences(self, now: float) -> None:
        for each in (self._publish, self._checkpoint, self._rejected, self._taught):
            each.restart(now, self.training.steps)
        self._status.restart(time.monotonic(), self.training.steps)
