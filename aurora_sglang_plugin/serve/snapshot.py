"""A step's snapshot becomes the arrays of a message (wire.FRAMES), on the publisher's thread.

Each snapshot has `nbytes` (what it holds while it is queued), `build() -> {frame name: (wire dtype,
array)}`, and `unload()` for a message that has to wait.
On CUDA kernels have packed a step; elsewhere their references do it here.
Dimensions: b sampled requests, N tree nodes, P = S + 1 path columns, K kept target logits, F
    feature width, A layers, T feature rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from aurora_kernels.pack_step import float8_ref, ints_parts, ints_width, pack_step_ref
from aurora_kernels.topk_logprobs import topk_logprobs

from aurora_sglang_plugin.link.frames import FEATURES, FLOAT8, SCALES
from aurora_sglang_plugin.link.rows import to_float32
from aurora_sglang_plugin.serve.accepted_counts import Acceptance
from aurora_sglang_plugin.serve.transfer import Pinned, Staged, as_array, as_tensor

# what carries it -> dtype on the wire
WIRE_DTYPES = {np.float32: "float32", np.float16: "float16", np.uint16: "bfloat16"}
Arrays = dict[str, tuple[str, np.ndarray]]


@dataclass(slots=True)
class Prefill:
    staged: Staged | Pinned
    # of the sampled requests in the batch
    rows: list[int]
    # features taken of each
    lens: list[int]
    prompt_lens: list[int]
    # ids before them, which travel without features
    before: list[Sequence[int]]
    # A: features travel as float8; 0: as they are
    layers: int = 0

    @property
    def nbytes(self) -> int:
        return self.staged.nbytes

    def unload(self) -> None:
        self.staged.unload()

    def build(self) -> Arrays:
        t = self.staged.fetch()
        lens = np.array(self.lens)
        extend = lens + [len(ids) for ids in self.before]
        arrays = {
            "positions": _int32(t["seq_lens"][self.rows] - extend),
            "extend_lens": _int32(extend),
            "feature_lens": _int32(lens),
            "prompt_lens": _int32(np.array(self.prompt_lens)),
            "input_ids": _int32(self._input_ids(t["input_ids"])),
            "next_tokens": _int32(t["rotated_ids"][lens.cumsum() - 1]),
        }
        features, scales = t["hidden"], t.get("scales")
        if self.layers and scales is None:
            features, scales = map(as_array, float8_ref(as_tensor(features), self.layers))
        arrays |= _features(features, scales)
        self.staged.release()
        return arrays

    def _input_ids(self, ids: np.ndarray) -> np.ndarray:
        """Of each request: those before its features, then theirs."""
        if not any(map(len, self.before)):
            return ids
        own = np.split(ids, np.cumsum(self.lens)[:-1])
        return np.concatenate([p for b, o in zip(self.before, own) for p in (np.array(b, int), o)])


@dataclass(slots=True)
class Verify:
    # what the kernels leave; or what they are given, without links where every tree is a chain
    staged: Staged | Pinned
    # kept target logits
    k: int
    # that drew the trees
    version: int = 0
    # where its accept lengths are counted, once
    acceptance: Acceptance | None = None
    # A: features travel as float8; 0: as they are
    layers: int = 0
    # N and P of what is packed
    shape: tuple[int, int] = (0, 0)

    @property
    def nbytes(self) -> int:
        return self.staged.nbytes

    def unload(self) -> None:
        self.staged.unload()
        self._count(self.staged.fetch())

    def build(self) -> Arrays:
        t = self.staged.fetch()
        self._count(t)
        if "ints" not in t:
            t = self._pack(t)
        ints, (nodes, path) = t["ints"], self.shape
        links = ints.shape[1] > ints_width(nodes, path, False)
        of = {name: ints[:, part] for name, part in ints_parts(nodes, path, links).items()}
        size, lens, logits = len(ints), of["accept_lens"][:, 0], t["topk_logits"]
        rows = int(lens.sum())
        features = t["features"][:rows], t["scales"][:rows] if self.layers else None
        arrays = {
            "positions": _int32(of["positions"][:, 0]),
            "draft_tokens": _int32(of["draft_tokens"]),
            "parents": (
                _int32(parents(of["next_token"], of["next_sibling"]))
                if links
                else chains(size, nodes)
            ),
            "accept_path": _int32(of["accept_index"]),
            "feature_lens": _int32(lens),
            "next_tokens": _int32(of["next_tokens"]),
            **_features(*features),
            "topk_ids": _int32(t["topk_ids"].reshape(size, nodes, -1)),
            "topk_logits": _floats(
                to_float32(logits, WIRE_DTYPES[logits.dtype.type]).reshape(size, nodes, -1)
            ),
            "logsumexp": _floats(t["logsumexp"].astype(np.float32).reshape(size, nodes)),
        }
        self.staged.release()
        return arrays

    def _pack(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the kernels do on CUDA."""
        t = {name: as_tensor(array) for name, array in arrays.items()}
        self.shape = t["draft_tokens"].shape[1], t["accept_index"].shape[1]
        t["hidden"] = t["hidden"].flatten(0, 1)
        packed = zip(("ints", "features", "scales"), pack_step_ref(t, self.layers))
        kept = topk_logprobs(t["logits"], self.k)
        found = dict(packed) | dict(zip(("topk_ids", "topk_logits", "logsumexp"), kept))
        return {name: as_array(tensor) for name, tensor in found.items() if tensor is not None}

    def _count(self, arrays: dict[str, np.ndarray]) -> None:
        if self.acceptance is not None:
            lens = arrays.get("accept_lens")
            if lens is None:
                # where they lie does not depend on links
                lens = arrays["ints"][:, ints_parts(*self.shape, False)["accept_lens"]][:, 0]
            self.acceptance.add(self.version, lens)
            self.acceptance = None


