"""Which requests stay out of capture, and why: one function, asked once for each request.

`Capture.sampled` asks at a request's first step and keeps the answer: taken whole, or not at all.
"""

from __future__ import annotations

import zlib
from typing import Any

from aurora_sglang_plugin.link.rows import request_id_fits

# A key of sampling_params.custom_params. Anything but true keeps the request out: a privacy switch
# fails closed.
OPT_OUT = "aurora_capture"

# The same, of Aurora's own: a request that is decoded again (audit.py).
AUDIT = "aurora_audit"

# A label that travels along, of wire.DOMAIN's form.
DOMAIN_LABEL = "aurora_domain"
KEYS = {OPT_OUT, AUDIT, DOMAIN_LABEL}

# SGLang's own requests begin so (constants.HEALTH_CHECK_RID_PREFIX).
HEALTH_CHECK = "HEALTH_CHECK"

CAUSES = (
    "audit",
    "opt_out",
    "health_check",
    "request_id",
    "multimodal",
    "embeddings",
    "scoring",
    "lora",
    "sample_rate",
    "no_trainer",
    # not by what the request is: capture rests (capture.py)
    "failing",
)
# of the requests that would be taken, while no trainer takes messages: shows that capture works
NO_TRAINER_RATE = 1 / 256


def why_excluded(req: Any, sample_rate: float, no_trainer: bool = False) -> str | None:
    """Why SGLang's request `req` is not captured, one of CAUSES; None if it is. Never raises.

    `sample_rate` is a share of the requests, by a hash of their ids; no_trainer: nobody takes what
    is captured.
    """
    custom = req.sampling_params.custom_params
    if isinstance(custom, dict) and custom.get(AUDIT) is True:
        return "audit"
    if custom is not None and (
        not isinstance(custom, dict) or custom.get(OPT_OUT, True) is not True or _misspelt(custom)
    ):
        return "opt_out"
    # What a trainer would refuse with the whole message that carries it.
    if not request_id_fits(req.rid):
        return "request_id"
    if req.rid.startswith(HEALTH_CHECK):
        return "health_check"
    # No token id names these embeddings: a trainer would take their placeholders for text.
    if getattr(req, "multimodal_inputs", None) is not None:
        return "multimodal"
    if any(
        getattr(req, name, None) is not None
        for name in ("input_embeds", "positional_embed_overrides")
    ):
        return "embeddings"
    # Several items behind one query: positions and attention are not those of a text.
    if any(
        getattr(req, name, None) is not None
        for name in ("multi_item_delimiter_indices", "decision_layout")
    ):
        return "scoring"
    # An adapter is another target.
    if getattr(req, "lora_id", None) is not None:
        return "lora"
    place = place_of(req.rid)
    if place >= sample_rate:
        return "sample_rate"
    if no_trainer and place >= sample_rate * NO_TRAINER_RATE:
        return "no_trainer"
    return None


def place_of(rid: str, among: str = "") -> float:
    """Where a hash of a request id stands between 0 and 1; `among`: in another order."""
    return zlib.crc32((rid + among).encode()) / 2**32


def _misspelt(custom: dict) -> bool:
    """Whether a key, also one level down, is meant for Aurora and is none of its own: whatever was
    meant, the request stays out."""
    inner = [key for value in custom.values() if isinstance(value, dict) for key in value]
    return any(_is_auroras(key) for key in (*(key for key in custom if key not in KEYS), *inner))


def _is_auroras(key: Any) -> bool:
    letters = "".join(filter(str.isalpha, str(key).casefold()))
    return letters.startswith("aurora")
