"""The pages: their commands run or say why not, their links lead somewhere, and their errors are
the program's own.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import print_docs
import pytest
import torch
from models import make_random_draft, make_random_target
from safetensors.torch import load_file
from traffic import messages
from typer.main import get_command
from typer.testing import CliRunner

from aurora_sglang_plugin import metrics as server_metrics
from aurora_sglang_plugin.config import ServerConfig
from aurora_sglang_plugin.link import reasons
from aurora_sglang_plugin.weights.manifest import target_fingerprint
from aurora_trainer.cli import app
from aurora_trainer.metric_families.intake import LEFT, ROW_CAUSES, UNUSABLE
from aurora_trainer.metric_families.learning import OUTCOMES
from aurora_trainer.metrics import FAMILIES
from aurora_trainer.recordings.recording import RecordConfig, Recording

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted(
    p
    for package in ("aurora_sglang_plugin", "aurora_trainer")
    for p in (ROOT / package).rglob("*.py")
)

# A command in a code block runs here, unless a comment at its end, or at the head of its block,
# says what it needs.
MARK = re.compile(
    r"#.*\b(needs? (a (GPU|trainer|server|cluster|builder of images)|the (weights|network)"
    r"|Prometheus|Grafana)|minutes)\b"
)
SHELL = ("bash", "sh", "console")
OURS = "aurora-trainer"
# they take signals, threads and their niceness
OWN_PROCESS = ("run", "record", "replay", "top")


def blocks(page: Path):
    """(language, first line number, text) of every fenced block."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S):
        yield match[1], page.read_text()[: match.start()].count("\n") + 2, match[2]


def commands(page: Path):
    """(line number, command, its mark or None) of every command in a shell block; continued lines
    are one.
    """
    for language, first, text in blocks(page):
        if language not in SHELL:
            continue
        lines, number, heredoc = text.splitlines(), first, None
        of_block = (
            next((m[0] for m in [MARK.search(lines[0])] if lines[0].startswith("#") and m), None)
            if lines
            else 0
        )
        held = ""
        for number, line in enumerate(lines, first):
            if heredoc:
                heredoc = None if line.strip() == heredoc else heredoc
                continue
            if match := re.search(r"<<'?(\w+)'?", line):
                heredoc = match[1]
            held = f"{held} {line.strip()}".strip()
            if held.endswith("\\"):
                held = held[:-1]
                continue
            command, held = held, ""
            if command and not command.startswith("#"):
                mark = MARK.search(command)
                yield (
                    number,
                    re.sub(r"\s+#.*$", "", command).removeprefix("$ "),
                    mark[0] if mark else of_block or None,
                )


FOUND = [
    pytest.param(page, command, id=f"{page.relative_to(ROOT)}:{number}")
    for page in PAGES
    for number, command, mark in commands(page)
    if mark is None and command.split()[0] == OURS
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the pages' commands name: a target, drafts, a recording, versions, a
    configuration.
    """
    folder = tmp_path_factory.mktemp("docs")
    (folder / "docs").symlink_to(ROOT / "docs")
    target = make_random_target(folder / "target", vocab=300, hidden=32, tokenizer=True)
    for name in ("draft", "downloaded"):
        make_random_draft(folder / name, target, aux_layer_ids=[0, 2, 4])
    (folder / "aurora.toml").write_text(
        f'[link]\nendpoint = "ipc://{folder}/link"\n[weights]\ndirectory ='
        f' "{folder}/weights"\n[trainer.model]\ntarget = "{target}"\ndraft ='
        f' "{folder}/draft"\n[trainer.checkpoint]\ndirectory ='
        f' "{folder}/checkpoints"\n[trainer.pace]\nnew_positions_per_step ='
        " 40\n[trainer.publish]\nevery_steps = 2\nkeep = 100\n[trainer.gate]\nenabled = false\n"
    )
    recording = Recording(folder / "recording", RecordConfig())
    about = dict(vocab=290, features=96, requests=12, outputs=30)
    for parts in messages(target=target_fingerprint(str(target)), **about):
        recording.write(parts)
    recording.close()
    run(folder, f"{OURS} replay recording --config aurora.toml")
    assert (folder / "weights" / "CURRENT").exists()
    return folder


def run(folder: Path, command: str) -> None:
    """The command, without a shell: here, or in a process of its own if it changes its
    process.
    """
    words = shlex.split(command)
    environment = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    while "=" in words[0]:
        name, _, environment[name] = words.pop(0).partition("=")
    assert words[0] == OURS, command
    if words[1] in OWN_PROCESS:
        code = "from aurora_trainer.cli import app; app()"
        result = subprocess.run(
            [sys.executable, "-c", code, *words[1:]], cwd=folder, env={**os.environ, **environment},
            timeout=120,
            capture_output=True, text=True,
        )  # fmt: skip
        status, output = result.returncode, result.stdout + result.stderr
    else:
        with contextlib.chdir(folder):
            result = CliRunner().invoke(app, words[1:], env=environment)
        status, output = result.exit_code, f"{result.output}\n{result.exception or ''}"
    assert status == 0, f"{command}\n{output[-3000:]}"


@pytest.mark.parametrize(("page", "command"), FOUND)
def test_commands_run(page, command, place, tmp_path):
    # each begins at the beginning
    if "replay" in command:
        command += (
            f" --set trainer.checkpoint.directory={tmp_path}/c --set weights.directory={tmp_path}/w"
        )
    run(place, command)


def test_python_blocks_run(tmp_path):
    """There is one: tensors out of a file that can run code, with PyTorch's restricted reader."""
    found = [text for page in PAGES for language, _, text in blocks(page) if language == "python"]
    weights = {"fc.weight": torch.randn(3, 4).T, "d2t": torch.arange(5)}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    for text in found:
        subprocess.run([sys.executable, "-c", text], cwd=tmp_path, check=True, timeout=120)
    (path,) = tmp_path.glob("*.safetensors")
    written = load_file(path)
    assert len(found) == 1 and written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)


