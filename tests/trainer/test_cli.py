"""The command line: instant help, clear errors, one file for both sides, and docs that list every
setting.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import make_random_draft, make_random_target
from print_docs import as_toml
from pydantic import BaseModel
from typer.testing import CliRunner

from aurora_sglang_plugin.config import ServerConfig, load
from aurora_trainer.cli import app

DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    make_random_target(directory / "target", vocab=64, hidden=32)
    make_random_draft(directory / "draft", directory / "target", aux_layer_ids=[0, 2, 4])
    return directory


def write_config(directory: Path, models: Path, extra: str = "") -> Path:
    path = directory / "aurora.toml"
    path.write_text(f"""
[link]
endpoint = "ipc://{directory}/link"
[weights]
directory = "{directory}/weights"
[plugin.capture]
sample_rate = 0.5
[trainer.model]
target = "{models}/target"
draft = "{models}/draft"
[trainer.checkpoint]
directory = "{directory}/checkpoints"
{extra}
""")
    return path


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


COMMANDS = ("run", "record", "replay", "eval", "inspect", "check", "init-draft")


@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)])
def test_help_is_instant(arguments):
    """In processor time, which a busy machine does not stretch much; an import of torch alone takes
    over a second.
    """
    code = (
        f"import sys, time; from aurora_trainer.cli import app; app({arguments + ['--help']!r},"
        " standalone_mode=False); print(set(sys.modules) & {'torch', 'sglang', 'transformers',"
        " 'zmq', 'numpy'}, time.process_time())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    *usage, last = result.stdout.rstrip().splitlines()
    heavy, seconds = last.split()
    assert heavy == "set()" and "Usage" in "".join(usage) and float(seconds) < 0.5


def test_check_passes_and_says_what_it_checked(models, tmp_path):
    result = run("check", "--config", str(write_config(tmp_path, models)))
    assert result.exit_code == 0, result.output
    for what in (
        "configuration",
        "target",
        "draft",
        "endpoint",
        "weights directory",
        "sglang",
        "plugin",
    ):
        assert re.search(rf"^ok +{what}:", result.output, re.M), result.output


@pytest.mark.parametrize(
    ("override", "where", "remedy"),
    [
        ("trainer.model.target=/nowhere", "target", "nowhere"),
        ("trainer.model.draft=/nowhere", "draft", "init-draft"),
        ("link.endpoint=ipc:///nowhere/link", "endpoint", "ipc"),
        ("weights.directory=/proc/weights", "weights directory", "proc"),
    ],
)
def test_check_fails_on_what_it_names(models, tmp_path, override, where, remedy):
    result = run("check", "--config", str(write_config(tmp_path, models)), "--set", override)
    assert result.exit_code == 1
    line = next(line for line in result.output.splitlines() if line.startswith(f"FAILED  {where}:"))
    assert remedy in line


def test_check_finds_aux_layers_that_no_server_captures(models, tmp_path):
    make_random_draft(tmp_path / "draft", models / "target", aux_layer_ids=[0, 2, 5])
    override = f"trainer.model.draft={tmp_path}/draft"
    result = run("check", "-c", str(write_config(tmp_path, models)), "--set", override)
    assert result.exit_code == 1 and "FAILED  draft" in result.output


def test_check_finds_a_draft_of_the_wrong_shape(models, tmp_path):
    make_random_target(tmp_path / "wider", vocab=64, hidden=64)
    make_random_draft(tmp_path / "draft", tmp_path / "wider", aux_layer_ids=[0, 2, 4])
    result = run(
        "check",
        "-c",
        str(write_config(tmp_path, models)),
        "--set",
        f"trainer.model.draft={tmp_path}/draft",
    )
    assert result.exit_code == 1 and "FAILED  draft" in result.output


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("[trainer.gate]\nzz = 1", "trainer.gate.zz"),
        ("[trainer.gate]\nz = -1", "trainer.gate.z"),
        # a section twice
        ("[plugin.capture]\nsample_rate = 2", "aurora.toml"),
        ("[oops]\n", "oops"),
        ("not toml", "aurora.toml"),
    ],
)
def test_a_bad_file_is_one_clear_message(models, tmp_path, extra, said):
    result = run("run", "--config", str(write_config(tmp_path, models, extra)))
    assert result.exit_code == 2 and said in result.output
    assert "Traceback" not in result.output and not isinstance(result.exception, ValueError)


def test_overrides_win_and_are_checked(models, tmp_path):
    path = str(write_config(tmp_path, models))
    assert run("check", "-c", path, "--set", "plugin.capture.sample_rate=1.5").exit_code == 2
    assert run("check", "-c", path, "--set", "nonsense").exit_code == 2
    # trainer.model.target has no default
    assert run("check").exit_code == 2


def test_the_server_reads_the_same_file(models, tmp_path):
    config = load(ServerConfig, write_config(tmp_path, models, "[trainer.optimizer]\nlr = 1e-4"))
    assert config.plugin.capture.sample_rate == 0.5 and config.trainer["optimizer"] == {"lr": 1e-4}


def test_run_without_a_target_is_a_message(models, tmp_path):
    result = run(
        "run", "-c", str(write_config(tmp_path, models)), "--set", "trainer.model.target=/nowhere"
    )
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_a_second_trainer_is_told_who_holds_the_directory(models, tmp_path):
    from aurora_sglang_plugin.weights.writer import WeightsWriter

    writer = WeightsWriter(tmp_path / "weights")
    result = run("run", "-c", str(write_config(tmp_path, models)))
    assert result.exit_code == 2 and "written by another trainer" in result.output
    writer.close()


def test_init_draft(models, tmp_path):
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps(torch.arange(64).tolist()))
    arguments = [
        "--draft-vocab",
        "32",
        "--counts",
        str(counts),
        "--dtype",
        "bfloat16",
        "--aux-layers",
        "0,1,4",
    ]
    result = run(
        "init-draft", str(models / "target"), str(tmp_path / "out"), "--kind", "random", *arguments
    )
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["draft_vocab_size"] == 32
    assert written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 4]
    assert "vocabulary=32 of 64" in result.output and "MB of weights" in result.output
    counts.write_text("[1, 2]")
    for bad in (
        ["--dtype", "int8"],
        ["--draft-vocab", "32", "--counts", str(counts)],
        ["--aux-layers", "0,1,5"],
        ["--aux-layers", "x"],
    ):
        result = run("init-draft", str(models / "target"), str(tmp_path / "bad"), *bad)
        assert result.exit_code == 2 and "aurora-trainer:" in result.output


def settings(model: type[BaseModel], prefix: str = ""):
    """(name, default) of every setting below a model."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from settings(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", None if field.is_required() else field.default


def test_docs_list_every_setting_with_its_default():
    from aurora_trainer.config import TrainerFile

    rows = dict(re.findall(r"^\| `([a-z0-9_.]+)` \| (.*?) \|", DOCS.read_text(), re.M))
    actual = {name: as_toml(default) for name, default in settings(TrainerFile)}
    assert rows == actual
