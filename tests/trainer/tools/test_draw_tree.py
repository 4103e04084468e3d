"""Trees as text: every node once, under its parent, marked by what verification did with it."""

import re

import numpy as np
import pytest
from trees import NAMED_TREES

from aurora_trainer.tools.draw_tree import draw_tree


def test_a_tree_is_drawn_as_it_is_documented():
    words = ["return", "self", ")", ".", "name", "value", "x"]
    ids = np.array([[1, 6, 2], [3, 2, 6], [6, 3, 4], [4, 5, 6], [0, 1, 2]])
    p = np.array(
        [[0.71, 0.12, 0.05], [0.98, 0.01, 0.0], [0.4, 0.3, 0.2], [0.33, 0.21, 0.1], [0.5, 0.2, 0.1]]
    )
    lines = draw_tree(
        np.array([0, 1, 2, 3, 5]), np.array([-1, 0, 1, 1, -2]), np.array([0, 1, 3]), 3,
        np.array([1, 3, 4]), ids, p,
        lambda token: f'"{words[token]}"', top=2,
    )  # fmt: skip
    # the unused node is not there
    assert lines == [
        '* "return"        target "self" 0.71, "x" 0.12',
        '└─ ✓ "self" 0.71  target "." 0.98, ")" 0.01',
        '   ├─ ✗ ")" 0.01  target "x" 0.40, "." 0.30',
        '   └─ ✓ "." 0.98  target "name" 0.33, "value" 0.21',
        '      └─ + "name" bonus',
    ]


@pytest.mark.parametrize("name", NAMED_TREES)
def test_every_node_stands_below_its_parent(name):
    parents = np.array(NAMED_TREES[name])
    nodes = len(parents)
    ids, p = np.full((nodes, 2), 999), np.full((nodes, 2), 0.25)
    lines = draw_tree(
        np.arange(nodes), parents, np.array([0]), 1, np.array([500]), ids, p, str, top=0
    )
    below = {}
    stack = []
    for line in lines:
        left = re.match(r"[ │├└─]*", line)[0]
        depth, text = len(left) // 3, line[len(left) :]
        if text.startswith("+"):
            assert depth == 1 and text == "+ 500 bonus"
            continue
        node = int(re.match(r"[*✗] (\d+)", text)[1])
        del stack[depth:]
        below[node] = stack[-1] if stack else -1
        stack.append(node)
        assert node == 0 or text.endswith("<0.25")
    assert [below[node] for node in range(nodes)] == parents.tolist()
