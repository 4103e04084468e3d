"""CONTRACT 1, frame by frame: which arrays a message of each kind has, in which dtypes and shapes.

Schema 3 is schema 2 with features that are float8: a byte each, e4m3, and in a frame of their own a
scale for each row and layer. Only messages that have them say 3.

Dimensions: B requests, T packed feature rows, C tokens of the chunks, N tree nodes, S draft steps,
    P = S + 1, K kept target logits, F width of the features, A layers that they come from.
"""

from __future__ import annotations

import numpy as np

from aurora_sglang_plugin.link.schemas import FLOAT8_SCHEMA

MAX_STEPS = 16
MAX_FEATURES = 1 << 20
MAX_LAYERS = 64

# dtype on the wire -> numpy dtype that carries it. bfloat16 has no numpy type and travels as its
# bits.
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int32": np.dtype("<i4"),
    # codes of e4m3
    "float8": np.dtype("u1"),
}
FLOAT8, FEATURES, SCALES = "float8", "aux_hidden_states", "aux_scales"

# frame name -> (allowed dtypes, shape)
Spec = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
# kind -> frame name -> (allowed dtypes, shape). A letter that repeats must be the same number in a
# whole message.
_FLOAT = ("float32", "float16", "bfloat16")
FRAMES: dict[str, Spec] = {
    "prefill": {
        # absolute position of the chunk's first token
        "positions": (("int32",), ("B",)),
        # tokens of the chunk; the first ones have no features if the prefix cache held them
        "extend_lens": (("int32",), ("B",)),
        # features sent, of the LAST feature_lens tokens of the chunk
        "feature_lens": (("int32",), ("B",)),
        "prompt_lens": (("int32",), ("B",)),
        # C = sum(extend_lens)
        "input_ids": (("int32",), ("C",)),
        # the token after the chunk: next prompt token, or the sampled one
        "next_tokens": (("int32",), ("B",)),
        # T = sum(feature_lens)
        FEATURES: (_FLOAT, ("T", "F")),
    },
    "verify": {
        # absolute position of the root
        "positions": (("int32",), ("B",)),
        # node 0 is the root, the last committed token
        "draft_tokens": (("int32",), ("B", "N")),
        # -1 for the root; -2 for an unused node; parents come before children
        "parents": (("int32",), ("B", "N")),
        # P = S + 1; node ids from the root on, -1 past accept_lens
        "accept_path": (("int32",), ("B", "P")),
        # = accept_length, bonus token included
        "feature_lens": (("int32",), ("B",)),
        # tokens committed after path nodes; valid for the first feature_lens
        "next_tokens": (("int32",), ("B", "P")),
        # features of the path nodes, T = sum(feature_lens)
        FEATURES: (_FLOAT, ("T", "F")),
        "topk_ids": (("int32",), ("B", "N", "K")),
        # As they judged: after penalties and bias, before temperature and truncation.
        "topk_logits": (_FLOAT, ("B", "N", "K")),
        "logsumexp": (("float32",), ("B", "N")),
    },
    # prompt + output tokens that the client may see
    "end": {"committed_lens": (("int32",), ("B",))},
    "heartbeat": {},
}


def frames_of(schema: int, kind: str) -> Spec:
    """The frames of a message, in their order."""
    spec = FRAMES[kind]
    if schema != FLOAT8_SCHEMA or FEATURES not in spec:
        return spec
    frames: Spec = {FEATURES: ((FLOAT8,), ("T", "F")), SCALES: (("float32",), ("T", "A"))}
    return {
        name: of
        for before, shape in spec.items()
        for name, of in (frames if before == FEATURES else {before: shape}).items()
    }
