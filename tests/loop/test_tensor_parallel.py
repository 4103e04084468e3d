"""Two tensor-parallel ranks of a real server: right output, swaps and rollbacks together, and each
rank reports what is its own.

Takes a minute and 4 GB more, so it runs by `make test-ranks`.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager

import pytest
import torch
from drafts import disturb, teach
from metric_pages import documented, exported, values
from models import make_random_target
from rig import Loop, wait_until
from transformers import AutoModelForCausalLM

from aurora_sglang_plugin.weights.manifest import REJECTED, rejected_versions
from aurora_trainer.drafts.eagle3_init import init_draft

pytestmark = pytest.mark.skipif(
    os.environ.get("AURORA_TENSOR_PARALLEL") != "1", reason="a longer test: make test-ranks"
)
VOCAB, NEW = 512, 24
PROMPTS = [[(7 * n + 3 * i) % (VOCAB - 2) for i in range(30)] for n in range(4)]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Heads of a number that two ranks share: with others SGLang pads them on a CPU, and versions
    are refused.
    """
    folder = tmp_path_factory.mktemp("target")
    return make_random_target(folder, vocab=VOCAB, heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def model(target):
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def loop(target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    draft = init_draft(target, folder / "draft", "target")
    # not said to be untrained: it drafts from the start
    draft.save(folder / "draft")
    with serve(folder, target, "plugin.speculation.adaptive=true") as loop:
        yield loop


@contextmanager
def serve(folder, target, setting: str):
    loop = Loop(
        folder,
        target,
        folder / "draft",
        topk=1,
        num_steps=4,
        args=["--tp-size", "2", "--skip-tokenizer-init"],
        # one group of processors for each rank
        env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
        settings=[setting, "plugin.canary.enabled=true"],
    )
    yield loop
    loop.stop()


def by_rank(loop: Loop, name: str) -> list[float | None]:
    found = values(loop.server.get("/metrics"))
    return [found.get(f'{name}{{dp_rank="0",tp_rank="{rank}"}}') for rank in "01"]


def check_output(loop: Loop, model) -> None:
    answers = loop.generate(PROMPTS, {"max_new_tokens": NEW})
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = (
            model(torch.tensor([prompt + answer["output_ids"]]))
            .logits[0, len(prompt) - 1 : -1]
            .argmax(-1)
        )
        assert tokens.tolist() == answer["output_ids"]


def test_each_rank_is_right_and_nothing_counts_twice(loop, model):
    check_output(loop, model)
    assert exported(loop.server.get("/metrics"), "aurora_") == documented("Server")
    assert by_rank(loop, "aurora_attached") == [1, 1]
    ledger = loop.quiet()
    # rank 0 alone captures
    assert by_rank(loop, "aurora_captured_messages_total") == [ledger["captured"], None]
    for _ in range(2):
        draft = loop.draft(0)
        with torch.no_grad():
            draft.norm.weight.mul_(1 + 0.01 * torch.rand_like(draft.norm.weight))
        version = loop.publish(draft)

        def both_draft_with(version: int = version) -> bool:
            loop.generate(PROMPTS, {"max_new_tokens": NEW})
            return by_rank(loop, "aurora_draft_version") == [version, version]

        wait_until(both_draft_with, lambda: f"both ranks to swap: {loop.metrics()}", 40)
    check_output(loop, model)
    # ranks that drew otherwise would wait for each other, or say what no model says
    sampled = loop.generate(PROMPTS * 3, {"max_new_tokens": NEW, "temperature": 0.8, "top_p": 0.9})
    assert all(len(answer["output_ids"]) == NEW for answer in sampled)
    check_output(loop, model)
    assert (
        by_rank(loop, "aurora_swaps_total")
        == by_rank(loop, "aurora_swap_stall_seconds_count")
        == [2, 2]
    )
    # an untrained draft: both ranks changed their steps, at the same rounds
    time.sleep(1.2)
    found = values(loop.server.get("/metrics"))
    names = [name for name in found if name.startswith("aurora_decode_rounds_total")]
    rounds = {
        rank: {n.split('steps="')[1].split('"')[0]: found[n] for n in names if f'"{rank}"}}' in n}
        for rank in "01"
    }
    assert rounds["0"] == rounds["1"] and rounds["0"]["cold"] and rounds["0"]["4"]
    ledger = loop.quiet()
    assert ledger["lost"] == ledger["rejected"] == 0 and ledger["captured"] > 0


def test_ranks_roll_back_together(target, model, tmp_path):
    """Neither asks the other: both run the same test on the same integers. Ranks that drafted with
    different versions would propose different tokens, and say what no model says."""
    said = model.generate(
        torch.tensor(PROMPTS), max_new_tokens=NEW, do_sample=False, pad_token_id=VOCAB - 1
    )
    draft = init_draft(target, tmp_path / "draft", "target")
    teach(draft, model, said.flatten().tolist() * 4).save(tmp_path / "draft")
    with serve(tmp_path, target, "plugin.speculation.adaptive=false") as loop:
        for _ in range(4):
            check_output(loop, model)
        version = loop.publish(disturb(loop.draft(0), seed=2, size=9.0))
        served = 0
        while by_rank(loop, "aurora_versions_rejected_total") != [1, 1]:
            check_output(loop, model)
            served += len(PROMPTS)
            assert served < 400, loop.metrics()
        assert by_rank(loop, "aurora_draft_version") == [0, 0]
        assert by_rank(loop, "aurora_swaps_total") == [2, 2]
        wait_until(lambda: rejected_versions(loop.weights) == {version}, "REJECTED", 10)
        # a rank wrote it once
        assert len((loop.weights / REJECTED).read_text().splitlines()) == 1
        for _ in range(2):
            check_output(loop, model)
        loop.quiet()
