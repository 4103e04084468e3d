"""The sample: a run of committed positions of one request, and the trees that hung from them.

A position is what the draft's KV cache has one row of. With `start` = s, position i stands at
absolute (RoPE) position s + i and holds token x[s+i+1] with the target's feature of position s + i.
A position proposes depth 1: its logits predict x[s+i+2], so its target is the target model's
distribution at position s + i + 1.

    position       s      s+1     s+2   ...   s+L-1    s+L
    tokens         [0]    [1]     [2]   ...   [L-1]    [L]      L + 1 tokens, L features
    position i         holds tokens[i+1] and features[i]; predicts tokens[i+2]

A verify step with its root at position r drew a tree from position r-1-s (the position that holds
the root's token). Its nodes are kept in the order of the wire, root first (the root is that
position, not a query of its own). The query of a node u at depth d >= 1 takes u's token and its
parent's state at draft position r-1+d and attends to positions 0..r-1-s, to its non-root ancestors
and itself. Its target is the distribution at node u.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

# session, request id
RequestKey = tuple[str, str]


@dataclass
class Sample:
    """L positions, M nodes in G trees, F feature width, K kept target logits.

    All tensors on the CPU.
    """

    request: str
    session: str
    # counts re-prefills (retraction, reused id) and cuts at gaps of one request id
    attempt: int
    # absolute position of position 0; > 0 after a prefix-cache hit or a gap
    start: int
    # tokens of the prompt (positions below it were not generated)
    prompt_len: int
    # how it ended: stop, length, abort, retract, gap, idle, part (of a long request that went on)
    reason: str
    # wall clock when its last step was captured
    time_ns: int
    # int64 [L + 1]
    tokens: torch.Tensor
    # [L, F], the server's dtype
    features: torch.Tensor
    # int32 [L], draft version that wrote this position's draft KV on the server
    position_version: torch.Tensor
    # int64 [L], node whose distribution is this position's target, -1 if there is none
    position_node: torch.Tensor
    # int64 [M]
    node_token: torch.Tensor
    # int64 [M], index into the nodes, -1 for a root
    node_parent: torch.Tensor
    # int64 [M], 0 for a root
    node_depth: torch.Tensor
    # int64 [M], the position that its tree hangs from
    node_position: torch.Tensor
    # bool [M], on the committed path (roots are)
    node_accepted: torch.Tensor
    # bool [M], judged under a grammar's mask or a watermark: no target
    node_altered: torch.Tensor
    # int64 [M, K]
    topk_ids: torch.Tensor
    # float32 [M, K], the logits that judged, largest first
    topk_logits: torch.Tensor
    # float32 [M], over the whole target vocabulary
    logsumexp: torch.Tensor
    # int64 [G], first node (the root) of each tree
    tree_first: torch.Tensor
    # int32 [G], draft version that drew it
    tree_version: torch.Tensor
    # S, of the server's trees
    num_steps: int
    # beams, of the server's trees
    topk: int
    # drafts were draws, judged by rejection sampling
    rejection: bool = False
    # the label that the client gave its request, "" without one
    domain: str = ""

    @property
    def has_target(self) -> torch.Tensor:
        """bool [L]: positions whose target is known and is the target model's own choice."""
        # One more, for -1 to stand for.
        altered = torch.cat([self.node_altered, self.node_altered.new_ones(1)])
        return ~altered[self.position_node]

    @property
    def nbytes(self) -> int:
        tensors = (getattr(self, f.name) for f in fields(self))
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
