"""What a real server really exports, over HTTP, is what docs/metrics.md says."""

from __future__ import annotations

import pytest
from metric_pages import documented, exported, values
from rig import wait_until

SERIES = 'dp_rank="0",tp_rank="0"'


def test_documentation_is_what_a_server_exports(chain):
    page = chain.server.get("/metrics")
    assert exported(page, "aurora_") == documented("Server")
    # as the benches read it: what is not there is not 0
    assert chain.server.metric("aurora_attached") == 1
    assert chain.server.metric("aurora_dropped_messages_total") >= 0
    with pytest.raises(RuntimeError, match="exports no aurora_dropped_messages;"):
        chain.server.metric("aurora_dropped_messages")


def test_figures_of_a_server(chain, stream):
    """They follow the traffic: accept lengths as SGLang itself counts them, whether messages are
    sent or not.
    """
    chain.generate([stream[20000:20050]], {"max_new_tokens": 4})
    chain.quiet()
    before = values(chain.server.get("/metrics"))
    prompts = [stream[at : at + 50] for at in range(21000, 22000, 250)]
    metas = [a["meta_info"] for a in chain.generate(prompts, {"max_new_tokens": 32})]
    steps, correct = (
        sum(m[name] for m in metas) for name in ("spec_verify_ct", "spec_num_correct_drafts")
    )

    def grown(name: str, labels: str = SERIES) -> float:
        series = f"{name}{{{labels}}}"
        return values(chain.server.get("/metrics"))[series] - before[series]

    wait_until(
        lambda: grown("aurora_accept_length_tokens_count") >= steps, "the steps in the histogram"
    )
    chain.quiet()
    assert grown("aurora_accept_length_tokens_count") == steps
    assert grown("aurora_accept_length_tokens_sum") == steps + correct
    positions = [f'dp_rank="0",position="{p}",tp_rank="0"' for p in range(1, 5)]
    by_position = [grown("aurora_accepted_drafts_total", labels) for labels in positions]
    assert sum(by_position) == correct and by_position == sorted(by_position, reverse=True)
    verify = 'dp_rank="0",kind="verify",tp_rank="0"'
    assert 0 < grown("aurora_capture_seconds_count", verify) <= steps
    assert 0 < grown("aurora_capture_seconds_sum", verify) < 1
    assert values(chain.server.get("/metrics"))[f"aurora_link_blocked_seconds{{{SERIES}}}"] < 5
