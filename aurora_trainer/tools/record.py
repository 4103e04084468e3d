"""Record: receive in the trainer's place and write what comes to a recording, without training or a
target's files.
"""

from __future__ import annotations

import logging
import signal
import time
from pathlib import Path

from aurora_sglang_plugin.link.receiver import Receiver
from aurora_trainer.config import TrainerFile
from aurora_trainer.recordings.recording import Recording

log = logging.getLogger(__name__)

LEDGER = "ledger.json"
WAIT_S = 0.1


def record(config: TrainerFile, directory: Path, seconds: float | None = None) -> dict[str, int]:
    """Record until a signal comes, or for `seconds`; returns the recording's counters.

    Heartbeats are recorded too: they say what servers dropped. The ledger of what was lost is kept
    in the directory. Raises ValueError if the endpoint cannot be bound or the directory is
    another writer's.
    """
    stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    recording = Recording(directory, config.trainer.record)
    try:
        receiver = Receiver(
            config.link, config.trainer.receive, directory / LEDGER, record=recording.write
        )
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        log.info(
            "recorder ready endpoint=%s directory=%s bytes=%d",
            config.link.endpoint,
            directory,
            recording.nbytes,
        )
        began = said = time.monotonic()
        try:
            while not stopping and (seconds is None or time.monotonic() - began < seconds):
                # only to make room: the receiver's thread writes
                receiver.get(WAIT_S)
                if time.monotonic() - said >= config.trainer.metrics.every_s:
                    said = time.monotonic()
                    _show("recording", recording, receiver)
        finally:
            receiver.close()
        _show("recorded", recording, receiver)
    finally:
        recording.close()
    return dict(recording.counters)


def _show(what: str, recording: Recording, receiver: Receiver) -> None:
    ledger = receiver.ledger()
    sessions = ledger["sessions"].values()
    figures = {
        "messages": recording.counters["messages"],
        "bytes": recording.nbytes,
        "files": recording.files,
        "removed_files": recording.counters["removed_files"],
        "servers": len(sessions),
        "lost": sum(session["lost"] for session in sessions),
        "dropped_by_servers": sum(sum(session["dropped"].values()) for session in sessions),
        "rejected": sum(ledger["rejected"].values()),
        "not_recorded_full": recording.counters["full"],
        "not_recorded_disk": recording.counters["disk"],
    }
    log.info("%s %s", what, " ".join(f"{name}={value}" for name, value in figures.items()))
