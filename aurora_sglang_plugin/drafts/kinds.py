"""What the server's side asks of the kind of draft that it has: the door to this folder.

There is one kind, EAGLE3 of the Llama layout. With a second one each name below becomes a choice,
by the architectures in config.json or by SGLang's model, and no file outside this folder changes
but the seam (docs/second-draft-kind.md). This module imports neither torch nor sglang.
"""

from aurora_sglang_plugin.drafts.eagle3_check import check_draft, draft_problems
from aurora_sglang_plugin.drafts.eagle3_for_target import first_config
from aurora_sglang_plugin.drafts.eagle3_served import (
    any_target_ids,
    differing_config,
    feature_layers,
    fill,
    fixed_config,
    of_the_target,
    served_shapes,
)
from aurora_sglang_plugin.drafts.eagle3_vocab import (
    BAD_MAP,
    MAP,
    MAP_DTYPES,
    MAP_SHA256,
    MAPS,
    maps_problem,
    optional_maps,
)
from aurora_sglang_plugin.drafts.tensor_files import canonical_name

# Key of a draft's config.json: true for one that nobody trained yet. A server that chooses its
# draft steps serves plainly until a version comes.
UNTRAINED = "aurora_untrained"

__all__ = [
    "UNTRAINED",
    "any_target_ids",
    "BAD_MAP",
    "MAP",
    "MAPS",
    "MAP_DTYPES",
    "MAP_SHA256",
    "canonical_name",
    "check_draft",
    "differing_config",
    "draft_problems",
    "feature_layers",
    "fill",
    "first_config",
    "fixed_config",
    "maps_problem",
    "of_the_target",
    "optional_maps",
    "served_shapes",
]
