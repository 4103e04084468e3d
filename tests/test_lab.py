"""The learning lab: a tiny one from traffic to tables, and its statistics on known curves."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import lab
import lab_recordings
import lab_replay
import lab_statistics
import numpy as np
import pytest
from clients import Prompt
from test_demo import ROOT, quick_target  # noqa: F401
from test_demo_real import chatting  # noqa: F401

ARMS = """
[recordings.T]
requests = 30
tokens = 16
domains = "chat code"
[arms.base]
swap_every = 10
draft = ["--draft-vocab", "600"]
settings = ["batch.depth=2", "pace.new_positions_per_step=32", "optimizer.lr=3e-3"]
also_every = [5]
[arms.frozen]
like = "base"
settings = ["pace.enabled=false"]
[arms.reference]
like = "base"
requests_per_step = 8
settings = ["buffer.max_uses=1"]
ideas = ["anchored", "uses_by_need"]
[[stages]]
name = "all"
recording = "T"
seeds = [0]
arms = ["base", "frozen", "reference"]
"""


def curve(rate: float, seeds: int = 3, requests: int = 480, noise: float = 0.0) -> np.ndarray:
    """Walks whose accept length rises with the logarithm of requests, as fast as `rate`, swap by
    swap."""
    generator = np.random.default_rng(7)
    steps = np.full((seeds, requests), 100.0)
    learned = np.arange(requests) // lab_statistics.BLOCK * lab_statistics.BLOCK
    length = 1 + 0.2 * np.log2(1 + rate * learned / 24)
    length = length + noise * generator.standard_normal((seeds, requests))
    return np.stack([steps, steps * length], -1)


def test_half_of_the_requests_is_a_ratio_of_a_half():
    figures = lab_statistics.compare(curve(2, noise=0.05), curve(1, noise=0.05))
    low, high = figures["ratio_interval"]
    assert figures["ratio"] == pytest.approx(0.5, abs=0.06) and low < 0.5 < high < 0.75
    assert figures["change_interval"][0] > 0 and 0.05 < figures["p"] < 0.95
    same = lab_statistics.compare(curve(1, noise=0.05), curve(1, noise=0.05))
    assert same["change"] == 0 and same["ratio"] == pytest.approx(1) and same["p"] == 1
    fast = lab_statistics.compare(curve(4, noise=0.05), curve(1, noise=0.05))
    assert fast["ratio_interval"][1] < 0.5 and fast["p"] == 1 / (1 + lab_statistics.DRAWS)


def test_two_seeds_have_no_interval():
    figures = lab_statistics.compare(curve(2, seeds=2), curve(1))
    assert figures["ratio_interval"] is figures["p"] is None and figures["ratio"] < 0.6


def test_easy_requests_are_nobodys_merit():
    """The blocks of one half are easier by a fifth for everybody; r stays what it is."""
    ease = np.where(np.arange(480) // 24 % 2, 1.2, 1.0)[None, :, None] * [[[0.0, 1.0]]] + [[[1, 0]]]
    slow, fast, frozen = (walks * ease for walks in (curve(1), curve(2), curve(0)))
    plain = lab_statistics.ratio(curve(2), curve(1))
    assert lab_statistics.ratio(fast, slow, lab_statistics.ease_of(frozen)) == pytest.approx(
        plain, rel=0.05
    )
    assert lab_statistics.ratio(fast, slow) != pytest.approx(plain, rel=0.05)


def test_a_length_that_is_never_reached_has_no_ratio():
    assert lab_statistics.ratio(curve(0.1), curve(4)) == math.inf
    assert lab_statistics.ratio(curve(4), curve(0.1)) < 0.1


def test_monotone_pools_what_falls():
    found = lab_statistics.monotone(np.array([1.0, 3.0, 2.0, 4.0]), np.array([1.0, 1.0, 3.0, 1.0]))
    assert found.tolist() == [1.0, 2.25, 2.25, 4.0]
    assert (
        lab_statistics.requests_to(found, 2.25) == 24
        and lab_statistics.requests_to(found, 1.0) == 0
    )
    assert lab_statistics.requests_to(found, 4.1) == math.inf


def test_accept_length_is_of_all_steps_together():
    """A request of many steps weighs more: one definition, that of accept_length.py."""
    walks = np.array([[[100.0, 100.0], [10.0, 40.0]]])
    assert lab_statistics.accept_length(walks) == pytest.approx(140 / 110)


def test_claims_are_corrected_together():
    assert lab_statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx(
        {"a": 0.03, "c": 0.06, "b": 0.06}
    )


def test_what_falls_below_the_frozen_draft_is_found():
    domains = ["chat"] * 60 + ["code"] * 60
    frozen = np.stack([np.full((1, 120), 10.0), np.full((1, 120), 13.0)], -1)
    arm = np.stack([np.full((2, 120), 10.0), np.full((2, 120), 15.0)], -1)
    # a dip right after the change is forgiven, one that lasts is not
    arm[:, 60:80, 1] = 10.0
    by, _ = lab_statistics.lowest(arm, frozen, domains)
    assert by == pytest.approx(0.2)
    arm[1, 60:85, 1] = 10.0
    by, at = lab_statistics.lowest(arm, frozen, domains)
    assert by == pytest.approx(0.2 - 5 / 20 * 0.5) and at == 80


def test_requests_that_end_out_of_order_are_one_shift():
    mixed = ["code", "chat", "code", "chat"]
    domains = ["chat"] * 60 + mixed + ["code"] * 60 + ["chat"] * 40
    assert lab_statistics.shifts(domains) == [(60, 64), (124, 124)]
    walks = np.stack([np.full((1, 164), 10.0), np.full((1, 164), 13.0)], -1)
    first = {at for _, at in lab_statistics.ahead(walks[0], walks[0], [(0, 0), (60, 64)])}
    assert first == {*range(20, 41), *range(84, 145)}
    (begin, end), *more = lab_statistics.shifts(["chat", "code"] * 30)
    assert not more and end - begin > 30, "mixed traffic is one long shift, and has no windows"


def test_no_prompt_is_in_two_recordings():
    given = lab_replay.read_arms(lab_replay.ARMS)["recordings"]
    traffics = [lab_recordings.Traffic.read(name, about) for name, about in given.items()]
    prompts = [Prompt(d, f"{d} {n}") for d in ("chat", "chat_code", "code") for n in range(1500)]
    dealt = lab_recordings.deal(prompts, traffics)
    said = [prompt.text for own in dealt.values() for prompt in own]
    assert len(set(said)) == len(said) == sum(traffic.requests for traffic in traffics)
    shift = [prompt.domain for prompt in dealt["R3"]]
    assert shift == ["chat"] * 120 + ["chat_code"] * 120 + ["chat"] * 120
    with pytest.raises(ValueError, match="needs 200 more prompts of domain 'chat'.* 10 left"):
        lab_recordings.deal(prompts[:10], traffics[:1])


def test_every_arm_of_a_stage_can_be_run(tmp_path):
    """Each is there, and its settings are the trainer's."""
    arms = lab_replay.read_arms(lab_replay.ARMS)
    for stage in arms["stages"]:
        assert stage["recording"] in arms["recordings"]
        for name in stage["arms"]:
            arm = lab_replay.arm_of(arms, name)
            config = lab_replay.configure(arm, tmp_path, tmp_path, str(tmp_path), 3)
            assert config.trainer.pace.seed == 3 and not config.trainer.gate.enabled
            assert all(idea in lab_replay.IDEAS for idea in arm.get("ideas", []))
    arm = lab_replay.arm_of(arms, "ref-1e-3")
    last = lab_replay.configure(arm, tmp_path, tmp_path, str(tmp_path), 0)
    assert last.trainer.optimizer.lr == 1e-3 and last.trainer.buffer.max_uses == 1


