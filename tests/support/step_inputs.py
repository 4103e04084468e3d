"""What a verify step of SGLang's leaves on the device, made up."""

import torch


def make_step(size, nodes, path, columns, dtype, topk=1, rows=None, where="cpu", seed=0):
    """Inputs of aurora_kernels.pack_step.pack_step; chains if `topk` is 1."""
    random = torch.Generator().manual_seed(seed + 31 * size + nodes)

    def ints(*shape, most=1 << 20, kind=torch.int64):
        return torch.randint(most, shape, generator=random, dtype=kind)

    lens = torch.randint(1, path + 1, (size,), generator=random, dtype=torch.int32)
    # ascending nodes, root first; SGLang pads with -1
    index = torch.stack([torch.randperm(nodes - 1, generator=random)[: path - 1].sort().values + 1
                         for _ in range(size)])  # fmt: skip
    index = torch.cat([torch.zeros(size, 1, dtype=torch.int64), index], 1)
    index += torch.arange(size)[:, None] * nodes
    index[torch.arange(path) >= lens[:, None]] = -1
    step = {
        "hidden": torch.randn(size * nodes, columns, generator=random).to(dtype),
        "accept_lens": lens,
        "accept_index": index.int(),
        "positions": ints(size * nodes),
        "draft_tokens": ints(size * nodes),
        "next_tokens": ints(size * nodes, kind=torch.int32),
        "next_token": ints(size * nodes, most=nodes) - 1 if topk > 1 else None,
        "next_sibling": ints(size * nodes, most=nodes) - 1 if topk > 1 else None,
        "rows": None if rows is None else torch.tensor(rows, dtype=torch.int64),
    }
    return {name: t if t is None else t.to(where) for name, t in step.items()}
