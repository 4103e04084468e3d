"""The initial draft: the one that is configured, or, if the servers start without one, a draft that
the trainer makes from the target and keeps beside its checkpoints.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from aurora_sglang_plugin.drafts.kinds import check_draft
from aurora_sglang_plugin.weights.manifest import target_fingerprint
from aurora_trainer.drafts.eagle3_init import init_draft
from aurora_trainer.drafts.target import open_target

log = logging.getLogger(__name__)


def initial_draft(target: str, configured: Path | None, checkpoints: Path) -> Path:
    """Its directory: `configured`, if that is given. Making one takes seconds to minutes, once for
    a target. Raises ValueError for a draft that does not fit, or a target that none can be made
    for."""
    opened = open_target(target)
    if configured is not None:
        for note in check_draft(configured, opened.config):
            log.warning("draft directory=%s note=%r", configured, note)
        return configured
    name = f"initial-draft-{target_fingerprint(target)[:12]}"
    directory = checkpoints / name
    if not (directory / "config.json").exists():
        # whole, or not there
        partial = directory.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        draft = init_draft(target, partial, dtype=opened.embedding().dtype)
        partial.rename(directory)
        size, vocab = len(draft.d2t), opened.config["vocab_size"]
        log.info("initial draft made directory=%s vocabulary=%d of %d", directory, size, vocab)
    return directory
