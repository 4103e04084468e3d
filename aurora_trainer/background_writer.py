"""Versions and checkpoints are written beside training: by a thread each, from snapshots.

    start(name, prepare, finish)   the loop takes a snapshot and hands over the writing of it
    poll()                         the loop learns what has ended, and takes it in

A job is one of `jobs` (disk_faults.py): at most one of a name is written at a time, and one that
fails is counted, logged once for each episode and due again later, with a new snapshot. All but the
writing happens on the loop's thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from aurora_sglang_plugin.disk_faults import Retry

log = logging.getLogger(__name__)

SAY_AFTER_S = 10.0
MEANWHILE_S = 0.5

T = TypeVar("T")
Write = Callable[[], T]


class Background:
    """`waits`: every job is written before `start` returns, as over a recording, whose versions
    must not depend on the speed of a disk."""

    def __init__(
        self,
        jobs: dict[str, Retry],
        waits: bool = False,
        meanwhile: Callable[[], None] = lambda: None,
    ):
        """`meanwhile` is called now and then while `wait` waits."""
        self._jobs, self._waits, self._meanwhile = jobs, waits, meanwhile
        # a disk that does not answer to one of them keeps the other going
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="aurora-write")
        self._pending: dict[str, tuple[Future, Callable, Callable[[], None]]] = {}

    def busy(self, name: str) -> bool:
        return name in self._pending

    def start(
        self,
        name: str,
        prepare: Callable[[], Write | None],
        finish: Callable[[T], None],
        fail: Callable[[], None],
        now_s: float,
        at_once: bool = False,
    ) -> None:
        """Take a snapshot by `prepare`, write it by what that returns (None: nothing to write).

        `finish` takes what the writing returned, on this thread, in `poll`; `fail` is called there
        if anything of it raised. Nothing happens while the last one of the name is being written
        or, unless `at_once`, has to wait after a fault.
        """
        job = self._jobs[name]
        if self.busy(name) or job.waits(now_s) and not at_once:
            return
        try:
            write = prepare()
        except Exception as error:
            fail()
            job.failed(error, now_s)
            return
        if write is None:
            job.succeeded()
            return
        self._pending[name] = self._threads.submit(write), finish, fail
        if self._waits:
            self.wait(now_s)

    def poll(self, now_s: float) -> None:
        """Take in what has ended."""
        for name, (future, finish, fail) in list(self._pending.items()):
            if not future.done():
                continue
            del self._pending[name]
            job = self._jobs[name]
            error = future.exception()
            if error is None:
                try:
                    finish(future.result())
                except Exception as raised:
                    error = raised
            if error is None:
                job.succeeded()
            else:
                fail()
                job.failed(error, now_s)
                # its frames hold what was to be written
                error.__traceback__ = None
            del future, finish, fail, error

    def wait(self, now_s: float) -> None:
        """Until nothing is being written; says what it waits for, if that takes long."""
        say_at = time.monotonic() + SAY_AFTER_S
        while self._pending:
            wait([future for future, *_ in self._pending.values()], MEANWHILE_S)
            self.poll(now_s)
            self._meanwhile()
            if self._pending and time.monotonic() >= say_at:
                log.warning("still being written: %s", ", ".join(self._pending))
                say_at = time.monotonic() + SAY_AFTER_S

    def close(self) -> None:
        self._threads.shutdown()
