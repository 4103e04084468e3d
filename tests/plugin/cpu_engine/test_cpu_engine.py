"""The stand-ins' trees and hashes against their oracle, SGLang's own Triton kernels, interpreted;
and when the stand-ins are installed.

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
from aurora_sglang_plugin.cpu_engine import hashing, tree

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
