"""A segment: what is known without a hole of one request, step by step, until it becomes a Sample.

Positions are absolute. A segment that starts at s and has n features knows the tokens x[s..s+n];
`next` = s + n is the position of the last of them, where the next step must go on.

    step      a prefill chunk, or the accepted path of a verify step: features of positions
              p..p+f-1, tokens x[p+1..p+f]
    tree      drawn at the root x[p] of a verify step; it hangs from the position of position p - 1

Dimensions: f features of a step, F feature width, G trees, N nodes, P path columns, K kept target
    logits, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from aurora_sglang_plugin.link.rows import UNUSED, to_float32
from aurora_trainer.intake.sample import Sample

MIN_POSITIONS = 2
# of a step and of a tree, beside what their arrays hold: narrow features or steps of one token must
# not take more than they are counted for
STEP_BYTES, TREE_BYTES = 512, 1024
_TORCH_BITS = {"bfloat16": (np.int16, torch.bfloat16)}


class Quarantine(ValueError):
    """A segment that makes no sample. `cause` is a short constant for counters."""

    def __init__(self, cause: str):
        super().__init__(cause)
        self.cause = cause


@dataclass(slots=True)
class Tree:
    # int32 [N]
    tokens: np.ndarray
    # int32 [N]
    parents: np.ndarray
    # int32 [P], accepted node ids from the root on, -1 past the end
    path: np.ndarray
    # int32 [N, K]
    topk_ids: np.ndarray
    # [N, K], float32 (or float16, or bfloat16 bits)
    topk_logits: np.ndarray
    # float32 [N]
    logsumexp: np.ndarray
    version: int
    altered: bool


@dataclass(slots=True)
class Step:
    # of the first feature, and of the tree's root
    position: int
    # int32 [f], the token after each feature
    tokens: np.ndarray
    # [f, F], bfloat16 as bits
    features: np.ndarray
    # int32 [f], draft version that wrote the position's draft KV
    versions: np.ndarray
    tree: Tree | None = None

    @property
    def nbytes(self) -> int:
        arrays = [self.tokens, self.features, self.versions]
        if (tree := self.tree) is not None:
            arrays += [tree.tokens, tree.parents, tree.path]
            arrays += [tree.topk_ids, tree.topk_logits, tree.logsumexp]
        own = STEP_BYTES + (TREE_BYTES if tree is not None else 0)
        return own + sum(array.nbytes for array in arrays)


@dataclass(slots=True)
class Segment:
    request: str
    session: str
    attempt: int
    start: int
    prompt_len: int
    # x[start]
    first_token: int
    # of its session, when it began: another count means that a message was lost since
    gap_count: int
    next: int = -1
    # x[next]
    last_token: int = -1
    # first positions that an earlier sample has too: context only
    carried: int = 0
    # (num_steps, topk, logits dtype, K, rejection) of its trees; N and P may differ from one to
    # the next, since a server drafts fewer steps where that is faster
    shape: tuple | None = None
    # of its features
    dtype: str = ""
    domain: str = ""
    time_ns: int = 0
    touched_s: float = 0.0
    nbytes: int = 0
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self):
        if self.next < 0:
            self.next, self.last_token = self.start, self.first_token

    def extend(self, step: Step) -> None:
        assert step.position == self.next
        self.steps.append(step)
        self.nbytes += step.nbytes
        self.next += len(step.tokens)
        self.last_token = int(step.tokens[-1])

    def cut(self, position: int) -> None:
        """Forget everything from `position` on, but for the token there.

        Needs start < position < next.
        """
        assert self.start < position < self.next
        self.steps = [step for step in self.steps if step.position < position]
        last = self.steps[-1]
        keep = position - last.position
        if keep < len(last.tokens):
            tree = last.tree
            if tree is not None:
                tree = replace(
                    tree, path=np.where(np.arange(len(tree.path)) <= keep, tree.path, -1)
                )
            last = Step(
                position - keep,
                last.tokens[:keep],
                last.features[:keep],
                last.versions[:keep],
                tree,
            )
            self.steps[-1] = last
        self.next, self.last_token = position, int(last.tokens[-1])
        self.nbytes = sum(step.nbytes for step in self.steps)

    def trim(self, max_positions: int) -> int:
        """Forget the oldest prompt chunks while `max_positions` remain without them; how many."""
        chunks = len(self.steps)
        while (
            self.steps[0].tree is None
            and self.next - self.start - len(self.steps[0].tokens) >= max_positions
        ):
            first = self.steps.pop(0)
            self.start += len(first.tokens)
            self.carried = max(0, self.carried - len(first.tokens))
            self.first_token = int(first.tokens[-1])
            self.nbytes -= first.nbytes
        return chunks - len(self.steps)

    def tail(self, positions: int) -> Segment:
        """The segment that goes on after this one became a sample: its last position, `positions`
        before it as context.
        """
        tokens, features, versions = self._columns()
        positions = min(positions + 1, self.next - self.start)
        after = Segment(
            self.request, self.session, self.attempt + 1, self.next - positions, self.prompt_len,
            int(tokens[-positions - 1]),
            self.gap_count, carried=positions - 1, shape=self.shape, dtype=self.dtype,
            domain=self.domain,
            time_ns=self.time_ns, touched_s=self.touched_s,
        )  # fmt: skip
        after.extend(
            Step(
                after.start,
                tokens[-positions:].copy(),
                features[-positions:].copy(),
                versions[-positions:].copy(),
            )
        )
        return after

    def _columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [n + 1], features [n, F], versions [n]."""
        if not self.steps:
            raise Quarantine("short")
        tokens = np.concatenate([[self.first_token], *(step.tokens for step in self.steps)])
        features = np.concatenate([step.features for step in self.steps])
        return tokens, features, np.concatenate([step.versions for step in self.steps])


