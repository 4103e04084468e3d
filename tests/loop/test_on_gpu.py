"""On a GPU, with CUDA graphs, overlap and bfloat16, as fleets serve: token for token what EAGLE3
says with the same draft, and what was captured adds up.
"""

from __future__ import annotations

import pytest
import torch
from drafts import disturb
from rig import START_S, Loop, generate
from serve import Server

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPE = {"topk": 1, "num_steps": 4}
PARAMS = {"max_new_tokens": 64}


@pytest.fixture(scope="module")
def loop(target, taught, tmp_path_factory):
    loop = Loop(tmp_path_factory.mktemp("gpu"), target, taught / "full", **SHAPE)
    yield loop
    loop.stop()


@pytest.fixture(scope="module")
def eagle3(target, taught, tmp_path_factory):
    log = tmp_path_factory.mktemp("eagle3") / "server.log"
    draft = taught / "full"
    with Server(
        target, draft=draft, algorithm="EAGLE3", log=log, timeout_s=START_S, **SHAPE
    ) as server:
        yield server


def test_it_says_what_eagle3_says(loop, eagle3, stream):
    """One request at a time, so that both compute the same batches."""
    prompts = [stream[100 * i : 100 * i + 20 + 7 * i] for i in range(8)]
    expected = [generate(eagle3, [prompt], PARAMS, None)[0] for prompt in prompts]
    found = [loop.generate([prompt], PARAMS)[0] for prompt in prompts]
    assert [a["output_ids"] for a in found] == [a["output_ids"] for a in expected]
    checks = [sum(a["meta_info"]["spec_verify_ct"] for a in b) for b in (found, expected)]
    assert checks[0] == checks[1] < 8 * 64
    log = loop.server.log.read_text(errors="replace")
    assert "aurora attached" in log and "disable_overlap_schedule=True" not in log


def test_a_burst_and_swaps_add_up(loop, stream):
    """More requests than fit, and versions meanwhile: every answer whole, every message counted."""
    prompts = [stream[5000 + 90 * i : 5000 + 90 * i + 16 + i] for i in range(48)]
    with loop.load(prompts, PARAMS) as rounds:
        for seed in range(6):
            version = loop.publish(disturb(loop.draft(0), seed=seed, size=0.02))
            loop.wait_for_version(version)
    assert len(rounds) >= 1
    assert all(len(a["output_ids"]) == 64 for answers in rounds for a in answers)
    loop.quiet()
    metrics = loop.metrics()
    assert metrics["aurora_swaps"] == 6
    dropped = {n: v for n, v in metrics.items() if n.startswith("aurora_dropped")}
    samples = sum(map(len, loop.samples.values()))
    print(f"{len(rounds)} rounds, {samples} samples, dropped {dropped}")
    assert samples >= 48 * len(rounds) - sum(dropped.values())
