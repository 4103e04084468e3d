"""What Hugging Face computes of the same target, to hold against what was captured: every
off-by-one shows here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from serve import has_gpu

from aurora_sglang_plugin.link import wire
from aurora_sglang_plugin.link.rows import to_float32
from aurora_trainer.intake.sample import Sample

# Float32 in another order; features are of size 1 to 10. A GPU's server computes in bfloat16.
FEATURE_ATOL = 0.2 if has_gpu() else 2e-4
FLOAT8_ATOL = max(FEATURE_ATOL, 0.07)
LOGIT_ATOL = 0.2 if has_gpu() else 2e-3
ROWS = 32


@dataclass
class Reference:
    model: torch.nn.Module
    # whose output is a feature
    layers: tuple[int, ...]

    @torch.no_grad()
    def run(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [T, F] and logits [T, V] of every position."""
        out = self.model(torch.tensor([tokens]), output_hidden_states=True)
        return torch.cat([out.hidden_states[i + 1] for i in self.layers], -1)[0], out.logits[0]

    @torch.no_grad()
    def after(self, sequences: list[list[int]]) -> torch.Tensor:
        """Logits [rows, V] after the last token of each sequence."""
        rows = []
        for first in range(0, len(sequences), ROWS):
            some = sequences[first : first + ROWS]
            padded = torch.zeros(len(some), max(map(len, some)), dtype=torch.int64)
            for i, tokens in enumerate(some):
                # causal: what follows a row's end is not seen
                padded[i, : len(tokens)] = torch.tensor(tokens)
            last = torch.tensor([len(tokens) - 1 for tokens in some])
            rows.append(self.model(padded).logits[torch.arange(len(some)), last])
        return torch.cat(rows)

    def check_sample(
        self, sample: Sample, tokens: list[int], rejected: int = 24, judged=None
    ) -> None:
        """`tokens`: everything that the client knows of this request, prompt and output.

        `judged(raw logits [n, V], roots [n])` are the logits that SGLang judged with, `roots` the
        number of each row's tree in the sample; None: the raw ones.
        """
        edit = judged or (lambda logits, roots: logits)
        start, positions = sample.start, len(sample.features)
        # and never beyond
        assert sample.tokens.tolist() == tokens[start : start + positions + 1]
        features, logits = self.run(tokens)
        _near(
            sample.features.float(),
            features[start : start + positions],
            # float32 does not come in 16 bits
            FLOAT8_ATOL if sample.features.dtype == torch.bfloat16 else FEATURE_ATOL,
            f"features {sample.request}",
        )
        # Every position's target is the distribution at the next position.
        with_target = torch.where(sample.position_node >= 0)[0]
        nodes = sample.position_node[with_target]
        tree = torch.bucketize(nodes, sample.tree_first, right=True) - 1
        self._check_nodes(sample, nodes, edit(logits[start + 1 + with_target], tree))
        assert sample.node_accepted[sample.position_node[with_target]].all()
        # Nodes off the path, some of them.
        off = torch.where(~sample.node_accepted)[0]
        off = off[torch.randperm(len(off), generator=torch.Generator().manual_seed(0))[:rejected]]
        if len(off):
            tree = torch.bucketize(off, sample.tree_first, right=True) - 1
            raw = self.after([_path(sample, tokens, int(node)) for node in off])
            self._check_nodes(sample, off, edit(raw, tree))

    def _check_nodes(self, sample: Sample, nodes: torch.Tensor, logits: torch.Tensor) -> None:
        kept = sample.topk_logits[nodes]
        _near(
            kept,
            logits.gather(1, sample.topk_ids[nodes]),
            LOGIT_ATOL,
            f"logits of ids {sample.request}",
        )
        _near(
            kept, logits.topk(kept.shape[1]).values, LOGIT_ATOL, f"largest logits {sample.request}"
        )
        _near(
            sample.logsumexp[nodes], logits.logsumexp(-1), LOGIT_ATOL, f"logsumexp {sample.request}"
        )

    def check_prefill(self, message: wire.Message, row: int, tokens: list[int]) -> tuple[int, int]:
        """One request's chunk of a prefill message.

        Returns its positions, first to past the last.
        """
        a = message.arrays
        begin, length = int(a["extend_lens"][:row].sum()), int(a["extend_lens"][row])
        first = int(a["positions"][row])
        assert a["input_ids"][begin : begin + length].tolist() == tokens[first : first + length]
        # ids of a cached prefix come before those with features
        begin, count = int(a["feature_lens"][:row].sum()), int(a["feature_lens"][row])
        first += length - count
        if first + count < len(tokens):
            assert a["next_tokens"][row] == tokens[first + count]
        features, _ = self.run(tokens[: first + count])
        hidden = a["aux_hidden_states"][begin : begin + count]
        hidden = torch.from_numpy(to_float32(hidden, message.dtype("aux_hidden_states")))
        _near(
            hidden,
            features[first:],
            FEATURE_ATOL,
            f"prefill {message.header.requests[row]} at {first}",
        )
        return first, first + count


def _path(sample: Sample, tokens: list[int], node: int) -> list[int]:
    """All tokens up to and including a node's."""
    path = []
    while sample.node_parent[node] >= 0:
        path.append(int(sample.node_token[node]))
        node = int(sample.node_parent[node])
    root = sample.start + int(sample.node_position[node]) + 1
    assert tokens[root] == sample.node_token[node]
    return tokens[: root + 1] + path[::-1]


def _near(found: torch.Tensor, expected: torch.Tensor, atol: float, what: str) -> None:
    worst = ((found - expected).abs() / (1 + expected.abs())).amax()
    assert worst < atol, f"{what}: off by {worst:.1e}"
