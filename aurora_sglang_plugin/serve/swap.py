"""Load new weights into a running draft: staged beside it, swapped in between two steps.

    watcher's thread     FREE -> STAGING -> READY         load_weights fills the staging copy
    scheduler's thread   READY -> KEEPING                 previous <- live, beside a step
                         KEEPING -> APPLYING -> FREE      at the next step: live <- staging copy
                         READY <-> OFFERED -> KEEPING     while tensor-parallel ranks agree

The staging copy is the draft module once more, with parameters of its own in the very layout of the
live ones (fused qkv and gate_up, this rank's shard), so that the swap is copies only. One
that is READY is taken back when a newer version comes; OFFERED or KEEPING, it is swapped in.
The version that drafts is copied aside in the staging stream, while a step runs that reads it as
well, so that only one copy stands between two steps. This module imports no sglang.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed import ProcessGroup

from aurora_sglang_plugin.config import SwapConfig, WeightsConfig
from aurora_sglang_plugin.serve.draft_memory import DraftMemory
from aurora_sglang_plugin.serve.rank_agreement import Agreement
from aurora_sglang_plugin.serve.renewal import Renewal
from aurora_sglang_plugin.serve.staging import expected_weights
from aurora_sglang_plugin.serve.swap_times import SwapTimes
from aurora_sglang_plugin.weights.manifest import Manifest
from aurora_sglang_plugin.weights.reader import Weights
from aurora_sglang_plugin.weights.watcher import Watcher

if TYPE_CHECKING:
    from aurora_sglang_plugin.serve.control import Control

log = logging.getLogger(__name__)

FREE, STAGING, READY, OFFERED = "free", "staging", "ready", "offered"
KEEPING, APPLYING = "keeping", "applying"
START_TRIES = 5
# of the ranks' plan: steps by bucket, and whether the server is cold
PLAN_SIZE = 17


class Reloader:
    """Owns the staging copy, the previous version's copy, and which version is live.

    `model` is SGLang's draft model, `target_ids` the worker's int64 [VD] of a reduced vocabulary
    (the target id of each draft id) or None, `target` the target's fingerprint, `group` the
    tensor-parallel ranks' CPU group where there is more than one. Raises ValueError for a draft
    whose weights cannot be swapped.
    """

    def __init__(
        self,
        model: nn.Module,
        target_ids: torch.Tensor | None,
        weights: WeightsConfig,
        swap: SwapConfig,
        target: str,
        group: ProcessGroup | None = None,
        has_draft: bool = True,
        writes: bool = True,
        wait_s: float = 0.0,
    ):
        # whether the draft that the server was started with drafts
        self.has_draft = has_draft
        # whether this rank tells others of a rejected version
        self.writes = writes
        # 0: the draft that the server was started with
        self.version = 0
        self.previous_version: int | None = None
        self.swaps = 0
        # when what drafts was published
        self.created_unix_s = self._previous_created = time.time()
        self._memory = DraftMemory(model, target_ids)
        # The versions that the copies hold whole, for `restore`; None: the staging copy is filled.
        self._in_previous: int | None = 0
        self._in_staging: int | None = None
        # faults after which no version is swapped in; whether a swap was one, and was undone
        self._failed = 0
        self._broken = self._gone_back = False
        # of the last swap: what drafted before, if it was to be copied aside, if live was written
        self._before = (0, self.created_unix_s)
        self._kept = self._wrote = False
        self._target = target
        self.target_changes = 0
        self._state = FREE
        # held for a comparison and an assignment, never for a copy
        self._handoff = threading.Lock()
        self._staged_version = 0
        # and when it was noticed
        self._staged: tuple[Manifest, float] | None = None
        self.times = SwapTimes(self._memory.stopwatch)
        expected = expected_weights(model, target_ids, target)
        self._watcher = Watcher(
            Path(weights.directory), swap.poll_s, expected, self.stage, wait_s,
            free=lambda: self._state in (FREE, READY),
        )  # fmt: skip
        # disabled: as if it had been started, and never ready
        self._watching = not swap.enabled
        self.agreement = Agreement(group, PLAN_SIZE) if group is not None else None
        self.renewal = Renewal(swap)
        # Decides on versions and steps; set by whoever has one.
        self.control: Control | None = None

    def step(self) -> int | None:
        """Once per verify step of every rank, before draft-extend: swap if a version is ready.

        Returns it, or None. Starts the watcher at the first call: staging allocates, which the
        capture of CUDA graphs forbids. Tensor-parallel ranks swap at the same step
        (`rank_agreement.py`).
        """
        try:
            return self._step()
        except Exception:
            # a serving boundary: what is loaded goes on drafting, and no later version is tried
            self._failed += 1
            self._broken = self._broken or self._state in (KEEPING, APPLYING)
            log.exception(
                "draft swap failed: serving goes on with version=%d, no further swaps", self.version
            )
            if self._broken and self.agreement is None:
                with suppress(Exception):
                    self._go_back()
            return None

    def _step(self) -> int | None:
        if not self._watching:
            self._watching = True
            self._watcher.start()
        self.times.observe()
        # the same on every rank
        held = self.control is not None and self.control.holds
        keeping = self._state == KEEPING
        if self.agreement is not None:
            begins = self._agreed(held)
        else:
            begins = self._state == READY and not self._failed and not held
        if self._failed:
            return None
        if keeping:
            return self._apply()
        return self._begin() if begins else None

    def _agreed(self, held: bool) -> bool:
        """Whether a version begins to be swapped in at this step, on every rank."""
        assert self.agreement is not None
        if self.agreement.due():
            if not self._failed:
                # what is offered stays staged until the ranks have answered
                self._hand_over(READY, OFFERED)
            ready = self._state == OFFERED and not self._failed and not held
            offered = self._staged_version if ready else 0
            self.agreement.offer(
                Agreement.FAILED if self._broken else offered,
                self.control.propose() if self.control is not None else (),
                since=self._staged[1] if offered and self._staged else 0.0,
            )
        answer = self.agreement.answer()
        if answer is None:
            return False
        agreed, plan = answer
        if plan and self.control is not None:
            self.control.take(plan)
        if agreed == Agreement.FAILED:
            self._go_back()
            return False
        # not by way of READY, from where this rank's watcher could take it back after all had
        # agreed
        if self._state == OFFERED and not (agreed and not held):
            self._hand_over(OFFERED, READY)
        return self._state == OFFERED

    def _go_back(self) -> None:
        """A swap raised, here or on another rank: on all of them what drafted before drafts again,
        since shards of two versions accept nothing, or what was kept before that. Once; no version
        is tried from here on."""
        if self._gone_back:
            return
        self._gone_back, self._failed = True, self._failed or 1
        # where it raised before live was written, live is what drafted before
        if self._wrote or not self._kept:
            self._memory.put(self._memory.previous)
        older = self._in_previous or 0, self._previous_created
        self.version, self.created_unix_s = self._before if self._kept else older
        self.previous_version = None
        if self.control is not None:
            self.control.forget()
        log.error("draft goes back to version=%d on every rank, no further swaps", self.version)

    def apply_at_start(self) -> int | None:
        """Load the newest published version on this thread, before anything is served; returns it,
        or None."""
        if self._watching:
            return None
        for _ in range(START_TRIES):
            self._watcher.poll()
            ready = self._staged_version if self._state == READY else 0
            if self.agreement is None or self.agreement.ask(ready):
                return self.apply_pending()
        # the ranks saw different versions: they will agree while they serve
        return None

    def close(self) -> None:
        self._watcher.close()

    def apply_pending(self) -> int | None:
        """On the scheduler thread, between verify and draft-extend: swap in what is staged, at
        once. Returns the new version. Never waits."""
        version = self._begin() if self._state == READY else None
        return self._apply() if self._state == KEEPING else version

    def _begin(self) -> int | None:
        """What drafts is copied aside; at the next step what is staged is swapped in. At once, if
        an older version stays what would be gone back to."""
        if not (self._hand_over(OFFERED, KEEPING) or self._hand_over(READY, KEEPING)):
            return None
        if self._is_of_another_target():
            return None
        self._before = self.version, self.created_unix_s
        self._kept, self._wrote = True, False
        self._kept = self.control is None or self.control.let_go()
        if not self._kept:
            return self._apply()
        self.previous_version = self._in_previous = None
        self._memory.keep()
        self._in_previous, self._previous_created = self._before
        return None

    def _apply(self) -> int | None:
        self._hand_over(KEEPING, APPLYING)
        if self._is_of_another_target():
            return None
        manifest, noticed_at = self._staged
        first = not self._watching or (self.version == 0 and not self.has_draft)
        if self.control is not None:
            self.control.swapped(manifest, first, self._kept)
        if self._kept:
            self.previous_version = self.version
        self._wrote = True
        self._memory.put(self._memory.staged)
        self.version, self.created_unix_s = self._staged_version, manifest.created_unix_s
        self._hand_over(APPLYING, FREE)
        self._swapped()
        self.renewal.serve(manifest.gate, cached=self._watching)
        # a version that lay there when the server started says nothing about either
        if self._watching:
            self.times.served(manifest, noticed_at)
        return self.version

    def exchange(self) -> None:
        """Where `step` is called: the version that drafts and the one before change places."""
        self._memory.exchange()
        assert self.previous_version is not None
        self.version, self.previous_version = self.previous_version, self.version
        self._in_previous = self.previous_version
        self.created_unix_s, self._previous_created = self._previous_created, self.created_unix_s
        self._swapped()

    def reject(self) -> None:
        """The version that was exchanged for the one that drafts is bad: no server shall load
        it."""
        version, self.previous_version = self.previous_version, None
        log.warning(
            "draft rolled back version=%s rejected=%s: the trainer goes on from its parent",
            self.version, version,
        )  # fmt: skip
        if version:
            self._watcher.reject(version, self.version, write=self.writes)

    def retarget(self, target: str) -> None:
        """On the scheduler thread: the server has another target. What drafts stays; what is staged
        for another one is not swapped in, and what was refused is looked at again."""
        self._target = target
        self.target_changes += 1
        self._watcher.look_again(self.version, target)

    def restore(self) -> None:
        """On the scheduler thread, after something else may have written the draft: put back what
        drafts.

        If no copy of it is left (a newer one is being staged, or failed), CURRENT is read again.
        """
        if self._in_previous == self.version:
            return self._memory.put(self._memory.previous)
        if self._hand_over(FREE, APPLYING):
            whole = self._in_staging == self.version
            if whole:
                self._memory.put(self._memory.staged)
            self._hand_over(APPLYING, FREE)
            if whole:
                return
        log.warning("draft may not be version=%d until the next swap", self.version)
        self._watcher.look_again(0)

    def stage(self, weights: Weights) -> bool:
        """On the watcher thread: fill the staging copy. Returns False while a swap still reads it.

        Raises ManifestError.
        """
        if not (self._hand_over(FREE, STAGING) or self._hand_over(READY, STAGING)):
            return False
        self._in_staging = None
        try:
            self._memory.fill(weights.tensors)
        except Exception:
            self._state = FREE
            raise
        self._staged = weights.manifest, weights.noticed_at
        self._staged_version = weights.manifest.version
        self._in_staging = self._staged_version
        self._state = READY
        return True

    def counters(self) -> dict[str, float]:
        """For metrics: current version, swaps, refusals by cause."""
        return {
            "draft_version": self.version,
            "swaps": self.swaps,
            "target_changes": self.target_changes,
            "prefix_renewals": self.renewal.count,
            **{f"refused_{cause}": n for cause, n in sorted(self._watcher.failures.items())},
            **({"refused_swap": self._failed} if self._failed else {}),
        }

    def _is_of_another_target(self) -> bool:
        """What is staged was staged for the target before this one: it is not swapped in."""
        assert self._staged is not None
        other = self._staged[0].target != self._target
        if other:
            self._state = FREE
        return other

    def _hand_over(self, old: str, new: str) -> bool:
        with self._handoff:
            if self._state != old:
                return False
            self._state = new
            return True

    def _swapped(self) -> None:
        self.swaps += 1
        self.times.observe()
        log.info("draft swapped version=%d previous=%s", self.version, self.previous_version)
