"""`aurora-trainer eval` of the draft that serves says what the server itself measured, on traffic
that `aurora-trainer record` took from the wire."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
from children import TRAINER
from rig import wait_until
from test_replay import cut

from aurora_sglang_plugin.weights.manifest import version_name
from aurora_trainer.recordings.recording import read_messages

REQUESTS, TOKENS = 12, 96


def recorder(loop, out: Path) -> subprocess.Popen:
    sets = [
        f"link.endpoint={loop.link.endpoint}", f"trainer.model.target={loop.target}",
        f"trainer.model.draft={loop.initial_draft}",
    ]  # fmt: skip
    command = [*TRAINER, "record", "--out", str(out), *(a for s in sets for a in ("--set", s))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert "recorder ready" in process.stderr.readline()
    return process


@pytest.mark.parametrize("name", ["chain", "tree"])
def test_eval_of_the_draft_that_serves(name, request, stream, tmp_path):
    loop = request.getfixturevalue(name)
    version, out = loop.settled_version(), tmp_path / "recording"
    loop.deafen()
    try:
        process = recorder(loop, out)
    except BaseException:
        # the tests after this one share the server
        loop.listen()
        raise
    try:
        prompts = cut(stream, 30000, [20 + 7 * n for n in range(REQUESTS)])
        params = [
            {
                "max_new_tokens": TOKENS,
                "custom_params": {"aurora_domain": "odd" if n % 2 else "even"},
            }
            for n in range(REQUESTS)
        ]
        answers = loop.generate(prompts, params)

        def ended() -> bool:
            found = [m.header for _, m in read_messages(out)] if any(out.glob("*.trace")) else []
            return sum(h.kind == "end" for h in found) == REQUESTS

        wait_until(ended, "the ends of all requests in the recording", every_s=0.3)
    finally:
        process.send_signal(signal.SIGTERM)
        log = process.communicate(timeout=30)[1]
        loop.listen()
    assert process.returncode == 0 and "rejected=0 not_recorded_full=0 not_recorded_disk=0" in log

    draft = loop.weights / version_name(version) if version else loop.initial_draft
    command = [
        *TRAINER,
        "eval",
        str(draft),
        str(out),
        "--target",
        str(loop.target),
        "--json",
        str(tmp_path / "e.json"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "e.json").read_text())

    # SGLang's own figures, and those of every step on the wire.
    steps = sum(a["meta_info"]["spec_verify_ct"] for a in answers)
    correct = sum(a["meta_info"]["spec_num_correct_drafts"] for a in answers)
    verify = [m for _, m in read_messages(out) if m.header.kind == "verify"]
    rows = sum(len(m.header.requests) for m in verify)
    tokens = sum(int(m.arrays["feature_lens"].sum()) for m in verify)
    of = figures["domains"]["all"]
    walk, live = next(iter(of["drafts"].values())), of["live"]
    print(result.stdout)
    print(
        f"{name}: SGLang {1 + correct / steps:.4f} over {steps} steps, wire {tokens / rows:.4f}"
        f" over {rows}, live but for last steps {live['tokens'] / live['steps']:.4f} over"
        f" {live['steps']}, eval {walk['tokens'] / walk['steps']:.4f} over {walk['steps']}"
    )
    assert {n: d["requests"] for n, d in figures["domains"].items()} == {
        "all": 12,
        "even": 6,
        "odd": 6,
    }
    assert figures["recorded"]["draft_versions"] == [version]
    # a last path may run past max_tokens
    assert rows == steps and abs(tokens - steps - correct) <= 4 * REQUESTS
    # The very steps: the same tokens, but for ties of probabilities and a prompt that hit the cache
    # by chance.
    assert (walk["steps"], walk["tokens"]) == pytest.approx(
        (live["steps"], live["tokens"]), rel=0.005
    )
    # What is left out, the last steps, is the only difference to SGLang's own figure.
    assert live["steps"] >= rows - 5 * REQUESTS
    assert walk["tokens"] / walk["steps"] == pytest.approx(1 + correct / steps, rel=0.03)
    chain = walk["as_chains"][-1]["accept_length"]["mean"]
    if name == "tree":
        # a chain of it accepts less
        assert chain < 0.95 * walk["accept_length"]["mean"]
    else:
        assert chain == walk["accept_length"]["mean"]
