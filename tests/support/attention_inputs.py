"""Inputs of tree_attention, random or of given trees, and how its outputs and gradients are
compared with the reference's in float64.
"""

import torch
from aurora_kernels.tree_attention import tree_attention
from aurora_kernels.tree_attention_ref import tree_attention_ref

NAMES = ("q", "context_k", "context_v", "node_k", "node_v")


def inputs(
    device,
    queries,
    positions,
    nodes,
    kv_heads=2,
    group=2,
    dim=16,
    dtype=torch.float32,
    spread=1.0,
    seed=0,
):
    """q, context_k, context_v, node_k and node_v with gradients."""
    g = torch.Generator().manual_seed(seed)
    shapes = (
        (queries, kv_heads * group),
        (positions, kv_heads),
        (positions, kv_heads),
        (nodes, kv_heads),
        (nodes, kv_heads),
    )
    made = (torch.randn(*shape, dim, generator=g) * spread for shape in shapes)
    return [x.to(device, dtype).requires_grad_() for x in made]


def random_index(device, queries, lengths, nodes, width, seed=0):
    """Unsorted queries of packed sequences: some see nothing, ancestors are missing and
    repeated.
    """
    g = torch.Generator().manual_seed(seed)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    sequence = torch.randint(len(lengths), (queries,), generator=g)
    start = bounds[sequence]
    end = start + (torch.rand(queries, generator=g) * (bounds[sequence + 1] - start + 1)).long()
    ancestors = (
        torch.randint(-1, nodes, (queries, width), generator=g)
        if nodes
        else torch.full((queries, width), -1)
    )
    return [x.to(device) for x in (start, end, ancestors)]


def tree_index(device, lengths, trees):
    """Every node but the roots is a query. trees: (sequence, position in it, parents).

    Returns the index and the nodes.
    """
    first = torch.tensor([0, *lengths]).cumsum(0).tolist()
    start, end, paths = [], [], []
    for sequence, position, parents in trees:
        before, path = len(paths), [[]]
        for node, parent in enumerate(parents[1:], 1):
            path.append([*path[parent], before + node - 1])
            start.append(first[sequence])
            end.append(first[sequence] + position + 1)
        paths += path[1:]
    width = max(map(len, paths), default=0)
    ancestors = torch.tensor([p + [-1] * (width - len(p)) for p in paths]).view(len(paths), width)
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))
    return [x[order].to(device) for x in (torch.tensor(start), torch.tensor(end), ancestors)], len(
        paths
    )


def outputs(function, tensors, index, scale, upcast=None):
    """o and the gradients of a weighted sum of it."""
    if upcast:
        tensors = [x.detach().to(upcast).requires_grad_() for x in tensors]
    o = function(*tensors, *index, scale)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o)
    grads = torch.autograd.grad((o * weight).sum(), tensors, allow_unused=True)
    return {"o": o} | {
        f"d{n}": torch.zeros_like(x) if g is None else g for n, x, g in zip(NAMES, tensors, grads)
    }


def compare(tensors, index, scale=0.3, tolerance=2e-5):
    have = outputs(tree_attention, tensors, index, scale)
    want = outputs(tree_attention_ref, tensors, index, scale, torch.float64)
    for name, x in have.items():
        torch.testing.assert_close(
            x.double(),
            want[name],
            atol=tolerance,
            rtol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )
