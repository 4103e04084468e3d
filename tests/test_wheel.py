"""The wheel: built, installed into an empty directory, and run from another one."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METADATA = ("pyproject.toml", "README.md", "LICENSE")


def listed(*folders: str) -> list[str]:
    command = ["git", "ls-files", *folders]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # From a copy: what an earlier build left in the checkout would be taken in.
    source, directory = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in listed("aurora_sglang_plugin", "aurora_trainer", "kernels", *METADATA):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", directory]
    run = subprocess.run([*command, source], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return next(directory.glob("*.whl"))


def test_it_holds_every_file_of_the_packages_and_nothing_else(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".py")}
    tracked = listed("aurora_sglang_plugin", "aurora_trainer", "kernels")
    files = {n for n in tracked if n.endswith(".py")}
    assert names == {n.replace("kernels/", "aurora_kernels/", 1) for n in files}


def test_it_runs_from_another_directory(wheel, tmp_path):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
    subprocess.run([*install, wheel], check=True, capture_output=True)
    env = os.environ | {"PYTHONPATH": str(site)}

    def python(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path, env=env, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip

    for package in ("aurora_sglang_plugin", "aurora_trainer", "aurora_kernels"):
        where = python("-c", f"import {package}; print(list({package}.__path__)[0])")
        assert Path(where).parent == site
    assert python("-m", "aurora_trainer", "--version") == version("aurora-speculative")
    assert "init-draft" in python("-m", "aurora_trainer", "--help")
    names = python(
        "-c",
        "from importlib.metadata import distributions as d;"
        f"x = next(x for x in d(path=[{str(site)!r}]) if x.name == 'aurora-speculative');"
        "print(*sorted(e.group for e in x.entry_points))",
    )
    assert names == "console_scripts sglang.srt.platforms sglang.srt.plugins"
