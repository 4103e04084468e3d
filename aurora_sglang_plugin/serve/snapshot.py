"""A step's snapshot becomes the arrays of a message (wire.FRAMES), on the publisher's thread.

Each snapshot has `nbytes` (what it holds while it is queued), `build() -> {frame name: (wire dtype,
array)}`, and `unload()` for a message that has to wait.
Dimensions: b sampled requests, N tree nodes, P = S + 1 path columns, K kept target logits, F
    feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from aurora_kernels.topk_logprobs import topk_logprobs

from aurora_sglang_plugin.serve.acceptance import Acceptance
from aurora_sglang_plugin.serve.transfer import Staged

WIRE_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
Arrays = dict[str, tuple[str, np.ndarray]]


@dataclass(slots=True)
class Prefill:
    staged: Staged
    # of the sampled requests in the batch
    rows: list[int]
    # features taken of each
    lens: list[int]
    prompt_lens: list[int]
    # ids before them, which travel without features
    before: list[Sequence[int]]

    @property
    def nbytes(self) -> int:
        return self.staged.nbytes

    def unload(self) -> None:
        self.staged.unload()

    def build(self) -> Arrays:
        t = self.staged.fetch()
        lens = torch.tensor(self.lens)
        ends = lens.cumsum(0)
        extend = lens + torch.tensor([len(ids) for ids in self.before])
        arrays = {
            "positions": _int32(t["seq_lens"][self.rows].cpu() - extend),
            "extend_lens": _int32(extend),
            "feature_lens": _int32(lens),
            "prompt_lens": _int32(torch.tensor(self.prompt_lens)),
            "input_ids": _int32(self._input_ids(t["input_ids"])),
            "next_tokens": _int32(t["rotated_ids"][ends - 1]),
            "aux_hidden_states": _raw(t["hidden"], private=self.staged.buffer is None),
        }
        self.staged.release()
        return arrays

    def _input_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Of each request: those before its features, then theirs."""
        if not any(map(len, self.before)):
            return ids
        own = ids.split(self.lens)
        return torch.cat([p for b, o in zip(self.before, own) for p in (torch.tensor(b), o)])


@dataclass(slots=True)
class Verify:
    staged: Staged
    # kept target logits
    k: int
    # that drew the trees
    version: int = 0
    # where its accept lengths are counted, once
    acceptance: Acceptance | None = None

    @property
    def nbytes(self) -> int:
        return self.staged.nbytes

    def unload(self) -> None:
        self.staged.unload()
        self._count(self.staged.tensors)

    def build(self) -> Arrays:
        t = self.staged.fetch()
        self._count(t)
        size, nodes = t["draft_tokens"].shape
        if "logits" in t:
            k = min(self.k, t["logits"].shape[1])
            t["topk_ids"], t["topk_logits"], t["logsumexp"] = topk_logprobs(t["logits"], k)
        path, lens = t["accept_index"], t["accept_lens"]
        on_path = torch.arange(path.shape[1]) < lens[:, None]
        arrays = {
            "positions": _int32(t["positions"]),
            "draft_tokens": _int32(t["draft_tokens"]),
            "parents": _int32(parents(t["next_token"], t["next_sibling"])),
            # SGLang's ids are global: row * N + node
            "accept_path": _int32(torch.where(on_path, path % nodes, -1)),
            "feature_lens": _int32(lens),
            "next_tokens": _int32(t["next_tokens"]),
            "aux_hidden_states": _raw(t["hidden"][on_path], private=True),
            "topk_ids": _int32(t["topk_ids"].view(size, nodes, -1)),
            "topk_logits": _raw(
                t["topk_logits"].float().view(size, nodes, -1), private=self.staged.buffer is None
            ),
            "logsumexp": _raw(
                t["logsumexp"].float().view(size, nodes), private=self.staged.buffer is None
            ),
        }
        self.staged.release()
        return arrays

    def _count(self, tensors: dict[str, torch.Tensor]) -> None:
        if self.acceptance is not None:
            self.acceptance.add(self.version, tensors["accept_lens"])
            self.acceptance = None


@dataclass(slots=True)
class End:
    committed_len: int
    nbytes: int = 64

    def unload(self) -> None:
        pass

    def build(self) -> Arrays:
        return {"committed_lens": _int32(torch.tensor([self.committed_len]))}


def parents(next_token: torch.Tensor, next_sibling: torch.Tensor) -> torch.Tensor:
    """SGLang's first-child and next-sibling links, [b, N] of node ids or -1, as parents [b, N]: -1
    root, -2 unused.
    """
    size, nodes = next_token.shape
    # column N takes the writes of absent links
    result = torch.full((size, nodes + 1), -2, dtype=torch.int64)
    result[:, 0] = -1
    rows = torch.arange(size)
    # chains: nobody's parent has to be known first
    if not (next_sibling >= 0).any():
        child = torch.where(next_token >= 0, next_token, nodes).long()
        result[rows[:, None], child] = torch.arange(nodes)
        return result[:, :nodes]
    # links point forward, so a node's parent is known when it is visited
    for node in range(nodes):
        child, sibling = next_token[:, node].long(), next_sibling[:, node].long()
        result[rows, torch.where(child >= 0, child, nodes)] = node
        result[rows, torch.where(sibling >= 0, sibling, nodes)] = result[rows, node]
    return result[:, :nodes]


def _int32(tensor: torch.Tensor) -> tuple[str, np.ndarray]:
    copied = tensor.to(torch.int32, copy=True, memory_format=torch.contiguous_format)
    return "int32", copied.numpy()


def _raw(tensor: torch.Tensor, private: bool) -> tuple[str, np.ndarray]:
    """The tensor's bytes; copied out of a pinned buffer, which is about to be given back."""
    tensor = tensor.contiguous() if private else tensor.clone(memory_format=torch.contiguous_format)
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return WIRE_DTYPES[tensor.dtype], bits.numpy()
