"""Watch a weights directory from a server: notice new versions, heed rejections, and have what was
read and checked (reader.py) staged.

All of it happens on a thread of its own. A version that fails is counted by cause, logged once, and
tried again only when CURRENT names another or the server's target changes; only `missing` (a race
with the trainer's clean-up, or a file system that cannot be read now) is tried again at the next
poll. A version that a server rolled back (REJECTED) gives way to its parent, also while it drafts.

The directory may be on a network file system, which answers stat from a cache for a minute: what is
new is noticed by opening files, which asks the server (docs/deploy/README.md).
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from aurora_sglang_plugin.weights.manifest import (
    CURRENT,
    REJECTED,
    ManifestError,
    current_version,
    read_manifest,
    rejected_versions,
    version_name,
)
from aurora_sglang_plugin.weights.reader import Expected, Weights, read_weights

log = logging.getLogger(__name__)

# to writing a line of REJECTED once more that cannot be read back: at first, and at most
REJECT_AGAIN_S, REJECT_AT_MOST_S = 1.0, 60.0
# of CURRENT, whole, and of REJECTED
STATE_BYTES = 1 << 12


class Watcher:
    """Polls CURRENT on a daemon thread and hands each new, checked version to `stage`.

    `stage(weights)` runs on this thread and returns True where the version was staged, False where
    there is no room yet (it is offered again at the next poll). Any exception is counted under its
    ManifestError cause, or as `stage`.

    wait_s: a version is handed over so long after it was noticed, unless it was rejected meanwhile;
        one that the first poll finds, at once.
    """

    def __init__(
        self,
        directory: Path,
        poll_s: float,
        expected: Expected,
        stage: Callable[[Weights], bool],
        wait_s: float = 0.0,
        free: Callable[[], bool] = lambda: True,
    ):
        self.directory = Path(directory)
        self.poll_s = poll_s
        self.expected = expected
        self.stage = stage
        # whether `stage` would take a version now: else none is read
        self.free = free
        # by cause, one per version (a cause `missing`: one per try)
        self.failures: Counter[str] = Counter()
        # the newest version that needs no further attention: staged, or refused
        self.seen_version = 0
        # of CURRENT and REJECTED, by `_state`
        self._seen_states: tuple | None = None
        # What `look_again` was last told, and what of it was heeded: a new tuple each time.
        self._asked: tuple[int] | None = None
        self._heeded: tuple[int] | None = None
        self._logged: tuple[int, str] | None = None
        self._wait_s, self._polls = wait_s, 0
        # versions that wait, by when they may be handed over (monotonic)
        self._waiting: dict[int, float] = {}
        # versions to be written to REJECTED, until they are read back
        self._rejects: deque[int] = deque()
        # when they may be written again (monotonic), and how long after that once more
        self._reject_at, self._reject_wait_s = 0.0, REJECT_AGAIN_S
        # rolled back by this server, whether or not REJECTED says so already
        self._rolled_back: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="aurora-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def look_again(self, version: int, target: str | None = None) -> None:
        """From another thread: at the next poll read what CURRENT names, unless it is `version`.

        `target`: from now on versions must be made for this one.
        """
        if target is not None:
            self.expected = replace(self.expected, target=target)
        self._asked = (version,)

    def reject(self, version: int, served: int, write: bool) -> None:
        """From another thread: `version` was rolled back, and `served` drafts. At the next poll it
        is written to REJECTED (`write`: on one rank of a server), and CURRENT is read again."""
        self._rolled_back.add(version)
        if write:
            self._rejects.append(version)
        self.look_again(served)

    def _run(self) -> None:
        while not self._stop.wait(self.poll_s):
            self.poll()

    def poll(self) -> None:
        """Look once.

        Never raises: this is the serving boundary, a bad file must not end the server's thread.
        """
        version = 0
        self._polls += 1
        self._write_rejected()
        if (asked := self._asked) is not self._heeded:
            self._heeded, self.seen_version, self._seen_states = asked, asked[0], None
        try:
            try:
                states = (_state(self.directory / CURRENT), _state(self.directory / REJECTED))
                if states[0] is None or states == self._seen_states:
                    # nothing was published yet, or nothing is new
                    return
                version = self._wanted()
            except OSError as error:
                raise ManifestError("missing", str(error)) from None
            if version not in (0, self.seen_version) and not self.free():
                return
            done = version in (0, self.seen_version) or self.stage(
                read_weights(self.directory / version_name(version), self.expected)
            )
            if done:
                self.seen_version = version
                # what waits is looked at again, though no file changes
                self._seen_states = None if self._waiting else states
        except ManifestError as error:
            self._fail(version, error.cause, error)
            if error.cause != "missing":
                self.seen_version = version
                self._seen_states = None if self._waiting else states
        except Exception as error:
            self._fail(version, "stage", error)
            self.seen_version = version

    def _write_rejected(self) -> None:
        """Append a line for each version that is due, one write a line.

        Other servers append to the same file, and on NFS two machines may do so at the same place:
        a version is due until its line was read back.
        """
        if not self._rejects:
            return
        try:
            there = rejected_versions(self.directory)
            while self._rejects and self._rejects[0] in there:
                self._rejects.popleft()
                self._reject_at, self._reject_wait_s = 0.0, REJECT_AGAIN_S
            if not self._rejects or time.monotonic() < self._reject_at:
                return
            self._reject_at = time.monotonic() + self._reject_wait_s
            self._reject_wait_s = min(2 * self._reject_wait_s, REJECT_AT_MOST_S)
            with open(self.directory / REJECTED, "ab", buffering=0) as file:
                for version in [v for v in tuple(self._rejects) if v not in there]:
                    line = {"version": version, "unix_s": round(time.time(), 3)}
                    file.write(f"{json.dumps(line)}\n".encode())
        except OSError as error:
            self._fail(self._rejects[0], "rejected", error)

    def _wanted(self) -> int:
        """CURRENT's version, or the newest that waited long enough, or its first ancestor that no
        server rolled back; 0 where that is the initial draft.
        """
        current = current_version(self.directory) or 0
        # versions count up: a greater one was of another directory
        self._rolled_back -= {v for v in tuple(self._rolled_back) if v > current}
        rejected = rejected_versions(self.directory) | self._rolled_back
        version = self._waited(current, rejected)
        while version in rejected:
            error = ManifestError(
                "rejected", f"a server rolled {version_name(version)} back; looking at its parent"
            )
            if self._logged != (version, error.cause):
                self._fail(version, error.cause, error)
            parent = read_manifest(self.directory / version_name(version)).parent
            # whatever the file says, this ends
            version = max(0, min(parent, version - 1))
        return version

    def _waited(self, current: int, rejected: set[int]) -> int:
        """The newest version that need not wait any longer, the one that is served if there is
        none."""
        now, waiting = time.monotonic(), self._waiting
        # at the start, if nothing is known to draft (look_again), and in a directory made anew
        at_once = self._polls == 1 or (self._asked is not None and not self.seen_version)
        if not self._wait_s or at_once or current <= self.seen_version or not current:
            waiting.clear()
            return current
        waiting.setdefault(current, now + self._wait_s)
        ready = [v for v, at in waiting.items() if at <= now and v not in rejected]
        newest = ready[-1] if ready else self.seen_version
        for version in [v for v in waiting if v < newest or v in rejected | {self.seen_version}]:
            del waiting[version]
        return newest

    def _fail(self, version: int, cause: str, error: Exception) -> None:
        self.failures[cause] += 1
        if self._logged != (version, cause):
            self._logged = (version, cause)
            log.warning("weights refused version=%d cause=%s error=%s", version, cause, error)


def _state(path: Path) -> tuple[int, int, int, bytes] | None:
    """Differs whenever a file was replaced, touched or appended to; None if there is no file.

    Raises OSError.
    """
    try:
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            return stat.st_ino, stat.st_mtime_ns, stat.st_size, file.read(STATE_BYTES)
    except FileNotFoundError:
        return None
