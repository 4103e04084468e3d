"""`aurora-trainer top` against a real trainer's endpoint, and with one side or both away."""

import os
import pty
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from models import make_random_target
from prometheus_client import CollectorRegistry, start_http_server
from rich.text import Text
from serve import free_port
from traffic import write_trace

from aurora_sglang_plugin.metric_families import Exported
from aurora_sglang_plugin.metrics import OF_RANK, of_capture
from aurora_sglang_plugin.serve.accepted_counts import Acceptance
from aurora_sglang_plugin.weights.manifest import target_fingerprint
from aurora_trainer.config import load_trainer_config
from aurora_trainer.daemon import Daemon
from aurora_trainer.drafts.eagle3_init import init_draft
from aurora_trainer.tools.scrape import Figures, Page, fetch
from aurora_trainer.tools.top import server_lines, trainer_lines

VOCAB, HIDDEN = 64, 32


def top(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "aurora_trainer", "top", "--once", "--every", "0.3", *arguments],
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """Port and status file of a trainer in this process that has trained a little."""
    site, port = tmp_path_factory.mktemp("site"), free_port()
    target = make_random_target(site / "target", vocab=VOCAB, hidden=HIDDEN)
    init_draft(target, site / "draft", "random")
    about = dict(target=target_fingerprint(target), vocab=VOCAB, features=3 * HIDDEN, requests=12)
    write_trace(site / "trace", **about)
    settings = {
        "weights.directory": site / "weights", "trainer.model.target": target,
        "trainer.model.draft": site / "draft",
        "trainer.checkpoint.directory": site / "checkpoints", "trainer.metrics.port": port,
        "trainer.metrics.status_file": site / "status.json",
        "trainer.pace.new_positions_per_step": 20,
        "trainer.pace.nice": 0, "trainer.batch.max_positions": 256,
    }  # fmt: skip
    Daemon(load_trainer_config(None, [f"{k}={v}" for k, v in settings.items()])).run_recording(
        site / "trace"
    )
    return SimpleNamespace(port=port, status=site / "status.json")


def server(length: int = 3) -> int:
    """Port of a page that has a server's families, as metrics.py fills them."""
    registry, port = CollectorRegistry(), free_port()
    exported = Exported(OF_RANK | of_capture(length), registry, {"tp_rank": "0", "dp_rank": "0"})
    acceptance = Acceptance(length)
    acceptance.add(7, np.array([1, 4, 4]))
    exported.set("aurora_attached", 1)
    exported.set("aurora_mode", 1, "live")
    exported.set("aurora_draft_version", 7)
    exported.set("aurora_weights_age_seconds", 75)
    exported.set("aurora_link_blocked_seconds", 500)
    exported.count_to("aurora_dropped_messages", {"queue_full": 12})
    exported.load("aurora_accept_length_tokens", acceptance.lengths())
    start_http_server(port, "127.0.0.1", registry)
    return port


def test_both_sides(trainer):
    port = server()
    frame = top("--server", f"http://127.0.0.1:{port}", "--trainer", f"127.0.0.1:{trainer.port}")
    assert frame.returncode == 0, frame.stderr
    assert (
        "1 attached, live   draft v7, 75 s old" in frame.stdout
        and "accept length    3.00" in frame.stdout
    )
    assert "queue_full 12   no trainer takes anything for 8.33 min" in frame.stdout
    assert (
        "optimizer step" in frame.stdout
        and "before" in frame.stdout
        and "loss by depth    1: " in frame.stdout
    )
    # a pipe is not a terminal
    assert "\x1b" not in frame.stdout
    assert max(map(len, frame.stdout.splitlines())) < 140 and len(frame.stdout.splitlines()) < 24


