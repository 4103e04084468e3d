"""MurmurHash3 of (seed, position, column), by which SGLang draws seeded samples; as its Triton
kernel computes it.
"""

import torch

MASK = 0xFFFFFFFF


def murmur_hash32_cpu(seed, positions, col_indices):
    """Hash every (seed[r], positions[r]) with every col_indices[c]; returns uint32 [R, C]."""
    seed, positions = seed.to(torch.int64)[:, None], positions.to(torch.int64)[:, None]
    h = torch.zeros_like(seed)
    for block in (
        seed & MASK,
        (seed >> 32) & MASK,
        positions & MASK,
        col_indices.to(torch.int64)[None, :] & MASK,
    ):
        k = _rotate((block * 0xCC9E2D51) & MASK, 15)
        h = h ^ ((k * 0x1B873593) & MASK)
        h = (_rotate(h, 13) * 5 + 0xE6546B64) & MASK
    # bytes hashed
    h = h ^ 16
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & MASK
    return (h ^ (h >> 16)).to(torch.uint32)


def _rotate(x, bits):
    return ((x << bits) | (x >> (32 - bits))) & MASK
