"""demo-real on a tiny target: chat requests that set nothing, four passes, one summary."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import chat_prompts
import clients
import demo_real
import pytest
import summary
from clients import Prompt, Reply, tokens_per_s
from passes import Pass
from test_demo import ROOT, quick_target  # noqa: F401

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def chatting(quick_target, tmp_path_factory) -> Path:  # noqa: F811
    """The quick target with a chat template and defaults that sample, as Qwen's do."""
    directory = tmp_path_factory.mktemp("chat") / "target"
    shutil.copytree(quick_target, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    defaults = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    defaults["repetition_penalty"] = 1.1
    (directory / "generation_config.json").write_text(json.dumps(defaults))
    return directory


def test_four_passes_stand_side_by_side(chatting, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    said = [
        {"domain": "chat" if n % 2 else "code", "text": f"def f{n}(self, name):"} for n in range(24)
    ]
    prompts.write_text("\n".join(map(json.dumps, said)))
    command = [
        sys.executable,
        ROOT / "scripts" / "demo_real.py",
        "--model",
        chatting,
        "--prompts",
        prompts,
    ]
    command += [
        "--requests",
        "18",
        "--max-tokens",
        "12",
        "--draft-vocab",
        "600",
        "--frozen-every",
        "2",
        "--turns",
        "2",
        "--pause",
        "0.1",
    ]
    run = subprocess.run(
        [*command, "--home", tmp_path], capture_output=True, text=True, cwd=ROOT, env=os.environ
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path / "demo-real" / "summary.json").read_text())
    assert {name: p["requests"] for name, p in found["passes"].items() if "_" not in name} == {
        "live": 18, "frozen": 9, "learned": 6, "plain": 9,
    }  # fmt: skip
    assert all(p["tokens_per_s"] > 0 and p["accept_length"] >= 1 for p in found["passes"].values())
    assert found["passes"]["plain"]["accept_length"] == 1 and found["model"] == "target"
    # What the server sets by itself, a penalty among it, is learned from like anything else.
    status = json.loads((tmp_path / "demo-real" / "status.json").read_text())
    assert status["rows"]["with_target"] > 200 and not status["rows"]["altered"]
    assert status["optimizer_step"] > 0 or status["rows"]["with_target"] < 512
    assert (
        found["sampling"] == "the server's defaults" and found["draft_vocabulary"]["tokens"] == 600
    )
    assert 0 < found["draft_vocabulary"]["covers"] <= 1 and set(found["distinct_4grams"]) == {
        "chat",
        "code",
    }
    assert (tmp_path / "demo-real" / "accept_length.png").stat().st_size > 10_000


def passed(tmp_path: Path, count: int, domain: str = "chat", seconds: float = 1.0) -> Pass:
    result = Pass(tmp_path / "no.log", "all", 8)
    for n in range(count):
        result.replies.append(Reply(n, domain, [n] * 10, 1.5, seconds, seconds * (n + 1)))
    return result


def test_every_demo_has_the_same_keys(tmp_path):
    toy = summary.figures(passed(tmp_path, 50), passed(tmp_path, 9), None, None, shift=30)
    real = summary.figures(
        passed(tmp_path, 20), *[passed(tmp_path, 9) for _ in range(3)], shift=None
    )
    assert toy.keys() == real.keys() and toy["passes"].keys() == real["passes"].keys()
    assert real["accept_length_after_shift"] is None and toy["accept_length_after_shift"] == 1.5


def test_tokens_per_second_are_of_busy_clients(tmp_path):
    """A slow start and a slow end, when some clients have nothing to do, count in no pass."""
    replies = passed(tmp_path, 40).replies
    for reply in replies:
        reply.finished_s += 100 if reply.number >= 2 else 0
        reply.finished_s += 100 if reply.number >= 34 else 0
    assert tokens_per_s(replies, 8) == pytest.approx(10)
    assert tokens_per_s(replies, 8, last=16) == pytest.approx(10)
    assert tokens_per_s(replies[:4], 8) == pytest.approx(40 / 104)
    assert tokens_per_s([], 8) == 0


def test_stretches_of_traffic_share_a_clock():
    def ask(number: int) -> Reply:
        time.sleep(0.01)
        return Reply(number, "chat", [number], 1.0)

    replies = [r for _ in range(2) for r in clients._concurrently(ask, 6, 2, None)]
    finished = [r.finished_s for r in replies]
    assert len(finished) == 12 and max(finished[:6]) < min(finished[6:])
    assert all(0.01 <= r.latency_s < 10 for r in replies)


def test_prompts_are_objects_or_lines(tmp_path):
    path = tmp_path / "prompts"
    path.write_text('{"domain": "code", "text": "a"}\n\n{"text": "b", "id": 3}\n')
    assert chat_prompts.read_prompts(path) == [Prompt("code", "a"), Prompt("chat", "b")]
    path.write_text("What is it?\n\nWhy?\n")
    assert chat_prompts.read_prompts(path) == [
        Prompt("chat", "What is it?"),
        Prompt("chat", "Why?"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n", "is empty"),
        ('{"text": "a"}\n{"text": 3}', ":2: expected"),
        ('{"text": "a"}\nb', ":2: not JSON"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "prompts").write_text(content)
    with pytest.raises(ValueError, match=message):
        chat_prompts.read_prompts(tmp_path / "prompts")


def test_domains_have_equal_shares_in_random_order():
    prompts = [Prompt("a", str(n)) for n in range(90)] + [Prompt("b", str(n)) for n in range(12)]
    chosen, others = chat_prompts.choose(prompts, 20, 4, lambda text: len(text) == 1)
    assert not set(chosen) & set(others)
    domains = [p.domain for p in chosen]
    assert domains.count("a") == domains.count("b") == 10 and domains != ["a", "b"] * 10
    assert len(set(chosen)) == 20 and {len(p.text) for p in chosen} == {1}
    assert (chosen, others) == chat_prompts.choose(prompts, 20, 4, lambda text: len(text) == 1)
    with pytest.raises(ValueError, match="longer"):
        chat_prompts.choose(prompts, 20, 4, lambda text: False)


def test_the_built_in_prompts_are_enough():
    prompts = chat_prompts.built_in_prompts()
    domains = [p.domain for p in prompts]
    assert all(domains.count(domain) > 100 for domain in ("code", "chat_code", "chat"))
    assert len(set(prompts)) > 0.95 * len(prompts)


def test_a_model_that_nobody_has(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="expected a directory, or a name on the hub"):
        demo_real.find_model("nobody/has-this")