def test_from_traffic_to_tables(chatting, tmp_path):  # noqa: F811
    """Recorded on a real server, replayed arm by arm, and not again: what was run has its line."""
    prompts, arms = tmp_path / "prompts.jsonl", tmp_path / "arms.toml"
    said = [
        {"domain": d, "text": f"def f{n}(self, name):"} for n in range(20) for d in ("chat", "code")
    ]
    prompts.write_text("\n".join(map(json.dumps, said)))
    arms.write_text(ARMS)
    target, home = ["--target", chatting], ["--home", tmp_path / "home"]
    shared = ["--arms", arms, "--results", tmp_path / "results"]
    output = tell("record", "--prompts", prompts, *target, *home, *shared)
    assert '"requests": 30' in output
    first = tell("run", "all", *target, *home, *shared)
    assert "3 runs to do" in first
    lines = {line["arm"]: line for line in lab.read_lines(tmp_path / "results" / lab.LINES)}
    assert lines.keys() == {"base", "frozen", "reference"}
    for line in lines.values():
        assert len(line["steps"]) == len(line["tokens"]) == len(line["domains"]) == 30
        assert all(t >= s > 0 for s, t in zip(line["steps"], line["tokens"], strict=True))
    assert lines["frozen"]["updates"] == 0 and lines["reference"]["updates"] == 3
    # half a line, of a run that was killed
    with open(tmp_path / "results" / lab.LINES, "a") as file:
        file.write('{"arm": "bas')
    assert lines["base"]["updates"] > 5
    walked = {arm: list(zip(line["steps"], line["tokens"])) for arm, line in lines.items()}
    # until the first swap the draft is the initial one
    assert walked["base"][:10] == walked["frozen"][:10]
    assert walked["base"][10:] != walked["frozen"][10:]
    # swapped twice as often: the same without learning, and until the first swap
    often = {
        arm: list(zip(line["by_lag"]["5"]["steps"], line["by_lag"]["5"]["tokens"]))
        for arm, line in lines.items()
    }
    assert often["frozen"] == walked["frozen"] and len(often["base"]) == 30
    assert often["base"][:5] == walked["base"][:5] and often["base"][5:] != walked["base"][5:]
    assert "0 runs to do" in tell("run", "all", *target, *home, *shared)
    # other settings are other runs, also if nobody gave the arm another name
    other = tmp_path / "other.toml"
    other.write_text(ARMS.replace("lr=3e-3", "lr=1e-3"))
    found, given = lab.read_lines(tmp_path / "results" / lab.LINES), lab_replay.read_arms(other)
    assert len(list(lab.missing(given["stages"][0], given, found))) == 3
    tell("report", *shared)
    tables = (tmp_path / "results" / "tables.md").read_text()
    assert "requests between swaps" in tables
    assert "| `frozen` | 1 |" in tables and (tmp_path / "results" / "T.png").stat().st_size > 10_000


def tell(*words: object) -> str:
    command = [sys.executable, ROOT / "scripts" / "lab.py", *words]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout
