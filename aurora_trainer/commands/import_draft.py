"""`aurora-trainer import`: check a draft made elsewhere against its target, explain all that does not fit, and write
it in the form that AURORA's server and trainer load. Weights keep their bits unless another dtype is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from aurora_sglang_plugin.draft_check import aux_layer_ids, config_problems, tensor_problems
from aurora_trainer import vocab
from aurora_trainer.commands.export import DTYPES, Weights, write_draft
from aurora_trainer.commands.foreign import Foreign, read_foreign
from aurora_trainer.draft_config import DraftConfig, not_computed
from aurora_trainer.target import Target, open_target

SAID_BY_CHECK = ("tie_word_embeddings", "use_aux_hidden_state", "architectures")
NARROW = ("I32", "I16", "U32", "U16", "U8")  # integers that int64 holds
ROUNDING = 2.0**-7  # of bfloat16, relative: two copies of one embedding may differ by this


@dataclass(frozen=True)
class Explained:
    """What `explain` found. `problems` keep a draft out; `conversions` are what import_draft would change."""

    foreign: Foreign
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
    found = read_foreign(directory)
    problems, notes = list(found.problems), []
    if found.config:
        problems += [p for p in config_problems(found.config, target.config) if p not in problems]
        problems += [
            f"{text[0].upper()}{text[1:]}."
            for text in not_computed(found.config)
            if not any(word in text for word in SAID_BY_CHECK)
        ]
        if not found.problems:
            said = tensor_problems(found.entries, found.config, target.config)
            d2t = found.entries.get("d2t")
            if d2t is not None and d2t.dtype in NARROW:
                found.conversions.append(f"d2t is {d2t.dtype}: written as I64")
                said = [p for p in said if not p.startswith(f"d2t is {d2t.dtype},")]
            problems += said + _value_problems(found, target, notes)
        ids = (found.config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
        if "kv_lora_rank" in target.config and ids and ids[0] != 1:
            notes.append(
                f"SGLang reads the layers {ids} of a DeepSeek model as what ENTERS them, because the first is not 1; "
                "of other models, and where it is 1, as outputs: make sure that the draft was trained so"
            )
    return Explained(found, tuple(problems), tuple(found.conversions), tuple(notes))


def import_draft(directory: Path, out: Path, model: str, dtype: str = "same", force: bool = False) -> Explained:
    """Write the draft in `directory` to `out` in AURORA's form. Raises ValueError with every problem."""
    target = open_target(model)
    explained = explain(directory, target)
    if explained.problems:
        raise ValueError(explained.text())
    found = explained.foreign
    found.config.setdefault("eagle_config", {})
    if not found.config["eagle_config"].get("eagle_aux_hidden_state_layer_ids"):
        ids = aux_layer_ids(found.config, target.config["num_hidden_layers"])
        found.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = ids  # SGLang's default, said aloud
    tensors = {name: _tensor(found, name) for name in found.entries if name != "embed_tokens.weight"}
    if "d2t" in tensors:
        tensors["d2t"] = tensors["d2t"].long()
        vocab.check(tensors["d2t"], found.config["draft_vocab_size"], found.config["vocab_size"])
        tensors["t2d"] = vocab.mask(tensors["d2t"], found.config["vocab_size"])
    write_draft(Weights(DraftConfig.from_json(found.config), tensors, {"source": "import"}), out, dtype, force)
    return explained


def _value_problems(found: Foreign, target: Target, notes: list[str]) -> list[str]:
    """What only the weights themselves can say; notes are added for what is harmless."""
    problems, dtypes = [], set()
    for name in found.entries:
        if name in ("d2t", "t2d", "embed_tokens.weight") or found.entries[name].dtype not in DTYPES:
            continue
        dtypes.add(found.entries[name].dtype)
        if not _tensor(found, name).isfinite().all():
            problems.append(f"{name} holds NaN or infinite values.")
    if len(dtypes) > 1:
        notes.append(f"its tensors are of several dtypes ({', '.join(sorted(dtypes))}): --dtype makes them one")
    elif dtypes:
        own, of_target = DTYPES[dtypes.pop()], target.embedding().dtype
        if own != of_target:
            names = [str(t).removeprefix("torch.") for t in (own, of_target)]
            notes.append(f"it is {names[0]}, the target {names[1]}: --dtype {names[1]} spares a server's --dtype")
    if "embed_tokens.weight" in found.entries:
        problems += _embedding_problems(_tensor(found, "embed_tokens.weight"), target.embedding(), notes)
    v = found.config.get("vocab_size")
    if "d2t" in found.entries and "t2d" in found.entries and found.entries["t2d"].shape == (v,):
        ids = vocab.target_ids(_tensor(found, "d2t").long())
        inside = ids[(ids >= 0) & (ids < v)]
        mask = torch.zeros(v, dtype=torch.bool).index_fill_(0, inside, True)
        if not torch.equal(mask, _tensor(found, "t2d").bool()):
            problems.append("t2d and d2t disagree on which target tokens the draft has.")
    return problems


def _embedding_problems(own: Tensor, target: Tensor, notes: list[str]) -> list[str]:
    if own.shape != target.shape:
        return []  # said by its shape, or it is of the draft's own width
    if torch.equal(own, target):
        notes.append("its embedding is the target's: left out, SGLang shares the target's own")
        return []
    difference = float((own.float() - target.float()).abs().max())
    if difference <= ROUNDING * float(target.abs().max()):
        notes.append("its embedding is the target's but for rounding: left out, SGLang shares the target's own")
        return []
    return [
        f"its embedding differs from the target's, by up to {difference:.3g}: SGLang drafts with the target's, so the "
        "draft would read other vectors than it was trained with. Made for another target, or trained with its own."
    ]


def _tensor(found: Foreign, name: str) -> Tensor:
    path, stored = found.names[name]
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(stored)
