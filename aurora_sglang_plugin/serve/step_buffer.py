"""All that is kept of a verify step, written into one buffer by the kernels and carried to the host
at once.

Dimensions: b kept requests, N tree nodes, P path columns, K kept target logits, F feature width, A
layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any

import torch
from aurora_kernels.pack_step import float8, ints_width, pack_step
from aurora_kernels.topk_logprobs import topk_logprobs
from torch import Tensor

from aurora_sglang_plugin.serve.transfer import Layout, Pinned, numpy_dtype

# bytes that each part begins at a multiple of, so that kernels load and store whole vectors
ALIGNED = 16


@dataclass(frozen=True)
class Packing:
    """How the steps of a server are packed."""

    # most kept target logits
    kept: int
    # A: features become float8; 0: they stay as they are
    layers: int
    # whether trees have siblings
    links: bool

    def pack(
        self, tree: Any, result: Any, rows: Tensor | None, transfer: Any
    ) -> tuple[Pinned, tuple[int, int]] | None:
        """(what is on its way to the host, (N, P)) of a verify step, as Capture.verify takes it;
        None if it does not fit. `rows`: int64 [b], the requests that are kept; None: all;
        `transfer`: PinnedBuffers. Three kernels and a copy; nothing waits.
        """
        size, nodes = tree.retrieve_next_token.shape
        path, kept = result.accept_index.shape[1], size if rows is None else len(rows)
        logits = result.logits_output.next_token_logits
        hidden = result.logits_output.hidden_states.view(size * nodes, -1)
        shape = step_shape(
            kept, nodes, path, self.links, min(self.kept, logits.shape[1]), logits.dtype,
            hidden.shape[1], layers_of(hidden.shape[1], self.layers), hidden.dtype,
        )  # fmt: skip
        if shape.nbytes > transfer.buffer_bytes:
            return None
        buffer = torch.empty(shape.nbytes, dtype=torch.uint8, device=hidden.device)
        views = shape.views(buffer)
        out = views["topk_ids"], views["topk_logits"], views["logsumexp"]
        topk_logprobs(logits, self.kept, node_rows(rows, nodes), out)
        step = {
            "hidden": hidden,
            "accept_lens": result.accept_lens,
            "accept_index": result.accept_index,
            "positions": tree.positions,
            "draft_tokens": tree.draft_token,
            "next_tokens": result.next_token_ids,
            "next_token": tree.retrieve_next_token if self.links else None,
            "next_sibling": tree.retrieve_next_sibling if self.links else None,
            "rows": rows,
        }
        pack_step(step, views["ints"], views["features"], views.get("scales"))
        staged = transfer.carry(buffer, shape.layout)
        return None if staged is None else (staged, (nodes, path))

    def prewarm(
        self, vocab: int, width: int, dtype: torch.dtype, device: torch.device,
        transfer: Any,
    ) -> None:  # fmt: skip
        """Compile, load and run the kernels, before anything is served: each variant that a step
        may need, in logits of `vocab` columns with and without padding between the rows, of
        features of `width` in `dtype`, with tokens of either size: plain rounds have small ones."""
        some = torch.zeros(2, 2, dtype=torch.int64, device=device)
        hidden = torch.zeros(4, width, dtype=dtype, device=device)
        for columns in {vocab, 64 * -(-vocab // 64)}:
            logits = torch.zeros(4, columns, device=device)[:, :vocab]
            result = SimpleNamespace(
                accept_lens=some[0].int(), accept_index=some.int(), next_token_ids=some.int(),
                logits_output=SimpleNamespace(hidden_states=hidden, next_token_logits=logits),
            )  # fmt: skip
            for rows in (None, some[0, :1]):
                for tokens in (some, some.int()):
                    tree = SimpleNamespace(
                        positions=some, draft_token=tokens, retrieve_next_token=some,
                        retrieve_next_sibling=some,
                    )  # fmt: skip
                    if (packed := self.pack(tree, result, rows, transfer)) is not None:
                        packed[0].release()
        # of prompts
        if self.layers:
            float8(hidden, layers_of(width, self.layers))


def layers_of(columns: int, layers: int) -> int:
    """Scales of a row: of each layer, or one if they are not of one width."""
    return layers if layers and columns % layers == 0 else min(layers, 1)


def node_rows(rows: Tensor | None, nodes: int) -> Tensor | None:
    """Which rows of the [B * N] of a step are nodes of kept requests; None if all are.

    Read where they lie: a copy of the logits would cost as much as the top-K."""
    if rows is None:
        return None
    return (rows[:, None] * nodes + torch.arange(nodes, device=rows.device)).flatten()


@dataclass(frozen=True)
class StepShape:
    requests: int
    nodes: int
    path: int
    # whether trees have siblings
    links: bool
    # K
    kept: int
    logits_dtype: torch.dtype
    # F
    columns: int
    # A: features are float8; 0: they are in `dtype`
    layers: int
    dtype: torch.dtype

    @cached_property
    def parts(self) -> list[tuple[str, torch.dtype, tuple[int, ...], int]]:
        """(name, dtype, shape, first byte). Features come last: what is accepted of them is in
        front, the rest is nothing."""
        b, rows, features = self.requests, self.requests * self.nodes, self.requests * self.path
        shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "topk_ids": (torch.int32, (rows, self.kept)),
            "topk_logits": (self.logits_dtype, (rows, self.kept)),
            "logsumexp": (torch.float32, (rows,)),
            "ints": (torch.int32, (b, ints_width(self.nodes, self.path, self.links))),
            **({"scales": (torch.float32, (features, self.layers))} if self.layers else {}),
            "features": (torch.uint8 if self.layers else self.dtype, (features, self.columns)),
        }
        found, first = [], 0
        for name, (dtype, shape) in shapes.items():
            found.append((name, dtype, shape, first))
            first += ALIGNED * math.ceil(math.prod(shape) * dtype.itemsize / ALIGNED)
        return found

    @cached_property
    def nbytes(self) -> int:
        name, dtype, shape, first = self.parts[-1]
        return first + ALIGNED * math.ceil(math.prod(shape) * dtype.itemsize / ALIGNED)

    @cached_property
    def _dtypes(self) -> set[torch.dtype]:
        return {dtype for _, dtype, *_ in self.parts}

    @cached_property
    def layout(self) -> Layout:
        return [
            (name, numpy_dtype(dtype), shape, first) for name, dtype, shape, first in self.parts
        ]

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The parts of a buffer, uint8 [nbytes]."""
        # few calls: this is the scheduler's thread
        whole = {dtype: buffer.view(dtype) for dtype in self._dtypes}
        return {
            name: whole[dtype].as_strided(shape, (*shape[1:], 1), first // dtype.itemsize)
            for name, dtype, shape, first in self.parts
        }


# steps of a server come in few shapes; each is laid out once
step_shape = cache(StepShape)
