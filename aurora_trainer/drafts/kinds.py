"""What the trainer asks of the kind of draft that it trains: the door to this folder, like the one
on the server's side.

There is one kind, EAGLE3. With a second one each name below becomes a choice, by config.json's
architectures or by the draft, and no file outside this folder changes (docs/second-draft-kind.md).
`batch.py`, `target.py` and `vocab.py` are no kind's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from aurora_sglang_plugin.drafts.eagle3_config import DraftConfig
from aurora_sglang_plugin.drafts.eagle3_for_target import draft_config
from aurora_sglang_plugin.drafts.eagle3_vocab import MAP
from aurora_trainer.drafts import eagle3_export as export
from aurora_trainer.drafts.eagle3 import ENDS, HEAD, Draft
from aurora_trainer.drafts.eagle3_files import stored_dtype
from aurora_trainer.drafts.eagle3_growth import tree_runs
from aurora_trainer.drafts.eagle3_import import explain, import_draft
from aurora_trainer.drafts.eagle3_sizes import (
    activation_bytes,
    described,
    parameter_count,
    rank_bytes,
    row_parameters,
    version_bytes,
)
from aurora_trainer.drafts.target import Target, TargetTensors

__all__ = [
    "ENDS",
    "HEAD",
    "Draft",
    "DraftConfig",
    "activation_bytes",
    "described",
    "draft_config",
    "explain",
    "export",
    "import_draft",
    "load",
    "parameter_count",
    "rank_bytes",
    "rebuild",
    "row_parameters",
    "stored_dtype",
    "tree_runs",
    "version_bytes",
]


def load(directory: Path, tensors: TargetTensors) -> Draft:
    """The draft in float32. Raises ValueError for anything unexpected."""
    return Draft.load(directory, tensors.get(Target.embedding))


def rebuild(config: dict[str, Any], weights: dict[str, Tensor], tensors: TargetTensors) -> Draft:
    """The draft, in float32, whose `config.to_json()` and `checkpoint()` these are."""
    about = DraftConfig.from_json(config)
    draft = Draft(about, tensors.get(Target.embedding), weights.get(MAP))
    draft.load_checkpoint(weights)
    return draft
