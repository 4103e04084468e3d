"""The stand-ins against their oracles: SGLang's own Triton kernels, interpreted, and naive
attention.

The kernels need TRITON_INTERPRET before triton is imported, so this file also runs itself as a
script, once: SGLang grows random trees there, its kernels build and verify them, and everything
comes back as arrays.
"""

import os
import subprocess
import sys
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch

from aurora_sglang_plugin import cpu_engine
from aurora_sglang_plugin.cpu_engine import attention, hashing, slots, tree

CPU_ENV = {
    **os.environ,
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
}
# topk, draft steps, nodes, requests
SHAPES = [
    (1, 1, 2, 3),
    (1, 4, 5, 4),
    (1, 7, 8, 1),
    (2, 1, 3, 2),
    (2, 3, 5, 3),
    (2, 3, 9, 4),
    (2, 5, 6, 2),
    (4, 2, 8, 3),
    (4, 4, 16, 3),
    (4, 5, 33, 1),
    (8, 4, 61, 2),
]


def grow_and_verify_with_sglang(path):
    """The oracle: trees as SGLang grows them (select_top_k_tokens), built and verified by its
    Triton kernels.
    """
    from sglang.kernels.ops.sampling.murmur_hash import murmur_hash32_kernel
    from sglang.kernels.ops.speculative.spec_tree import (
        TreeMaskMode,
        sgl_build_tree_kernel_triton,
        verify_tree_greedy_triton,
    )
    from sglang.srt.speculative.eagle_utils import organize_draft_results
    from sglang.srt.speculative.spec_utils import select_top_k_tokens

    torch.manual_seed(0)
    found = {}
    for case, (topk, steps, n, batch) in enumerate(SHAPES):
        # so small that beams repeat tokens and verification goes deep
        vocab = 3 * topk
        scores, lists = None, ([], [], [])
        for i in range(steps):
            p = torch.rand(batch if i == 0 else batch * topk, topk)
            if case % 2:
                # peaked: a few long branches
                p = p**8
            token = torch.stack([torch.randperm(vocab)[:topk] for _ in range(len(p))])
            _, _, scores, info = select_top_k_tokens(
                i, p, token, torch.zeros(len(p), 1), scores, topk
            )
            for collected, item in zip(lists, info):
                collected.append(item)
        parents, selected, draft = organize_draft_results(*lists, n)
        lens = torch.randint(1, 50, (batch,))
        out = empty_tree(batch, n)
        sgl_build_tree_kernel_triton(
            parents.contiguous(),
            selected,
            lens,
            *out,
            topk,
            steps,
            n,
            tree_mask_mode=TreeMaskMode.QLEN_ONLY,
        )
        candidates = torch.cat([torch.zeros(batch, 1, dtype=torch.long), draft], 1)
        child, sibling = out[3], out[4]
        child = torch.where(
            torch.rand(batch, n) < 0.5, child, sibling.gather(1, child.clamp(min=0))
        )
        # most nodes' target is a first or second child
        agrees = (child >= 0) & (torch.rand(batch, n) < 0.8)
        target = torch.randint(0, vocab, (batch, n))
        target = torch.where(agrees, candidates.gather(1, child.clamp(min=0)), target)
        verified = empty_path(batch, n, steps)
        verify_tree_greedy_triton(*verified, candidates, *out[2:], target)
        arrays = dict(
            parents=parents, selected=selected, lens=lens, candidates=candidates, target=target
        )
        arrays |= dict(zip("mask positions index child sibling".split(), out))
        arrays |= dict(zip("predicts path correct".split(), verified))
        found |= {f"{case}.{name}": value.numpy() for name, value in arrays.items()}

    seed, positions, columns = hash_inputs()
    hashed = torch.empty(len(seed), len(columns), dtype=torch.uint32)
    murmur_hash32_kernel[(len(seed), 1)](
        seed, positions, columns, hashed, *hashed.shape, BLOCK_SIZE=64
    )
    np.savez(path, hashed=hashed.numpy(), **found)


def empty_tree(batch, n):
    links = [torch.full((batch, n), -1) for _ in range(3)]
    return [
        torch.ones(batch * n * n, dtype=torch.bool),
        torch.zeros(batch * n, dtype=torch.long),
        *links,
    ]


def empty_path(batch, n, steps):
    int32 = {"dtype": torch.int32}
    return [
        torch.zeros(batch * n, **int32),
        torch.full((batch, steps + 1), -1, **int32),
        torch.zeros(batch, **int32),
    ]


