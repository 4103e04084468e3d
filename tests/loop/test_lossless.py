"""Nothing changes the output: token for token what the target says without speculation, before,
across and after swaps under load, with the receiver up, gone and killed; and the target's
parameters are what they were, to the bit.
"""

from __future__ import annotations

import signal
from functools import partial

import pytest
from drafts import disturb
from rig import checksums, generate, receiver_process, wait_until

# in each of three phases
SWAPS = 8
PARAMS = {"max_new_tokens": 48}


@pytest.mark.parametrize("name", ["chain", "tree"])
def test_swaps_under_load(name, request, plain, stream):
    loop = request.getfixturevalue(name)
    batch = [stream[30000 + 131 * i : 30000 + 131 * i + 8 + 13 * i] for i in range(10)]
    expected = [a["output_ids"] for a in generate(plain, batch, PARAMS, None)]

    def right(answers):
        return [a["output_ids"] for a in answers] == expected

    assert right(loop.generate(batch, PARAMS))
    target, draft = checksums(loop.server, "target"), checksums(loop.server, "draft")
    assert any("embed_tokens" in tensor for tensor in target)
    swaps = loop.metrics()["aurora_swaps"]
    base = loop.draft(0)
    seen = 0

    def swapped(line):
        return line in loop.server.log.read_text(errors="replace")

    def swap(times):
        """Publish drafts, bad ones among them, each when the one before is served."""
        nonlocal seen
        for i in range(times):
            version = loop.publish(
                disturb(loop.draft(0), seed=1000 + seen, size=(0.02, 0.5)[i % 2])
            )
            seen += 1
            wait_until(
                partial(swapped, f"draft swapped version={version} "), f"swap to {version}", 30
            )

    with loop.load(batch, PARAMS) as rounds:
        swap(SWAPS)
        loop.deafen()
        swap(SWAPS)
        process = receiver_process(loop)
        try:
            swap(SWAPS // 2)
            process.send_signal(signal.SIGKILL)
            swap(SWAPS // 2)
        finally:
            process.kill()
            process.wait()
            loop.listen()
    assert len(rounds) >= 2 and all(map(right, rounds)), (
        f"{sum(map(right, rounds))} of {len(rounds)} rounds are right"
    )
    assert right(loop.generate(batch, PARAMS))
    wait_until(
        lambda: loop.metrics()["aurora_swaps"] - swaps == 3 * SWAPS >= 20, "swaps in the metrics", 5
    )
    loop.drain()
    across = max(len(s.position_version.unique()) for found in loop.samples.values() for s in found)
    assert across >= 3, "no request ran across swaps"

    assert checksums(loop.server, "target") == target
    after = checksums(loop.server, "draft")
    assert {n: c for n, c in after.items() if "embed" in n} == {
        n: c for n, c in draft.items() if "embed" in n
    }
    assert after != draft

    # what accepts something, for those who come after
    loop.wait_for_version(loop.publish(base))
    print(f"{name}: {len(rounds)} rounds of {len(batch)} requests across {3 * SWAPS} swaps")
