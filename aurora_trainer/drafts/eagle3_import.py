"""`aurora-trainer import`: check a draft made elsewhere against its target, explain all that does
not fit, and write it in the form that AURORA's server and trainer load. Weights keep their bits
unless another dtype is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from aurora_sglang_plugin.drafts.aux_layers import aux_layer_ids, ids_that_name
from aurora_sglang_plugin.drafts.eagle3_check import (
    INTEGERS,
    config_problems,
    harmless,
    layer_notes,
    tensor_problems,
)
from aurora_sglang_plugin.drafts.eagle3_config import DraftConfig
from aurora_sglang_plugin.drafts.eagle3_vocab import MAPS
from aurora_sglang_plugin.drafts.tensor_files import Entry
from aurora_trainer.drafts import vocab
from aurora_trainer.drafts.eagle3_export import DTYPES, Weights, write_draft
from aurora_trainer.drafts.eagle3_external import ExternalDraft, read_external
from aurora_trainer.drafts.eagle3_files import tensor_of
from aurora_trainer.drafts.target import Target, open_target

EXCLUDED = ("embed_tokens.weight", "t2d")
# integers of d2t that int64 holds, and that torch does not add to it
UNSIGNED = ("U16", "U32")
# of bfloat16, relative: two copies of one embedding may differ by this
ROUNDING = 2.0**-7


@dataclass(frozen=True)
class Explained:
    """What `explain` found. `problems` keep a draft out; `conversions` are what import_draft would
    change."""

    foreign: ExternalDraft
    problems: tuple[str, ...]
    conversions: tuple[str, ...]
    notes: tuple[str, ...]

    def text(self) -> str:
        """The problems as a list, for a message to the user."""
        many = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        head = f"draft {self.foreign.directory} does not fit, {many}:"
        return "\n".join([head, *(f"  - {p}" for p in self.problems)])


def explain(directory: Path, target: Target) -> Explained:
    """Everything about the draft in `directory` that does not fit `target`, at once."""
    found = read_external(directory, target.config)
    problems, notes = list(found.problems), []
    if found.config:
        said = config_problems(found.config, target.config)
        notes += [] if said else layer_notes(found.config, target.config)
        problems += said
        if found.entries and not found.problems:
            said = tensor_problems(found.entries, found.config, target.config)
            d2t = found.entries.get("d2t")
            if d2t is not None and d2t.dtype in UNSIGNED:
                found.conversions.append(f"d2t is {d2t.dtype}: written as I64")
                said = [p for p in said if not p.startswith(f"d2t is {d2t.dtype},")]
            problems += said
            problems += _value_problems(found, target, notes)
            wide = [n for n, e in found.entries.items() if e.dtype == "F64" and n not in EXCLUDED]
            if wide:
                found.conversions.append(f"{len(wide)} tensors are F64: written as F32")
    return Explained(found, tuple(problems), tuple(found.conversions), tuple(notes))


def import_draft(
    directory: Path, out: Path, model: str, dtype: str = "same", force: bool = False
) -> Explained:
    """Write the draft in `directory` to `out` in AURORA's form. Raises ValueError with every
    problem."""
    target = open_target(model)
    explained = explain(directory, target)
    if explained.problems:
        raise ValueError(explained.text())
    found, config = explained.foreign, DraftConfig.from_json(explained.foreign.config)
    outputs = aux_layer_ids(found.config, target.config["num_hidden_layers"], target.config)
    # SGLang's default, said aloud
    ids = config.aux_layer_ids or ids_that_name(outputs, target.config)
    entered = tuple(o + 1 for o in outputs)
    config = replace(
        config,
        aux_layer_ids=tuple(ids),
        entered_layer_ids=None if entered == tuple(i + 1 for i in ids) else entered,
        max_position_embeddings=_positions(config, target),
    )
    tensors = {
        name: tensor_of(entry)
        for name, entry in found.entries.items()
        if name not in EXCLUDED and not harmless(name, entry)
    }
    if "d2t" in tensors:
        tensors["d2t"] = tensors["d2t"].long()
        vocab.check(tensors["d2t"], config.draft_vocab_size, config.vocab_size)
        tensors["t2d"] = vocab.mask(tensors["d2t"], config.vocab_size)
    write_draft(Weights(config, tensors, {"source": "import"}), out, dtype, force)
    return explained


def _positions(config: DraftConfig, target: Target) -> int:
    """max_position_embeddings: the target's where it has more, as no rotary embedding that is
    computed depends on it once the trained length of a stretched one is written out. SGLang refuses
    a target whose context is longer."""
    of_target = target.config.get("max_position_embeddings")
    return (
        max(config.max_position_embeddings, of_target)
        if type(of_target) is int
        else config.max_position_embeddings
    )


def _value_problems(found: ExternalDraft, target: Target, notes: list[str]) -> list[str]:
    """What only the weights themselves can say; notes are added for what is harmless."""
    problems, dtypes = [], set()
    for name, entry in found.entries.items():
        # F64 is written as F32, in which it must be finite
        dtype = "F32" if entry.dtype == "F64" else entry.dtype
        if name == "d2t" or name in EXCLUDED or dtype not in DTYPES:
            continue
        dtypes.add(dtype)
        if not tensor_of(entry).float().isfinite().all():
            problems.append(f"{name} holds NaN or infinite values.")
    if len(dtypes) > 1:
        notes.append(
            f"its tensors are of several dtypes ({', '.join(sorted(dtypes))}): --dtype makes them "
            f"one"
        )
    elif dtypes:
        own, of_target = DTYPES[dtypes.pop()], target.embedding().dtype
        if own != of_target:
            names = [str(t).removeprefix("torch.") for t in (own, of_target)]
            notes.append(
                f"it is {names[0]}, the target {names[1]}: --dtype {names[1]} spares a server's "
                f"--dtype"
            )
    if "embed_tokens.weight" in found.entries:
        notes.append(_embedding_note(found.entries["embed_tokens.weight"], target.embedding()))
    v, d2t, t2d = (found.config.get("vocab_size"), *map(found.entries.get, MAPS))
    if d2t and t2d and t2d.shape == (v,) and d2t.dtype in (*INTEGERS, *UNSIGNED):
        ids = vocab.target_ids(tensor_of(d2t).long())
        inside = ids[(ids >= 0) & (ids < v)]
        mask = torch.zeros(v, dtype=torch.bool).index_fill_(0, inside, True)
        if not torch.equal(mask, tensor_of(t2d).bool()):
            notes.append(
                "its t2d and d2t disagree on which target tokens it has: SGLang reads d2t, t2d is "
                "made anew"
            )
    return problems


def _embedding_note(entry: Entry, target: Tensor) -> str:
    """What became of an embedding: SGLang puts the target's own in its place."""
    if entry.shape == tuple(target.shape) and entry.dtype in DTYPES:
        own = tensor_of(entry)
        if torch.equal(own, target):
            return "its embedding is the target's: left out, SGLang shares the target's own"
        difference = float((own.float() - target.float()).abs().max())
        if difference <= ROUNDING * float(target.abs().max()):
            return (
                "its embedding is the target's but for rounding: left out, SGLang shares the "
                "target's own"
            )
    return (
        "its embedding differs from the target's: left out, SGLang drafts with the target's own. "
        "If it was trained with its own it will accept little"
    )