def to_sample(segment: Segment, end: int, reason: str, eos: tuple[int, ...] = ()) -> Sample:
    """The sample of the positions start..end: its last token is x[end], or the first of `eos` that
    was generated.

    A tree is kept if the position that it hangs from is. Its nodes past the end stay as nodes
    and are not `accepted`, even if the target took them (a path runs past a stop or max_tokens):
    nobody was given them.

    Raises Quarantine with cause one of: short, no_target.
    """
    tokens, features, versions = segment._columns()
    length = min(segment.next, end) - segment.start
    if eos:
        first = max(segment.prompt_len - segment.start, 0)
        hits = np.flatnonzero(np.isin(tokens[first:], eos))
        length = min(length, first + int(hits[0])) if len(hits) else length
    if length < MIN_POSITIONS:
        raise Quarantine("short")
    start, last = segment.start, segment.start + length
    steps = [
        step for step in segment.steps if step.tree is not None and start < step.position <= last
    ]
    if not steps:
        raise Quarantine("no_target")
    trees = [step.tree for step in steps]
    roots = np.array([step.position for step in steps])
    shape = segment.shape
    return Sample(
        request=segment.request,
        session=segment.session,
        attempt=segment.attempt,
        start=start,
        prompt_len=segment.prompt_len,
        reason=reason,
        time_ns=segment.time_ns,
        tokens=torch.from_numpy(tokens[: length + 1].astype(np.int64)),
        features=_tensor(features[:length], segment.dtype),
        position_version=torch.from_numpy(versions[:length]),
        num_steps=shape[0],
        topk=shape[1],
        rejection=shape[-1],
        domain=segment.domain,
        **_forest(trees, roots - 1 - start, length, shape[2]),
    )


def _forest(
    trees: list[Tree], positions: np.ndarray, length: int, logits_dtype: str
) -> dict[str, torch.Tensor]:
    """All trees of a sample as flat arrays without the unused nodes; `positions` [G] are those that
    they hang from.
    """
    parents = _stack([tree.parents for tree in trees], UNUSED)  # [G, N]
    path = _stack([tree.path for tree in trees], -1)  # [G, P]
    used = parents != UNUSED
    # number of a used node among all used ones
    index = used.ravel().cumsum().reshape(used.shape) - 1
    rows, above = np.arange(len(trees))[:, None], parents.clip(0)
    depth = np.zeros_like(parents)
    # parents come before children
    for node in range(1, parents.shape[1]):
        depth[:, node] = depth[rows[:, 0], above[:, node]] + 1

    # Path node k stands at position root + k; it was committed, and its position is there, up to
    # the sample's last token.
    committed = (path >= 0) & (positions[:, None] + np.arange(path.shape[1]) < length)
    g, k = np.nonzero(committed)
    accepted = np.zeros(parents.shape, bool)
    accepted[g, path[g, k]] = True
    position_node = np.full(length, -1, np.int64)
    # a later tree's root replaces an earlier tree's last node
    position_node[positions[g] + k] = index[g, path[g, k]]

    is_node = np.concatenate([tree.parents != UNUSED for tree in trees])
    ids = np.concatenate([tree.topk_ids for tree in trees])[is_node]
    logits = to_float32(np.concatenate([tree.topk_logits for tree in trees])[is_node], logits_dtype)
    logsumexp = np.concatenate([tree.logsumexp for tree in trees])[is_node]

    def per_tree(values: list | np.ndarray) -> np.ndarray:
        return np.repeat(values, used.sum(1))

    return {
        "position_node": torch.from_numpy(position_node),
        "node_token": torch.from_numpy(
            np.concatenate([tree.tokens for tree in trees])[is_node].astype(np.int64)
        ),
        "node_parent": torch.from_numpy(
            np.where(parents < 0, -1, index[rows, above])[used].astype(np.int64)
        ),
        "node_depth": torch.from_numpy(depth[used].astype(np.int64)),
        "node_position": torch.from_numpy(per_tree(positions).astype(np.int64)),
        "node_accepted": torch.from_numpy(accepted[used]),
        "node_altered": torch.from_numpy(per_tree([tree.altered for tree in trees]).astype(bool)),
        "topk_ids": torch.from_numpy(ids.astype(np.int64)),
        "topk_logits": torch.from_numpy(logits),
        "logsumexp": torch.from_numpy(logsumexp.astype(np.float32)),
        "tree_first": torch.from_numpy(index[:, 0].astype(np.int64)),
        "tree_version": torch.tensor([tree.version for tree in trees], dtype=torch.int32),
    }


def _stack(rows: list[np.ndarray], fill: int) -> np.ndarray:
    """[len(rows), length of the longest], the others filled up."""
    out = np.full((len(rows), max(map(len, rows))), fill, rows[0].dtype)
    for n, row in enumerate(rows):
        out[n, : len(row)] = row
    return out


def _tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
