"""Drafts made elsewhere: what their files call things, told apart from what they compute.

    SGLang, SpecForge   flat config, LlamaForCausalLMEagle3; names with `midlayer.` or `layers.0.`, some with `model.`
    EAGLE's authors     the same, architectures LlamaForCausalLM
    speculators, vLLM   config nested in transformer_layer_config; layers named by what ENTERS them, one more than
                        SGLang's name for the same feature; in a layer above the first the state's norm is
                        input_layernorm (SGLang: hidden_norm)

`read_foreign` puts config and names into SGLang's form and says what it changed; it looks at no weight.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aurora_sglang_plugin.draft_check import ARCHITECTURE
from aurora_sglang_plugin.draft_files import Entry, canonical_name, read_entries, read_header

FLAT = (ARCHITECTURE, "Eagle3LlamaForCausalLM", "LlamaForCausalLM")
NESTED = ("Eagle3Speculator", "Eagle3DraftModel")
PREFIXES = ("module.", "draft_model.", "model.")
MLA = ("kv_a_proj", "kv_b_proj", "q_a_proj")


@dataclass
class Foreign:
    """A draft's directory in SGLang's terms. What is wrong with it is import_draft.py's to find."""

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)  # by SGLang's name
    names: dict[str, tuple[Path, str]] = field(default_factory=dict)  # SGLang's name -> (file, its name there)
    conversions: list[str] = field(default_factory=list)  # without which the server would not read it as meant
    problems: list[str] = field(default_factory=list)  # nothing can be read, or it is another kind of draft


def read_foreign(directory: Path) -> Foreign:
    """Config and names of the draft in `directory`, in SGLang's form. Never raises for what the files say."""
    found = Foreign(Path(directory))
    try:
        raw = json.loads((found.directory / "config.json").read_text())
        if not isinstance(raw, dict):
            raise ValueError
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not a JSON object"
        found.problems.append(f"no config.json can be read there ({reason}).")
        return found
    found.config = _flat(raw, found)
    try:
        _read_names(found)
    except ValueError as error:
        found.problems.append(str(error))
    _name_the_kind(found)
    return found


def _flat(raw: dict[str, Any], found: Foreign) -> dict[str, Any]:
    """The flat config that SGLang reads, of a flat or of a nested one."""
    architectures = raw.get("architectures") or []
    if "transformer_layer_config" in raw:
        layer = raw["transformer_layer_config"] or {}
        kept = ("draft_vocab_size", "target_hidden_size", "norm_before_residual", "norm_before_fc", "fc_norm", "dtype")
        config = {**layer, **{k: raw[k] for k in kept if raw.get(k) is not None}, "tie_word_embeddings": False}
        config["eagle_aux_hidden_state_layer_ids"] = raw.get("eagle_aux_hidden_state_layer_ids")
        found.conversions.append("config.json nests the layer's shapes in transformer_layer_config: written flat")
    else:
        config = dict(raw)
        known = [a for a in architectures if a in FLAT]
        if not known:
            found.problems.append(f"architectures is {architectures}, expected {[ARCHITECTURE]}: not an EAGLE3 draft.")
        elif known != [ARCHITECTURE]:
            found.conversions.append(f"architectures {architectures} becomes {[ARCHITECTURE]}")
    entering = config.pop("eagle_aux_hidden_state_layer_ids", None)
    eagle = dict(config.get("eagle_config") or {})
    if entering and not eagle.get("eagle_aux_hidden_state_layer_ids"):
        eagle["eagle_aux_hidden_state_layer_ids"] = [i - 1 for i in entering]
        found.conversions.append(
            f"eagle_aux_hidden_state_layer_ids {entering} name what enters a layer: eagle_config says "
            f"{eagle['eagle_aux_hidden_state_layer_ids']}, the layers' outputs"
        )
    return config | {"architectures": [ARCHITECTURE], "model_type": config.get("model_type", "llama")} | (
        {"eagle_config": eagle} if eagle else {}
    )


def _read_names(found: Foreign) -> None:
    """entries and names. Raises ValueError as draft_files.read_entries does."""
    paths = sorted(found.directory.glob("*.safetensors"))
    if not paths:
        read_entries(found.directory)  # says why
    renamed = 0
    for path in paths:
        for name, entry in read_header(path):
            new = name
            for prefix in PREFIXES:
                new = new.removeprefix(prefix)
            new = canonical_name(new)
            renamed += name != new and canonical_name(name) != new
            if new in found.entries:
                raise ValueError(f"{new} is there twice.")
            found.entries[new], found.names[new] = entry, (path, name)
    if renamed:
        found.conversions.append(f"{renamed} tensors lose their prefix ({', '.join(PREFIXES)})")
    for name in sorted(found.entries):
        match = re.fullmatch(r"(layers\.[1-9]\d*\.)input_layernorm\.weight", name)
        if match and f"{match[1]}hidden_norm.weight" not in found.entries:
            new = f"{match[1]}hidden_norm.weight"
            found.entries[new], found.names[new] = found.entries.pop(name), found.names.pop(name)
            found.conversions.append(f"{name} becomes {new}, the norm of the state there")


def _name_the_kind(found: Foreign) -> None:
    """Other drafts that share a name with EAGLE3: one clear sentence instead of a list of tensors."""
    h = found.config.get("hidden_size")
    if any(part in name for name in found.entries for part in MLA):
        found.problems.append(
            "its attention is latent (MLA, as DeepSeek's): expected a Llama layer; AURORA trains no other."
        )
    elif "fc.weight" in found.entries and found.entries["fc.weight"].shape == (h, 2 * (h or 0)) and (
        "layers.0.hidden_norm.weight" not in found.entries
    ):
        found.problems.append(
            "fc reads the embedding and one state, and there is no hidden_norm: an EAGLE or EAGLE-2 draft, expected "
            "EAGLE3."
        )
