"""What a server decides by itself: how much it drafts, and whether a version may stay; output stays
what it is without speculation, and every sample whole.
"""

from __future__ import annotations

import json
import time

import pytest
import torch
from bench_control import decode_rounds
from drafts import disturb
from rig import Loop, generate, wait_until

from aurora_sglang_plugin.weights.manifest import REJECTED, rejected_versions

PARAMS = {"max_new_tokens": 48}
GOOD = {"reason": "better", "candidate": 3.9, "served": 1.0}


def prompts(stream, first, count=8):
    return [stream[first + 211 * i : first + 211 * i + 12 + 3 * i] for i in range(count)]


def outputs(answers):
    return [answer["output_ids"] for answer in answers]


@pytest.fixture(scope="module")
def adaptive(target, taught, tmp_path_factory):
    yield from serve(tmp_path_factory, target, taught / "reduced", "plugin.speculation.adaptive")


@pytest.fixture(scope="module")
def guarded(target, taught, tmp_path_factory):
    yield from serve(tmp_path_factory, target, taught / "full", "plugin.canary.enabled")


def serve(tmp_path_factory, target, draft, switch):
    folder = tmp_path_factory.mktemp("control")
    loop = Loop(folder, target, draft, topk=1, num_steps=3, settings=[f"{switch}=true"])
    yield loop
    loop.stop()


def rounds(loop) -> dict[str, int]:
    # metrics are a second old at most
    time.sleep(1.2)
    return decode_rounds(loop.server)


def test_steps_follow_what_they_cost(adaptive, plain, stream):
    """A tiny target on a CPU is served fastest without a draft: the server finds that out, and
    tries again for a version that its gate praises. Plain rounds teach as much as others."""
    loop, batch = adaptive, prompts(stream, 60000)
    expected = outputs(generate(plain, batch, PARAMS, None))
    answers = []
    for _ in range(4):
        answers += loop.generate(batch, PARAMS)
        assert outputs(answers[-len(batch) :]) == expected
    before = rounds(loop)
    assert before["3"] >= 16 and len(before) >= 2, before
    # useless, and praised: whatever drafting costs here, it cannot pay
    useless = disturb(loop.draft(0), seed=1, size=9.0)
    version = loop.publish(useless, GOOD | {"candidate": 1.0})
    loop.wait_for_version(version)
    for _ in range(6):
        answers += loop.generate(batch, PARAMS)
        assert outputs(answers[-len(batch) :]) == expected
    cold = rounds(loop)
    assert cold["cold"] > before.get("cold", 0)
    better = loop.publish(loop.draft(0), GOOD)
    loop.wait_for_version(better)
    for _ in range(6):
        answers += loop.generate(batch, PARAMS)
        assert outputs(answers[-len(batch) :]) == expected
    after = rounds(loop)
    # at least measured again
    assert sum(after.get(s, 0) for s in "123") > sum(cold.get(s, 0) for s in "123"), (cold, after)
    assert "Traceback" not in loop.server.log.read_text(errors="replace").split("draft steps")[-1]
    samples = loop.taken([a["rid"] for a in answers])
    mixed = set()
    for answer in answers:
        (sample,) = samples[answer["rid"]]
        assert sample.num_steps == 3
        tokens = answer["output_ids"]
        assert sample.tokens.tolist()[-len(tokens) :] == tokens
        # every generated position has a target, whatever round it came from
        assert (sample.position_node[-len(tokens) + 1 : -1] >= 0).all()
        sizes = torch.diff(sample.tree_first, append=torch.tensor([len(sample.node_token)]))
        mixed.add(tuple(sizes.unique().tolist()))
    assert any(len(sizes) > 1 for sizes in mixed) and (1,) in mixed, mixed
    loop.quiet()


def test_a_bad_version_is_rolled_back(guarded, plain, stream):
    """One that the gate was made to pass: it goes within 200 requests, no server loads it again,
    and a good one after it is served."""
    loop, batch = guarded, prompts(stream, 62000)
    expected = outputs(generate(plain, batch, PARAMS, None))
    for _ in range(3):
        assert outputs(loop.generate(batch, PARAMS)) == expected
    bad = loop.publish(disturb(loop.draft(0), seed=2, size=9.0), GOOD)
    loop.wait_for_version(bad)
    served = 0
    while loop.metrics()["aurora_versions_rejected"] == 0:
        assert outputs(loop.generate(batch, PARAMS)) == expected
        served += len(batch)
        assert served < 200
    assert loop.version() == 0 and loop.metrics()["aurora_versions_suspected"] == 1
    wait_until(lambda: rejected_versions(loop.weights) == {bad}, "REJECTED", 10)
    line = json.loads((loop.weights / REJECTED).read_text())
    assert line["version"] == bad
    for _ in range(2):
        assert outputs(loop.generate(batch, PARAMS)) == expected
    # CURRENT still names it
    assert loop.version() == 0
    good = loop.publish(disturb(loop.draft(0), seed=3, size=0.01), GOOD)
    loop.wait_for_version(good)
    for _ in range(3):
        assert outputs(loop.generate(batch, PARAMS)) == expected
    assert loop.version() == good and loop.metrics()["aurora_versions_rejected"] == 1
    print(f"rolled back after {served} requests")
    loop.quiet()
