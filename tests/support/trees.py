"""Named trees, shared by all tests: `parents` with -1 for the root, parents before children."""

import random

ROOT_ONLY = [-1]
CHAIN = [-1, 0, 1, 2, 3]
STAR = [-1, 0, 0, 0, 0, 0]
RAGGED = [-1, 0, 0, 1, 1, 2, 3, 3, 6]


def random_tree(nodes: int, seed: int, max_depth: int = 8) -> list[int]:
    draw = random.Random(seed)
    parents, depth = [-1], [0]
    while len(parents) < nodes:
        parent = draw.randrange(len(parents))
        if depth[parent] < max_depth:
            parents.append(parent)
            depth.append(depth[parent] + 1)
    return parents


NAMED_TREES = {
    "root_only": ROOT_ONLY,
    "chain": CHAIN,
    "star": STAR,
    "ragged": RAGGED,
    "random_61": random_tree(61, seed=7),
}


def depths(parents: list[int]) -> list[int]:
    result: list[int] = []
    for parent in parents:
        result.append(0 if parent < 0 else result[parent] + 1)
    return result
