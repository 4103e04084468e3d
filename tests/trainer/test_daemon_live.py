"""The loop in a process of its own, on live traffic: bad input, a kill, a clean end, receiving
alone.
"""

import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest
from metric_pages import values
from serve import free_port
from trainer_process import live, overrides, status_when, traffic

from aurora_trainer.checkpoint import steps
from aurora_trainer.recordings.recording import read_messages


def test_live_bad_input_kill_and_a_clean_end(models, tmp_path):
    with live(models, tmp_path, trainer__buffer__max_uses=1000) as (process, server):
        sent = server.send(traffic(models, 10, "first"))
        for garbage in ([b""], [b"\xff" * 99], [b"x"] * 40, [b"y" * 1000, b"z"]):
            server.socket.send_multipart(garbage)
        bad = list(traffic(models, 1, "bad"))
        server.send([[parts[0].replace(b"verify", b"verifi"), *parts[1:]] for parts in bad[1:3]])
        sent += server.send(traffic(models, 15, "second"))
        status = status_when(tmp_path, lambda s: s.get("received", 0) >= sent and s["steps"] > 8)
        assert sum(status["rejected"].values()) == 6
        status_when(tmp_path, lambda s: s["draft_version"] >= 1)
        process.kill()
    before = steps(tmp_path / "checkpoints")[-1]
    with live(models, tmp_path, trainer__buffer__max_uses=1000) as (process, server):
        server.send(traffic(models, 10, "third"))
        status = status_when(
            tmp_path, lambda s: s["pid"] == process.pid and s["steps"] > before + 2
        )
        assert status["buffer_dropped"]["lost"] > 0
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
        assert process.returncode == 0, log
        assert f"resumed step={before}" in log and "trainer ended" in log
    assert (
        steps(tmp_path / "checkpoints")[-1]
        == json.loads((tmp_path / "status.json").read_text())["steps"]
    )


def test_receiving_without_training(models, tmp_path):
    port, recorded = free_port(), ("--record", str(tmp_path / "recording"))
    settings = dict(trainer__pace__enabled="false", trainer__metrics__port=port)
    with live(models, tmp_path, *recorded, **settings) as (process, server):
        sent = server.send(traffic(models, 5, "e"))
        server.send([[b"garbage"], [b""]])
        status = status_when(
            tmp_path, lambda s: s.get("received", 0) >= sent and sum(s["rejected"].values()) == 2
        )
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            found = values(response.read().decode())
        assert (
            found["aurora_trainer_received_messages_total"] == sent
            and found["aurora_trainer_servers"] == 1
        )
        assert found['aurora_trainer_rejected_messages_total{cause="header"}'] == 2
        recording = list(read_messages(tmp_path / "recording"))
        assert found["aurora_trainer_recorded_messages_total"] == sent == len(recording)
        assert found['aurora_trainer_unrecorded_messages_total{cause="disk"}'] == 0
        assert (
            found["aurora_trainer_recording_bytes"] > found["aurora_trainer_received_bytes_total"]
        )
        assert (
            found["aurora_trainer_received_bytes_total"] > 1000
            and found["aurora_trainer_message_age_seconds"] < 10
        )
        assert found['aurora_trainer_time_seconds_total{activity="wait"}'] > 0
        assert status["steps"] == 0 and status["buffer"]["samples"] + status["gate_held"] == 5
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


def test_nice_is_set_once(models, tmp_path):
    if os.nice(0) > 10:
        pytest.skip("already nicer")
    code = (
        "import os, sys; from aurora_trainer.config import load_trainer_config; "
        "from aurora_trainer.daemon import open_daemon; "
        "open_daemon(load_trainer_config(None, sys.argv[1:])); print(os.nice(0))"
    )
    arguments = overrides(models, tmp_path, trainer__pace__nice=13)
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "13"
