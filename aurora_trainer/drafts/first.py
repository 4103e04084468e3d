"""The initial draft: the one that is configured, or, if the servers start without one, a draft that
the trainer makes from the target and keeps beside its checkpoints.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch

from aurora_sglang_plugin.drafts.eagle3_for_target import first_config
from aurora_sglang_plugin.weights.manifest import target_fingerprint
from aurora_trainer.config import TrainerConfig
from aurora_trainer.drafts.eagle3_init import init_draft
from aurora_trainer.drafts.target import open_target

log = logging.getLogger(__name__)


def initial_draft(trainer: TrainerConfig) -> Path:
    """Its directory. Making one takes seconds to minutes, once for a target. Raises ValueError for
    a target that a draft cannot be made for."""
    if trainer.model.draft is not None:
        return trainer.model.draft
    name = f"initial-draft-{target_fingerprint(trainer.model.target)[:12]}"
    directory = trainer.checkpoint.directory / name
    if not (directory / "config.json").exists():
        # whole, or not there
        partial = directory.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        target = open_target(trainer.model.target)
        size = first_config(target.config).draft_vocab_size
        vocab = target.config["vocab_size"]
        # a tokenizer's first ids are its most frequent ones
        init_draft(
            trainer.model.target, partial, draft_vocab=size,
            token_counts=torch.arange(vocab, 0, -1), dtype=target.embedding().dtype,
        )  # fmt: skip
        partial.rename(directory)
        log.info("initial draft made directory=%s vocabulary=%d of %d", directory, size, vocab)
    return directory