def hash_inputs():
    generator = torch.Generator().manual_seed(3)
    seed = torch.randint(0, 2**62, (5,), generator=generator)
    return seed, torch.arange(5) * 1000, torch.arange(40)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    path = tmp_path_factory.mktemp("oracle") / "trees.npz"
    env = CPU_ENV | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, __file__, str(path)], check=True, env=env, timeout=300)
    return np.load(path)


@pytest.fixture(
    params=range(len(SHAPES)), ids=lambda i: "topk{}-steps{}-nodes{}-batch{}".format(*SHAPES[i])
)
def case(request, oracle):
    arrays = {
        k.split(".")[1]: torch.from_numpy(oracle[k])
        for k in oracle
        if k.startswith(f"{request.param}.")
    }
    return SHAPES[request.param], arrays


def test_trees_are_built_as_by_sglang(case):
    (topk, steps, n, batch), a = case
    out = empty_tree(batch, n)
    tree.build_tree_kernel_efficient_cpu(
        a["parents"], a["selected"], a["lens"], *out, topk, steps, n, tree.QLEN_ONLY
    )
    for name, mine in zip("mask positions index child sibling".split(), out):
        assert torch.equal(mine, a[name]), name


def test_trees_are_verified_as_by_sglang(case):
    (_, steps, n, batch), a = case
    out = empty_path(batch, n, steps)
    tree.verify_tree_greedy_cpu(
        *out, a["candidates"], a["index"], a["child"], a["sibling"], a["target"]
    )
    for name, mine in zip("predicts path correct".split(), out):
        assert torch.equal(mine, a[name]), name


def test_the_oracle_is_not_trivial(oracle):
    correct = [oracle[f"{case}.correct"] for case in range(len(SHAPES))]
    assert max(c.max() for c in correct) >= 3 and min(c.min() for c in correct) == 0
    branching = [(oracle[f"{case}.sibling"] >= 0).any() for case in range(len(SHAPES))]
    assert [topk > 1 for topk, *_ in SHAPES] == branching


def test_seeded_sampling_hashes_as_sglang(oracle):
    assert np.array_equal(hashing.murmur_hash32_cpu(*hash_inputs()).numpy(), oracle["hashed"])


def test_only_masks_without_the_prefix_are_built():
    with pytest.raises(NotImplementedError, match="QLEN_ONLY"):
        tree.build_tree_kernel_efficient_cpu(
            None, None, None, None, None, None, None, None, 2, 3, 4, 0
        )


# Attention

SLOTS, HEADS, KV_HEADS, D = 300, 6, 2, 16
SCALE = 0.3


