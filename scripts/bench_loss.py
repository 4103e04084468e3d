"""Final norm, head and forward KL, with all gradients: ours, torch.compile of the naive form, a
chunked form.

Dimensions: R rows, H hidden, V target vocabulary, VD draft vocabulary, K kept target logits. The
rate counts the three products of head and state (logits, their gradient into state and into head)
and, of exact targets, the target's logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from aurora_kernels.tree_loss import tree_loss, tree_loss_exact
from aurora_kernels.tree_loss_ref import tree_loss_exact_ref, tree_loss_ref
from kernel_timing import Bench, compiled, relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# R, H, V, VD
FIRST = [(8192, 4096, 151_936, 151_936), (32_768, 4096, 151_936, 151_936)]
REST = [
    (8192, 4096, 151_936, 32_000),
    (2048, 4096, 151_936, 151_936),
    (8192, 1024, 32_000, 32_000),
    (32_768, 4096, 151_936, 32_000),
]
TINY = [(24, 16, 50, 50), (24, 16, 50, 30)]
# LIMIT: of bfloat16 gradients
K, CHECKED_ROWS, CHUNK_ROWS, EPS, LIMIT = 32, 128, 1024, 1e-6, 5e-2


@dataclass
class Case:
    state: Tensor  # [R, H]
    norm: Tensor  # [H]
    head: Tensor  # [VD, H]
    # draft ids, logits, log-sum-exp
    topk: tuple[Tensor, Tensor, Tensor]
    # state, head, ids
    target: tuple[Tensor, Tensor, Tensor | None]
    weight: Tensor  # [R]

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.state, self.norm, self.head


def make_case(rows: int, hidden: int, vocab: int, draft_vocab: int, device: str) -> Case:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    target_head, target_state = normal(vocab, hidden, scale=2 * hidden**-0.5), normal(rows, hidden)
    ids = (
        None
        if draft_vocab == vocab
        else torch.randperm(vocab, device=device)[:draft_vocab].sort().values
    )
    parts = []
    for at in range(0, rows, CHUNK_ROWS):
        logits = (target_state[at : at + CHUNK_ROWS] @ target_head.T).float()
        parts.append((*logits.topk(min(K, vocab), dim=-1), logits.logsumexp(-1)))
    top, kept, logsumexp = (torch.cat(x) for x in zip(*parts))
    if ids is not None:
        draft_ids = torch.full((vocab,), -1, device=device)
        draft_ids[ids] = torch.arange(draft_vocab, device=device)
        kept = draft_ids[kept]
    leaves = normal(rows, hidden), normal(hidden), normal(draft_vocab, hidden, scale=hidden**-0.5)
    for leaf in leaves:
        leaf.requires_grad_()
    weight = torch.full((rows,), 1 / rows, device=device)
    return Case(*leaves, (kept, top, logsumexp), (target_state, target_head, ids), weight)


def draft_log_q(state: Tensor, norm: Tensor, head: Tensor) -> Tensor:
    return F.log_softmax((F.rms_norm(state, norm.shape, norm, EPS) @ head.T).float(), -1)


def naive_topk(state, norm, head, ids, logits, logsumexp, weight) -> Tensor:
    real, p = ids >= 0, (logits - logsumexp[:, None]).exp()
    tail = (1 - p.sum(-1)).clamp_min(0)
    p = p * real
    covered = (p.sum(-1) + tail).clamp_min(1e-6)
    p, tail = p / covered[:, None], tail / covered
    log_q = draft_log_q(state, norm, head).gather(1, ids.clamp_min(0))
    log_q_tail = torch.log1p(-(log_q.exp() * real).sum(-1).clamp_max(1 - 1e-6))
    loss = (torch.xlogy(p, p) - p * log_q).sum(-1) + torch.xlogy(tail, tail) - tail * log_q_tail
    return (loss * weight).sum()


def naive_exact(state, norm, head, target_state, target_head, target_ids, weight) -> Tensor:
    logits = (target_state @ target_head.T).float()
    log_p = F.log_softmax(logits if target_ids is None else logits[:, target_ids], -1)
    return ((log_p.exp() * (log_p - draft_log_q(state, norm, head))).sum(-1) * weight).sum()


def chunked(naive, rows_of):
    """`naive` over chunks of rows, each computed again in the backward pass. rows_of: which
    arguments have rows.
    """

    def loss(*args):
        total = 0.0
        for at in range(0, len(args[0]), CHUNK_ROWS):
            part = (
                a[at : at + CHUNK_ROWS] if has_rows else a
                for a, has_rows in zip(args, rows_of, strict=True)
            )
            total = total + checkpoint(naive, *part, use_reentrant=False)
        return total

    return loss


def bench(run: Bench, rows: int, hidden: int, vocab: int, draft_vocab: int) -> None:
    case = make_case(rows, hidden, vocab, draft_vocab, run.device)
    setting = f"{rows} rows H={hidden} VD={draft_vocab}"
    product = 2 * rows * hidden
    for kind, work, inputs, ours, ref, naive, rows_of in (
        ("top-K", 3 * product * draft_vocab, case.topk, tree_loss, tree_loss_ref, naive_topk,
         (1, 0, 0, 1, 1, 1, 1)),
        ("exact", product * (3 * draft_vocab + vocab), case.target, tree_loss_exact,
        tree_loss_exact_ref,
         naive_exact, (1, 0, 0, 1, 0, 0, 1)),
    ):  # fmt: skip

        def fused(*args, ours=ours):
            return ours(*args, "forward_kl", EPS).loss_sum

        def expected(case=case, inputs=inputs, ref=ref, rows_of=rows_of):
            """Gradients of the reference if only the first rows have a weight."""
            head = [x[:CHECKED_ROWS] if has else x for x, has in zip(inputs, rows_of[3:6])]
            leaves = case.state[:CHECKED_ROWS], case.norm, case.head
            loss = ref(*leaves, *head, case.weight[:CHECKED_ROWS], "forward_kl", EPS).loss_sum
            return torch.autograd.grad(loss, case.leaves)

        reference = expected()
        few = case.weight * (torch.arange(rows, device=run.device) < CHECKED_ROWS)
        naive_compiled = compiled(naive, run.device)
        sides = (
            ("ours", fused),
            ("naive, compiled", naive_compiled),
            ("chunked", chunked(naive_compiled, rows_of)),
        )
        for side, loss in sides:

            def call(weight=None, loss=loss, case=case, inputs=inputs):
                total = loss(*case.leaves, *inputs, case.weight if weight is None else weight)
                return torch.autograd.grad(total, case.leaves)

            def check(call=call, few=few, reference=reference):
                return max(relative_error(a, b) for a, b in zip(call(few), reference))

            run.row(f"tree_loss {kind} fwd+bwd", setting, side, work, call, check, LIMIT)
        del reference
