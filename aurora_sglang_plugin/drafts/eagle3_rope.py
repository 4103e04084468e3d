"""The rotary embedding that SGLang 0.5.23 gives a draft, read from its config.json. Imports neither
torch nor sglang.

transformers takes `rope_scaling` whole before `rope_parameters`, and fills what is absent; SGLang
hands all of it to get_rope (srt/layers/rotary_embedding/factory.py), by whose defaults the
parameters below go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from aurora_sglang_plugin.drafts.tensor_files import shown

REQUIRED = object()
# Of the types that are computed: parameter -> SGLang's default. original_max_position_embeddings is
# added to all that stretch a trained length.
PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": REQUIRED},
    "llama3": {"factor": REQUIRED, "low_freq_factor": REQUIRED, "high_freq_factor": REQUIRED},
    "yarn": {
        "factor": REQUIRED, "beta_fast": 32, "beta_slow": 1, "extrapolation_factor": 1,
        "attn_factor": 1,
        "mscale": None, "mscale_all_dim": None, "truncate": True,
    },
}  # fmt: skip
ORIGINAL = "original_max_position_embeddings"
STRETCHED = ("llama3", "yarn")
THETA = 10000.0


def read_rope(raw: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None, list[str]]:
    """(theta, the type's parameters with `rope_type` or None for the plain one, problems)."""
    problems: list[str] = []
    for key in ("rope_scaling", "rope_parameters"):
        if raw.get(key) is not None and not isinstance(raw[key], dict):
            problems.append(
                f"config.json has {key} = {shown(raw[key])}, expected an object or null."
            )
    if problems:
        return THETA, None, problems
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    theta = rope.get("rope_theta", raw.get("rope_theta", THETA))
    if type(theta) not in (int, float) or not 0 < theta < math.inf:
        return (
            THETA,
            None,
            [f"config.json has rope_theta = {shown(theta)}, expected a positive number."],
        )
    if nested(rope):
        return (
            theta,
            None,
            [
                "its rope parameters are nested by layer type, and SGLang reads one flat set only; "
                "`aurora-trainer import` "
                "writes it where the layer types agree."
            ],
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in PARAMETERS:
        known = ", ".join(PARAMETERS)
        return theta, None, [f"its rope type is {shown(kind)}, this trainer computes only {known}."]
    if "mrope_section" in rope or (kind == "default" and rope.get("use_fope")):
        return (
            theta,
            None,
            ["its rotary embedding is of several axes or learned (mrope_section, use_fope)."],
        )
    if kind == "default":
        return float(theta), None, []
    if raw.get("model_type") == "phi3":
        return (
            theta,
            None,
            [
                "it stretches the rope of a phi3 config, which transformers reads as longrope; say "
                "llama."
            ],
        )
    found: dict[str, Any] = {"rope_type": kind}
    for name, default in PARAMETERS[kind].items():
        value = rope.get(name, default)
        if value is REQUIRED:
            problems.append(f"its rope of type {kind} lacks {name}.")
        elif not _fits(name, value):
            problems.append(
                f"its rope of type {kind} has {name} = {shown(value)}, expected {_wanted(name)}."
            )
        elif value is not None:
            found[name] = value
    if kind in STRETCHED:
        # the config's own key goes before the one among the parameters
        original = raw.get(ORIGINAL) or rope.get(ORIGINAL, raw.get("max_position_embeddings"))
        if type(original) is not int or original < 1:
            problems.append(
                f"its rope of type {kind} has {ORIGINAL} = {shown(original)}, expected a positive "
                "integer."
            )
        found[ORIGINAL] = original
    if kind == "yarn" and theta <= 1:
        problems.append(f"its rope of type yarn has rope_theta = {theta}, expected more than 1.")
    return float(theta), (None if problems else found), problems


def nested(rope: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The sets of parameters by layer type, where they are nested so."""
    return {name: value for name, value in rope.items() if isinstance(value, dict)}


def flattened(rope: Mapping[str, Any], layer_types: Any) -> dict[str, Any]:
    """One flat set, where the layers that the draft has agree on one; else `rope` as it is."""
    sets = nested(rope)
    used = [sets[t] for t in layer_types if t in sets] if isinstance(layer_types, list) else []
    used = used or list(sets.values())
    if not used or any(one != used[0] for one in used):
        return dict(rope)
    return {name: value for name, value in rope.items() if name not in sets} | used[0]


def _fits(name: str, value: Any) -> bool:
    if name == "truncate":
        return type(value) is bool
    if value is None:
        return name.startswith("mscale")
    if type(value) not in (int, float) or not math.isfinite(value):
        return False
    return value > 0 or name.startswith(("mscale", "extrapolation", "attn"))


def _wanted(name: str) -> str:
    return "true or false" if name == "truncate" else "a positive number"