class Pool:
    """A KV pool in which requests' slots are scattered, and slots that no request owns hold NaN."""

    def __init__(self, lens):
        torch.manual_seed(1)
        self.lens = torch.tensor(lens)
        self.k = torch.full((SLOTS, KV_HEADS, D), float("nan"))
        self.v = self.k.clone()
        free = torch.randperm(SLOTS)
        self.rows = torch.randperm(8)[: len(lens)]
        # stale entries behind every sequence
        self.table = torch.randint(0, SLOTS, (8, 100), dtype=torch.int32)
        for row, length in zip(self.rows, lens):
            owned, free = free[:length], free[length:]
            self.table[row, :length] = owned.int()
            self.k[owned], self.v[owned] = torch.randn(2, length, KV_HEADS, D)

    def naive(self, request, query, visible):
        """query [Hq, D] attends to the first positions of a request where visible [L] is True."""
        own = self.table[self.rows[request], : self.lens[request]].long()[visible]
        k, v = (x[own].repeat_interleave(HEADS // KV_HEADS, 1) for x in (self.k, self.v))
        weights = torch.softmax(torch.einsum("hd,lhd->hl", query, k) * SCALE, -1)
        return torch.einsum("hl,lhd->hd", weights, v)


def decode(pool, q, k=None, v=None, cache_loc=None):
    out = torch.empty_like(q)
    attention.decode_attention_cpu(
        q, pool.k, pool.v, 1.0, 1.0, out, k, v, cache_loc, None, pool.table, pool.rows, pool.lens,
        SCALE,
        0.0, False, 0, None, None,
    )  # fmt: skip
    return out


def extend(pool, q, counts, mask=None):
    out, counts = torch.empty_like(q), torch.tensor(counts, dtype=torch.int32)
    attention.extend_attention_cpu(
        q, None, None, out, pool.k, pool.v, 1.0, 1.0, pool.table, pool.rows, pool.lens, counts,
        counts.cumsum(0) - counts, int(counts.max()), SCALE, 0.0, False, 0, None, None, mask, True,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("lens", [[1], [7, 1, 40], [33] * 4])
def test_decode_is_attention_to_the_whole_sequence(lens):
    pool = Pool(lens)
    q = torch.randn(len(lens), HEADS, D)
    expected = torch.stack([pool.naive(r, q[r], slice(None)) for r in range(len(lens))])
    torch.testing.assert_close(decode(pool, q), expected)


def test_decode_stores_the_new_token_first():
    pool = Pool([5, 9])
    last = pool.table[pool.rows, pool.lens - 1].long()
    k, v = torch.randn(2, 2, KV_HEADS, D)
    q = torch.randn(2, HEADS, D)
    out = decode(pool, q, k.view(2, -1), v.view(2, -1), last)
    assert torch.equal(pool.k[last], k) and torch.equal(pool.v[last], v)
    torch.testing.assert_close(
        out, torch.stack([pool.naive(r, q[r], slice(None)) for r in range(2)])
    )


@pytest.mark.parametrize(
    "lens, counts",
    [
        ([12], [12]),
        ([12, 7, 20], [12, 2, 5]),
        ([9, 30], [4, 4]),
        ([5, 5], [5, 5]),
        ([90], [90]),
        ([95, 80], [70, 70]),
    ],
)
def test_extend_is_causal(lens, counts):
    pool = Pool(lens)
    q = torch.randn(sum(counts), HEADS, D)
    expected = [
        pool.naive(r, q[sum(counts[:r]) + i], torch.arange(lens[r]) <= lens[r] - counts[r] + i)
        for r in range(len(lens))
        for i in range(counts[r])
    ]
    torch.testing.assert_close(extend(pool, q, counts), torch.stack(expected))


def test_verify_sees_ancestors_only():
    parents = [-1, 0, 0, 1, 1, 2]
    # the first request has no prefix
    n, lens = len(parents), [6, 11, 50]
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i, parent in enumerate(parents):
        mask[i] = mask[parent] if parent >= 0 else False
        mask[i, i] = True
    masks = torch.stack([mask, torch.tril(torch.ones(n, n, dtype=torch.bool)), mask])
    pool = Pool(lens)
    q = torch.randn(len(lens) * n, HEADS, D)
    expected = [
        pool.naive(
            r, q[r * n + i], torch.cat([torch.ones(lens[r] - n, dtype=torch.bool), masks[r, i]])
        )
        for r in range(len(lens))
        for i in range(n)
    ]
    torch.testing.assert_close(extend(pool, q, [n] * 3, masks.flatten()), torch.stack(expected))


def test_what_is_not_built_is_refused():
    pool = Pool([4])
    q = torch.randn(1, HEADS, D)
    with pytest.raises(NotImplementedError, match="sliding windows"):
        attention.decode_attention_cpu(
            q, pool.k, pool.v, 1.0, 1.0, q, None, None, None, None, pool.table, pool.rows,
            pool.lens, SCALE,
            0.0, False, 128, None, None,
        )  # fmt: skip
    with pytest.raises(NotImplementedError, match="QLEN_ONLY"):
        extend(pool, q, [1], torch.ones(5, dtype=torch.bool))


# Slots


def test_slots_are_written_and_read_per_request():
    rows, table = torch.tensor([3, 1]), torch.zeros(4, 10, dtype=torch.int32)
    start, end, owned = (
        torch.tensor([2, 0]),
        torch.tensor([5, 2]),
        torch.tensor([11, 12, 13, 14, 15]),
    )
    slots.assign_req_to_token_pool_cpu(rows, table, start, end, owned, 10)
    assert table[3].tolist() == [0, 0, 11, 12, 13, 0, 0, 0, 0, 0] and table[1, :3].tolist() == [
        14,
        15,
        0,
    ]
    packed = torch.zeros(5, dtype=torch.long)
    slots.assign_extend_cache_locs_cpu(rows, table, start, end, packed, 10)
    assert torch.equal(packed, owned)
    lanes = torch.zeros(8, dtype=torch.long)
    slots.assign_draft_cache_locs_contiguous_cpu(rows, table, torch.tensor([1, 0]), lanes, 10, 2, 2)
    assert lanes.tolist() == [0, 11, 12, 13, 14, 15, 0, 0]


def test_a_lane_is_the_sequence_and_its_own_draft_slots():
    table = torch.arange(60, dtype=torch.int32).view(3, 20)
    lanes = slots.build_draft_decode_metadata_cpu(
        table, torch.tensor([2, 0]), torch.tensor([3, 1]), 2, 3, 20
    )
    assert lanes.tolist() == [
        [40, 41, 42, 43, 44, 45],
        [40, 41, 42, 46, 47, 48],
        [0, 1, 2, 3, 0, 0],
        [0, 4, 5, 6, 0, 0],
    ]


def test_accepted_nodes_move_to_the_front():
    path = torch.tensor([[0, 2, -1], [3, -1, -1]])
    front = torch.full((4,), -7)
    slots.fill_accept_out_cache_loc_cpu(path, torch.tensor([10, 11, 12, 13, 14, 15]), front)
    assert front.tolist() == [10, 12, 13, -7]
    bonus = torch.zeros(2, dtype=torch.int32)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32)
    slots.fill_bonus_tokens_cpu(tokens, torch.tensor([2, 1], dtype=torch.int32), bonus, 3)
    assert bonus.tolist() == [2, 4]
    ids = torch.tensor([1, 2, 3, 4, 5])
    slots.rotate_input_ids_cpu(
        ids, torch.tensor([0, 3]), torch.tensor([3, 2]), torch.tensor([[8], [9]])
    )
    assert ids.tolist() == [2, 3, 8, 5, 9]


def test_kv_rows_move_by_address_and_overlap_safely():
    layers = [torch.randn(20, 2, 3), torch.randn(20, 5).to(torch.bfloat16)]
    before = [layer.clone() for layer in layers]
    source, target = torch.tensor([4, 5, 9]), torch.tensor([3, 4, 5])
    addresses = torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.uint64)
    strides = torch.tensor([layer[0].numel() * layer.element_size() for layer in layers])
    slots.copy_all_layer_kv_cache_cpu(addresses, strides, target, source)
    for layer, old in zip(layers, before):
        expected = old.clone()
        expected[target] = old[source]
        assert torch.equal(layer, expected)


# Installation


def test_nothing_is_installed_unless_asked(monkeypatch):
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.delitem(sys.modules, "sgl_kernel", raising=False)
    assert cpu_engine.install() is False and "sgl_kernel" not in sys.modules


@pytest.mark.parametrize("has_gpu, real_one", [(True, False), (False, True)])
def test_a_gpu_or_a_real_package_is_left_alone(monkeypatch, tmp_path, has_gpu, real_one):
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    monkeypatch.delitem(sys.modules, "sgl_kernel", raising=False)
    monkeypatch.setitem(sys.modules, "torchvision", type(sys)("torchvision"))
    sys.modules["torchvision"].__spec__ = ModuleSpec("torchvision", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    if real_one:
        (tmp_path / "sgl_kernel").mkdir()
        (tmp_path / "sgl_kernel/__init__.py").write_text("REAL = True\n")
        monkeypatch.syspath_prepend(str(tmp_path))
    assert cpu_engine.install() is False
    # the real one is found, and left for SGLang to import
    assert "sgl_kernel" not in sys.modules


def test_a_child_process_of_sglang_finds_the_stand_ins():
    """Through the entry point alone: a spawned scheduler imports this module before any general
    plugin is loaded.
    """
    code = (
        "import sglang.srt.mem_cache.allocation, sgl_kernel, torch, sys\n"
        "assert sgl_kernel.AURORA_STAND_IN and not hasattr(torch.ops.sgl_kernel,"
        " 'convert_weight_packed')\n"
        "from transformers.utils import is_torchvision_available\n"
        "assert not is_torchvision_available()\n"
        # general plugins make SGLang's own verification sample, unless all of the batch is greedy
        "from sglang.srt.plugins import load_plugins\n"
        "load_plugins()\n"
        "from sglang.srt.speculative import eagle_utils\n"
        "from aurora_sglang_plugin.cpu_engine import sampling\n"
        "for name in ('top_k_renorm_prob', 'top_p_renorm_prob',"
        " 'tree_speculative_sampling_target_only',\n"
        "             'chain_speculative_sampling_triton'):\n"
        "    assert getattr(eagle_utils, name) is getattr(sampling, name), name\n"
        "facts = dict(is_cpu=True, is_hip=False, is_xpu=False, use_rejection_sampling=False)\n"
        "assert eagle_utils._verify_uses_greedy(is_all_greedy=True, **facts)\n"
        "assert not eagle_utils._verify_uses_greedy(is_all_greedy=False, **facts)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=CPU_ENV, timeout=300)


if __name__ == "__main__":
    grow_and_verify_with_sglang(sys.argv[1])