def test_either_side_may_be_absent(trainer):
    frame = top("--server", "127.0.0.1:1", "--status", str(trainer.status))
    assert frame.returncode == 1
    assert (
        "SERVER  absent: http://127.0.0.1:1/metrics: " in frame.stdout
        and "Connection refused" in frame.stdout
    )
    assert f"TRAINER  from {trainer.status}, written" in frame.stdout
    frame = top("--server", f"127.0.0.1:{server()}", "--trainer", "127.0.0.1:1")
    assert (
        frame.returncode == 1 and "TRAINER  absent" in frame.stdout and "draft v7" in frame.stdout
    )
    other = top(
        "--server",
        f"127.0.0.1:{trainer.port}",
        "--status",
        str(trainer.status.with_name("none.json")),
    )
    assert other.returncode == 1 and "TRAINER  absent: status file" in other.stdout


def test_rates_are_between_two_pages(trainer):
    page = fetch([f"127.0.0.1:{trainer.port}"])
    before = Page(
        page.at_s - 10, {n: [(ls, v / 2) for ls, v in series] for n, series in page.samples.items()}
    )
    figures = Figures(before, page)
    tokens = page.total("aurora_trainer_trained_tokens_total")
    assert (
        figures.rate("aurora_trainer_trained_tokens_total") == pytest.approx(tokens / 20)
        and tokens > 0
    )
    assert figures.mean("aurora_trainer_step_seconds") > 0
    assert 0.001 < figures.quantile(0.5, "aurora_trainer_step_seconds") <= 30
    # the process began again: not a negative rate
    anew = Page(page.at_s + 10, before.samples)
    assert Figures(page, anew).rate("aurora_trainer_trained_tokens_total") == 0
    assert any(f"{tokens / 20:,.0f} tokens/s" in line for line in trainer_lines(figures))


def test_how_many_steps_are_drafted_and_what_that_is_worth():
    def page(at_s: float, plain: float, drafting: float) -> Page:
        rounds = [({"steps": s}, n) for s, n in (("cold", 5.0), ("0", plain), ("3", drafting))]
        others = {"aurora_captured_messages_total": 1.0, "aurora_speculation_gain_ratio": 1.234}
        others["aurora_versions_rejected_total"] = 2.0
        samples = {name: [({}, value)] for name, value in others.items()}
        return Page(at_s, samples | {"aurora_decode_rounds_total": rounds})

    lines = server_lines(Figures(page(0, 0, 0), page(10, 25, 75)))
    (line,) = [Text.from_markup(line).plain for line in lines if "rounds " in line]
    assert "plain 25%  3 steps 75%   " in line and "cold" not in line
    assert "plain decoding's 1.23" in line and "rolled back 2" in line


def test_a_server_that_captures_nothing():
    page = Page(
        0.0, {"aurora_attached": [({}, 1.0)], "aurora_draft_version": [({}, 3.0), ({}, 4.0)]}
    )
    lines = server_lines(Figures(page, page))
    assert "v3 and v4" in lines[0] and "capture is off" in lines[1]


def test_what_a_page_says_is_no_markup():
    dropped = {"aurora_dropped_messages_total": [({"cause": "[red]\x1b[2J"}, 3.0)]}
    page = Page(0.0, {"aurora_captured_messages_total": [({}, 3.0)]} | dropped)
    (line,) = [line for line in server_lines(Figures(page, page)) if "dropped" in line]
    assert "[red]\\x1b[2J 3" in Text.from_markup(line).plain


def test_a_page_without_aurora_is_refused():
    port = free_port()
    start_http_server(port, "127.0.0.1", CollectorRegistry())
    with pytest.raises(ValueError, match="no metric of Aurora"):
        fetch([f"127.0.0.1:{port}"])


def test_live_in_a_terminal_until_ctrl_c(trainer):
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "aurora_trainer",
        "top",
        "--every",
        "0.1",
        "--server",
        "127.0.0.1:1",
    ]
    process = subprocess.Popen(
        [*command, "--trainer", f"127.0.0.1:{trainer.port}"], stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    # frames, each over the one before
    while shown.count(b"\x1b[H") < 3:
        shown += os.read(ours, 1 << 16)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    os.close(ours)
    assert (
        b"\x1b[31mabsent\x1b[0m" in shown
        and b"optimizer step" in shown
        and b"Traceback" not in shown
    )
