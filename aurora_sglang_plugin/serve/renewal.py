"""When cached prefixes are computed again: the draft's KV of a cached prefix stays what the draft
of that time wrote, and a draft that has learned much since guesses worse behind it
(docs/learning.md, "What a draft does not see").

SGLang's prefix cache finds only what bears a request's `extra_key`. Each renewal gives new requests
another one, so that they find nothing of before, compute their prompts once, and what was cached
before goes as it is not asked for. Long prompts keep what they have: computing them again costs
more than it brings.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from aurora_sglang_plugin.config import SwapConfig

logger = logging.getLogger(__name__)


class Renewal:
    """Counts renewals. All methods are the scheduler's thread's, at the same step on every rank."""

    def __init__(self, config: SwapConfig):
        self._factor, self._most_tokens = config.renew_prefixes_at, config.renew_prompt_tokens
        self.count = 0
        # accept length of the draft that wrote what is cached; None: not known yet
        self._written_at: float | None = None

    def serve(self, gate: Mapping[str, Any], cached: bool = True) -> None:
        """Another draft serves now. `gate` is what its manifest says of it and of the one before;
        `cached` False: nothing was served yet."""
        role = "initial" if gate.get("reason") == "initial" else "candidate"
        now, before = gate.get(role), gate.get("served")
        if not isinstance(now, float) or not self._factor:
            return
        if self._written_at is None:
            self._written_at = before if cached and isinstance(before, float) else now
        if now >= self._factor * self._written_at:
            self.renew()
            logger.info(
                "prefixes renewed count=%d accept_length=%.2f written_at=%.2f: prompts of at most"
                " %d tokens are computed again",
                self.count, now, self._written_at, self._most_tokens,
            )  # fmt: skip
            self._written_at = now

    def renew(self) -> None:
        """New requests find nothing that was cached before."""
        if self._factor:
            self.count += 1

    def mark(self, req: Any) -> None:
        """A new request."""
        if self.count and len(req.origin_input_ids) <= self._most_tokens:
            req.extra_key = f"{req.extra_key or ''}|aurora{self.count}"