def test_every_other_command_is_known_or_marked():
    """What is not ours needs a word on what it needs, unless everybody has it."""
    everybody = {"make", "pip", "cat", "mkdir", "chmod", "cp", "cd", "git", "export"}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        for language, first, text in blocks(page):
            unlabelled = language == "" and re.search(
                rf"^(\w+=\S+ )*({OURS}|make|python|pip|hf) ", text, re.M
            )
            assert not unlabelled, (
                f"{page.relative_to(ROOT)}:{first}: a block of commands, label it bash"
            )
        for number, command, mark in commands(page):
            where = f"{page.relative_to(ROOT)}:{number}: {command}"
            words = command.split()
            first = next(w for w in words if "=" not in w)
            assert mark or first in everybody | {OURS}, (
                f"{where}: not run here; say what it needs, e.g. # needs a GPU"
            )
            if first == "make" and len(words) > 1:
                assert words[1] in targets, where
            if first == OURS:
                subcommand = words[words.index(OURS) + 1]
                assert subcommand in known_commands(), where


def known_commands() -> set[str]:
    return set(get_command(app).commands)


def anchor(title: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, section = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        if section and path.suffix == ".md":
            titles = {anchor(t) for t in re.findall(r"^#+ (.*)$", path.read_text(), re.M)}
            assert section in titles, f"{page.name}: {target} is none of {sorted(titles)}"


def said() -> list[str]:
    """Every string of the sources with a gap for what is filled in: a message of several lines is
    one string.
    """
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-.\w]*[sdf]", "\0", node.value))
    return found


def test_the_errors_of_the_troubleshooting_page_are_the_programs_own():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    tables = re.findall(r"^\| it says .*\n(?:\|.*\n)+", page, re.M)
    rows = [row.split("|")[1] for table in tables for row in table.splitlines()[2:]]
    phrases = [phrase for row in rows for phrase in re.findall(r"`([^`]+)`", row)]
    assert len(phrases) > 30
    texts = said()
    for phrase in phrases:
        pattern = ".*".join(re.escape(part.strip()) for part in phrase.split("..."))
        assert any(re.search(pattern, text, re.S) for text in texts), phrase


def test_every_cause_is_explained():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    causes = [
        *reasons.DROPS,
        *reasons.REFUSED_WEIGHTS,
        *reasons.REJECTED,
        *UNUSABLE,
        *LEFT,
    ]
    causes += ROW_CAUSES
    outcomes = set(OUTCOMES) - {"published"}
    missing = [cause for cause in [*causes, *outcomes] if f"`{cause}`" not in page]
    assert not missing
    named = re.findall(r"`(aurora_\w+)`", page)
    exported = {*server_metrics.OF_RANK, *server_metrics.of_capture(3), *FAMILIES}
    assert len(named) > 5 and {n.removesuffix("_total") for n in named} <= exported


def test_toml_and_json_blocks_are_whole():
    for page in PAGES:
        for language, _, text in blocks(page):
            if language == "json":
                json.loads(text)
            if language == "toml":
                ServerConfig.model_validate(tomllib.loads(text))


def test_the_tables_are_what_their_sources_say():
    pages = print_docs.pages()
    assert pages
    for page, text in pages.items():
        assert page.read_text() == text, f"{page.name}: run `make docs`"
        assert "|  |" not in text, f"{page.name}: a setting without a comment above it"
    tables = "".join(page.read_text() for page in pages)
    unused = [name for name in print_docs.TABLES if f"<!-- make docs: {name} -->" not in tables]
    assert not unused


def test_contributing_names_what_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    named = re.findall(r"`([\w/.-]+\.(?:py|md))`", text)
    missing = [n for n in named if not any(f"/{path}".endswith(f"/{n}") for path in tracked)]
    assert len(named) > 30 and not missing
