"""The operator's weight updates on an AURORA server: they reach the target, the draft stays
Aurora's.

SGLang gives an update to every model runner that its selector names, by default target and draft:
those of the target's tensors that fit would overwrite the draft. Each runner has a WeightUpdater
that does the work; the two classes here stand before it. Every call comes on the scheduler's
thread, between two steps.

This module imports neither torch nor sglang.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

# Methods of SGLang's WeightUpdater that name weights and write none. Others are taken for writes.
READS = (
    "init_weights_update_group",
    "destroy_weights_update_group",
    "receive_weights_from_distributed",
)
# SGLang's message says so where it had begun to write.
ROLLING_BACK = "Rolling back"


class TargetUpdater:
    """Stands before the target's WeightUpdater, and calls `changed(directory)` after what may
    write.

    `directory` (or a model's name) holds the weights that the target has now; None if no files do.
    An update that fails is answered (False, why), also where SGLang alone would end the process.
    """

    def __init__(self, updater: Any, changed: Callable[[str | None], None]):
        self._updater, self._changed = updater, changed

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._updater, name)
        if name in READS or "weight" not in name or not callable(member):
            return member

        def write(*args: Any, **kwargs: Any) -> Any:
            try:
                return member(*args, **kwargs)
            except Exception as error:
                # a serving boundary
                # it has no answer that could say so
                if "_from_" not in name:
                    raise
                log.exception(
                    "target update failed call=%s: the target may hold a part of it", name
                )
                return False, f"{name} failed: {error}. The target may hold a part of the update."
            finally:
                self._changed(None)

        return write

    def update_weights_from_disk(
        self, model_path: str, *args: Any, **kwargs: Any
    ) -> tuple[bool, str]:
        config = self._updater.model_config
        before = config.model_path
        try:
            success, message = self._updater.update_weights_from_disk(model_path, *args, **kwargs)
        except Exception as error:
            # a serving boundary
            log.exception("target update failed path=%s", model_path)
            success, message = False, f"Failed to update weights: {error}. {ROLLING_BACK}."
        if success:
            self._changed(model_path)
            return success, message
        # SGLang remembers the new path before it loads, and rolls back to that one.
        config.model_path = before
        if ROLLING_BACK in message:
            self._updater.update_weights_from_disk(before, "auto")
            self._changed(before)
            message += f" AURORA loaded {before} again."
        return False, message


class DraftUpdater:
    """Stands in place of the draft's WeightUpdater: whatever is called, the draft stays as it is.

    `alone` is set before each call: whether it selects the draft and not the target.
    """

    alone = False

    def __init__(self, version: Callable[[], int]):
        self._version = version

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._stays

    def _stays(self, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        stays = f"The draft is AURORA's and stays at version {self._version()}"
        if self.alone:
            return False, f"{stays}: expected selector target or all. Drafts are published instead."
        return True, f"Succeeded to update the target's weights. {stays}."
