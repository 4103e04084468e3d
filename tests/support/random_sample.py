"""Random samples that are consistent as assembly makes them: trees, accepted paths, positions and
their targets.
"""

import torch

from aurora_trainer.intake.sample import Sample


def random_sample(
    seed,
    *,
    prompt_len=4,
    verifies=5,
    num_steps=3,
    topk=2,
    width=4,
    vocab=50,
    kept=6,
    features=48,
    start=0,
    altered=0.0,
) -> Sample:
    """`width` nodes at each depth 1..num_steps of every tree; `start` > 0 cuts that many positions
    off the front.
    """
    g = torch.Generator().manual_seed(seed)

    def integer(high):
        return int(torch.randint(high, (1,), generator=g))

    # the last is the first root
    tokens = [integer(vocab) for _ in range(prompt_len + 1)]
    position_node = [-1] * prompt_len
    node = {n: [] for n in ("token", "parent", "depth", "position", "accepted", "altered")}
    tree_first = []
    for _ in range(verifies):
        root = len(tokens) - 1
        accept = integer(num_steps + 1)
        # accepted tokens, then the bonus token
        true = [integer(vocab) for _ in range(accept + 1)]
        judged_otherwise = bool(torch.rand(1, generator=g) < altered)
        tree_first.append(len(node["token"]))
        levels = [[len(node["token"])]]
        path = []

        def add(token, parent, depth, accepted, root=root, judged_otherwise=judged_otherwise):
            values = (token, parent, depth, root - 1, accepted, judged_otherwise)
            for name, value in zip(node, values, strict=True):
                node[name].append(value)
            return len(node["token"]) - 1

        path.append(add(tokens[root], -1, 0, True))
        for d in range(1, num_steps + 1):
            levels.append([])
            for n in range(width if topk > 1 else 1):
                on_path = d <= accept and n == 0
                parent = path[d - 1] if on_path else levels[d - 1][integer(len(levels[d - 1]))]
                # a token of its own: never on the path
                token = true[d - 1] if on_path else vocab + len(node["token"])
                levels[d].append(add(token % vocab if not on_path else token, parent, d, on_path))
            if d <= accept:
                path.append(levels[d][0])
        position_node.extend([-1] * (root + accept - len(position_node)))
        for d, n in enumerate(path):
            position_node[root - 1 + d] = n
        tokens.extend(true)
    positions = len(tokens) - 1
    position_node.extend([-1] * (positions - len(position_node)))
    m = len(node["token"])
    logits = torch.randn(m, vocab, generator=g) * 2
    top, ids = logits.topk(kept, -1)
    keep = slice(start, None)
    return Sample(
        request=f"r{seed}", session="e", attempt=0, start=start, prompt_len=prompt_len,
        reason="stop",
        time_ns=0,
        tokens=torch.tensor(tokens)[keep],
        features=torch.randn(positions, features, generator=g)[keep],
        position_version=torch.zeros(positions, dtype=torch.int32)[keep],
        position_node=torch.tensor(position_node)[keep],
        node_token=torch.tensor(node["token"]).long(),
        node_parent=torch.tensor(node["parent"]).long(),
        node_depth=torch.tensor(node["depth"]).long(),
        node_position=torch.tensor(node["position"]).long() - start,
        node_accepted=torch.tensor(node["accepted"]).bool(),
        node_altered=torch.tensor(node["altered"]).bool(),
        topk_ids=ids, topk_logits=top, logsumexp=logits.logsumexp(-1),
        tree_first=torch.tensor(tree_first).long(),
        tree_version=torch.zeros(len(tree_first), dtype=torch.int32), num_steps=num_steps,
        topk=topk,
    )  # fmt: skip