@dataclass(slots=True)
class End:
    committed_len: int
    nbytes: int = 64

    def unload(self) -> None:
        pass

    def build(self) -> Arrays:
        return {"committed_lens": _int32(np.array([self.committed_len]))}


def parents(next_token: np.ndarray, next_sibling: np.ndarray) -> np.ndarray:
    """SGLang's first-child and next-sibling links, [b, N] of node ids or -1, as parents [b, N]: -1
    root, -2 unused.
    """
    size, nodes = next_token.shape
    # column N takes the writes of absent links
    result = np.full((size, nodes + 1), -2)
    result[:, 0] = -1
    rows = np.arange(size)
    child = np.where(next_token >= 0, next_token, nodes)
    sibling = np.where(next_sibling >= 0, next_sibling, nodes)
    # chains: nobody's parent has to be known first
    if (sibling == nodes).all():
        result[rows[:, None], child] = np.arange(nodes)
        return result[:, :nodes]
    # links point forward, so a node's parent is known when it is visited
    for node in range(nodes):
        result[rows, child[:, node]] = node
        result[rows, sibling[:, node]] = result[:, node]
    return result[:, :nodes]


@cache
def chains(size: int, nodes: int) -> tuple[str, np.ndarray]:
    """Parents [b, N] where every node has one child."""
    return _int32(np.tile(np.arange(-1, nodes - 1), (size, 1)))


def _features(features: np.ndarray, scales: np.ndarray | None) -> Arrays:
    """Copies, as _int32's: features [T, F], with scales [T, A] if they are codes of float8."""
    features = features.copy()
    if scales is None:
        return {FEATURES: _floats(features)}
    return {FEATURES: (FLOAT8, features), SCALES: ("float32", scales.copy())}


def _int32(array: np.ndarray) -> tuple[str, np.ndarray]:
    # copied: out of a pinned buffer, which is about to be given back
    return "int32", array.astype(np.int32, "C")


def _floats(array: np.ndarray) -> tuple[str, np.ndarray]:
    return WIRE_DTYPES[array.dtype.type], np.ascontiguousarray(array)
