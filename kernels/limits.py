"""Limits that kernels, wire and server agree on; imports nothing."""

# nodes of a tree, the root included
MAX_NODES = 64
# kept target logits of a node
MAX_KEPT = 128
# the largest number of e4m3
E4M3_MAX = 448.0
