"""The examples are configurations that both sides take, differ only where they must, and their
figures are `plan`'s.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import tomllib
from pathlib import Path

import pytest
from print_docs import MODELS

from aurora_sglang_plugin.config import ServerConfig, load
from aurora_trainer.config import TrainerFile

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
FILES = sorted(EXAMPLES.glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_both_sides_take_it(path):
    config = load(TrainerFile, path)
    assert load(ServerConfig, path).link == config.link
    assert config.trainer.model.compute_dtype == "bfloat16"
    # the commands in its header name it
    assert f"docs/examples/{path.name}" in path.read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_its_commands_say_what_they_need(path):
    """None of them can run here."""
    lines = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#   ")]
    commands = [c for c in "\n".join(lines).replace("\\\n", "").splitlines() if not c.endswith(":")]
    assert len(commands) >= 3
    for command in commands:
        assert re.search(r"# needs (a GPU|the weights)$", command), command
        assert re.search(
            r"\b(aurora-trainer (init-draft|import|check|run)|sglang.launch_server) ", command
        ), command


def test_every_model_has_its_numbers_and_its_place_in_the_table():
    models = {path.stem for path in (EXAMPLES / "models").glob("*.json")}
    assert models == {stem for stem, _ in MODELS.values()} <= {path.stem for path in FILES}


def leaves(data: dict, prefix: str = ""):
    for key, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_models_differ_only_where_they_must():
    base = tomllib.loads((EXAMPLES / "qwen3-8b.toml").read_text())
    allowed = {"trainer.checkpoint.every_s", "trainer.publish.every_s"}
    for stem, _ in MODELS.values():
        other = set(leaves(tomllib.loads((EXAMPLES / f"{stem}.toml").read_text())))
        extra = other ^ set(leaves(base))
        assert extra <= allowed or stem == "kimi-k2.5" and extra <= allowed | {
            "plugin.publish.queue_bytes", "trainer.buffer.max_bytes"
        }  # fmt: skip


@pytest.mark.parametrize("stem", [stem for stem, _ in MODELS.values()])
def test_sglang_captures_features_for_it(stem):
    """By reading the installed SGLang: the class of the target's architecture has EAGLE3's hook."""
    (architecture,) = json.loads((EXAMPLES / "models" / f"{stem}.json").read_text())[
        "architectures"
    ]
    models = Path(importlib.util.find_spec("sglang").origin).parent / "srt" / "models"
    found = [
        p.read_text()
        for p in models.glob("*.py")
        if re.search(rf"^class {architecture}\b", p.read_text(), re.M)
    ]
    assert len(found) == 1
    body = re.split(rf"^class {architecture}\b", found[0], maxsplit=1, flags=re.M)[1]
    body = re.split(r"^class ", body, maxsplit=1, flags=re.M)[0]
    assert "def set_eagle3_layers_to_capture" in body


def test_nothing_here_is_of_this_machine():
    for path in FILES:
        assert os.environ.get("HOME", "/root") not in path.read_text()
