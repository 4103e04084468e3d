"""Drafts made elsewhere: what their files call things, told apart from what they compute.

    SGLang, SpecForge   flat config, LlamaForCausalLMEagle3; names with `midlayer.` or `layers.0.`,
                        some with `model.`
    EAGLE's authors     the same, architectures LlamaForCausalLM
    speculators, vLLM   config nested in transformer_layer_config; layers named by what ENTERS them,
                        one more than SGLang's name for the same feature; in a layer above the first
                        the state's norm is input_layernorm (SGLang: hidden_norm)

`read_external` puts config and names into SGLang's form and says what it changed; it looks at no
weight. Whether the result can be served is eagle3_check.py's to judge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aurora_sglang_plugin.drafts import aux_layers
from aurora_sglang_plugin.drafts.eagle3_config import ARCHITECTURE, DraftConfig, read_draft_config
from aurora_sglang_plugin.drafts.eagle3_rope import flattened, nested
from aurora_sglang_plugin.drafts.tensor_files import (
    Entry,
    canonical_name,
    read_header,
    read_json,
    shown,
    weight_files,
)

FLAT = (ARCHITECTURE, "Eagle3LlamaForCausalLM", "LlamaForCausalLM")
PREFIXES = ("module.", "draft_model.", "model.")
MLA = ("kv_a_proj", "kv_b_proj", "q_a_proj")
LAYER = "transformer_layer_config"
# What a draft computes, where speculators or a trainer's own config say it: at the top, in
# eagle_config or in LAYER.
SWITCHES = ("norm_output", "norm_before_fc", "fc_norm", "use_aux_norm", "norm_before_residual")
OUTER = (
    "draft_vocab_size",
    "target_hidden_size",
    "num_aux_hidden_states",
    "dtype",
    "torch_dtype",
    "eagle_config",
)
# null is as good as absent for what is meant, and not for SGLang, which computes with it
NULLS = (
    "target_hidden_size", "rope_theta", "partial_rotary_factor", "rope_is_neox_style",
    "attention_bias", "mlp_bias",
    "rms_norm_eps", "hidden_act", "max_position_embeddings", "tie_word_embeddings", "use_cache",
    "initializer_range", "auto_map",
)  # fmt: skip


@dataclass
class ExternalDraft:
    """A draft's directory in SGLang's terms.

    What is wrong with it is eagle3_import.py's to find.
    """

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    # by SGLang's name
    entries: dict[str, Entry] = field(default_factory=dict)
    # without which the server would not read it as meant
    conversions: list[str] = field(default_factory=list)
    # nothing can be read, or it is another kind of draft
    problems: list[str] = field(default_factory=list)


def read_external(directory: Path, target_config: Mapping[str, Any]) -> ExternalDraft:
    """Config and names of the draft in `directory`, in SGLang's form for this target. Never raises
    for what the files say."""
    found = ExternalDraft(Path(directory))
    try:
        found.config = _flat(read_json(found.directory / "config.json"), found, target_config)
        _read_names(found)
        _take_fused_apart(found)
    except ValueError as error:
        found.problems.append(str(error))
    if found.entries:
        _name_the_kind(found)
    return found


def _flat(
    raw: dict[str, Any], found: ExternalDraft, target_config: Mapping[str, Any]
) -> dict[str, Any]:
    """The flat config that SGLang reads, of a flat or of a nested one."""
    config = dict(raw)
    if LAYER in raw:
        layer = raw[LAYER]
        if not isinstance(layer, dict):
            raise ValueError(f"config.json has {LAYER} = {shown(layer)}, expected an object.")
        outer = {k: raw[k] for k in (*OUTER, *SWITCHES, aux_layers.KEY) if raw.get(k) is not None}
        config = {**layer, **outer, "tie_word_embeddings": False, "architectures": [ARCHITECTURE]}
        found.conversions.append(f"config.json nests the layer's shapes in {LAYER}: written flat")
        kind = raw.get("speculators_model_type", "eagle3")
        if kind != "eagle3":
            found.problems.append(f"speculators_model_type is {shown(kind)}, expected eagle3.")
    else:
        architectures = raw.get("architectures")
        known = [a for a in architectures if a in FLAT] if isinstance(architectures, list) else []
        if known and architectures[0] != ARCHITECTURE:
            found.conversions.append(f"architectures {architectures} becomes {[ARCHITECTURE]}")
            config["architectures"] = [ARCHITECTURE]
    if config.get("model_type") is None:
        config["model_type"] = "llama"
        found.conversions.append("config.json has no model_type: written as llama")
    absent = [key for key in NULLS if key in config and config[key] is None]
    if absent:
        found.conversions.append(
            f"{', '.join(absent)} of null, with which SGLang would compute: left out"
        )
        config = {k: v for k, v in config.items() if k not in absent}
    _lift_eagle(config, found, target_config)
    _flatten_rope(config, found)
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) != config.get("num_hidden_layers"):
        found.conversions.append(
            f"layer_types of {len(types)} layers, which SGLang's draft does not read: left out"
        )
        del config["layer_types"]
    return config


def _lift_eagle(
    config: dict[str, Any], found: ExternalDraft, target_config: Mapping[str, Any]
) -> None:
    """Switches to the top, where SGLang reads them, and the layers' ids into eagle_config, as
    outputs."""
    eagle = config.get("eagle_config") or {}
    if not isinstance(eagle, dict):
        # the judge says so
        return
    eagle = dict(eagle)
    for key in SWITCHES:
        # of norm_before_fc SGLang reads both, eagle_config first
        if key in eagle and key != "norm_before_fc" and eagle[key] and not config.get(key):
            config[key] = eagle.pop(key)
            found.conversions.append(
                f"eagle_config.{key} is written at the top, where SGLang reads it"
            )
    entering = config.get(aux_layers.KEY)
    whole = isinstance(entering, list) and bool(entering) and all(type(i) is int for i in entering)
    if whole and not eagle.get(aux_layers.KEY):
        outputs = [i - 1 for i in entering]
        try:
            eagle[aux_layers.KEY] = aux_layers.ids_that_name(outputs, target_config)
        except ValueError:
            # the judge says what is wrong with them
            eagle[aux_layers.KEY] = outputs
        found.conversions.append(
            f"{aux_layers.KEY} {entering} name what enters a layer: eagle_config says "
            f"{eagle[aux_layers.KEY]}, as "
            "SGLang names them"
        )
    if eagle:
        config["eagle_config"] = eagle


def _flatten_rope(config: dict[str, Any], found: ExternalDraft) -> None:
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if not isinstance(rope, Mapping):
            continue
        if nested(rope):
            flat = flattened(rope, config.get("layer_types"))
            if not nested(flat):
                config[key] = rope = flat
                found.conversions.append(f"{key} are nested by layer type: written flat")


def _read_names(found: ExternalDraft) -> None:
    """entries and names. Raises ValueError as draft_files.read_entries does."""
    renamed = 0
    for path in weight_files(found.directory):
        for name, entry in read_header(path):
            new = name
            for prefix in PREFIXES:
                new = new.removeprefix(prefix)
            new = canonical_name(new)
            renamed += name != new and canonical_name(name) != new
            if new in found.entries:
                raise ValueError(f"{new} is there twice.")
            found.entries[new] = entry
    if renamed:
        found.conversions.append(f"{renamed} tensors lose their prefix ({', '.join(PREFIXES)})")
    for name in sorted(found.entries):
        match = re.fullmatch(r"(layers\.[1-9]\d*\.)input_layernorm\.weight", name)
        if match and f"{match[1]}hidden_norm.weight" not in found.entries:
            new = f"{match[1]}hidden_norm.weight"
            found.entries[new] = found.entries.pop(name)
            found.conversions.append(f"{name} becomes {new}, the norm of the state there")


def _take_fused_apart(found: ExternalDraft) -> None:
    """qkv_proj and gate_up_proj into their parts, which lie one after the other in the file."""
    config, _ = read_draft_config(found.config)
    for name in [
        n for n in found.entries if n.endswith(("qkv_proj.weight", "gate_up_proj.weight"))
    ]:
        entry = found.entries[name]
        parts = _parts(name, config)
        if len(entry.shape) != 2 or entry.shape[0] != sum(parts.values()):
            continue
        row, start = (entry.stop - entry.start) // entry.shape[0], entry.start
        del found.entries[name]
        for part, rows in parts.items():
            stop = start + rows * row
            found.entries[part] = entry._replace(
                shape=(rows, entry.shape[1]), start=start, stop=stop
            )
            start = stop
        found.conversions.append(f"{name} is taken apart into {', '.join(parts)}")


def _parts(name: str, config: DraftConfig | None) -> dict[str, int]:
    """The names of a fused tensor's parts, in order, and the rows of each."""
    if config is None:
        return {}
    if "gate_up_proj" in name:
        return {
            name.replace("gate_up_proj", f"{p}_proj"): config.intermediate_size
            for p in ("gate", "up")
        }
    heads = {
        "q": config.num_attention_heads,
        "k": config.num_key_value_heads,
        "v": config.num_key_value_heads,
    }
    return {name.replace("qkv_proj", f"{p}_proj"): n * config.head_dim for p, n in heads.items()}


def _name_the_kind(found: ExternalDraft) -> None:
    """Other drafts that share a name with EAGLE3: one clear sentence instead of a list of
    tensors."""
    h = found.config.get("hidden_size")
    if any(part in name for name in found.entries for part in MLA):
        found.problems.append(
            "its attention is latent (MLA, as DeepSeek's): expected a Llama layer; AURORA trains "
            "no other."
        )
    elif (
        type(h) is int
        and "fc.weight" in found.entries
        and found.entries["fc.weight"].shape == (h, 2 * h)
        and ("layers.0.hidden_norm.weight" not in found.entries)
    ):
        found.problems.append(
            "fc reads the embedding and one state, and there is no hidden_norm: an EAGLE or "
            "EAGLE-2 draft, expected "
            "EAGLE3."
        )
