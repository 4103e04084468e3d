"""The walls between the packages, and what must never be written inside them."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("aurora_sglang_plugin", "aurora_trainer", "kernels")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))

# Files of the plugin that know SGLang. Whoever adds one says why here.
SEAM = {
    # registers the algorithm and the hook
    "aurora_sglang_plugin/plugin.py",
    # answers as EAGLE3
    "aurora_sglang_plugin/algorithm.py",
    "aurora_sglang_plugin/server_args.py",
    # what is added to a worker, and the steps of one
    "aurora_sglang_plugin/attached.py",
    "aurora_sglang_plugin/worker.py",
}
# stands in for what SGLang lacks on a CPU
CPU_ENGINE = "aurora_sglang_plugin/cpu_engine/"
CONTRACTS = (
    "config", "link.wire", "link.rows", "weights.manifest", "weights.reader", "weights.watcher",
    "drafts.kinds", "drafts.eagle3_check",
)  # fmt: skip


def imports(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


def modules(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, and of what it imports from them."""
    found = [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
    ]
    return {f"{node.module}.{alias.name}" for node in found for alias in node.names}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_sources_are_found():
    assert len(SOURCES) > 20 and SEAM <= {relative(p) for p in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_stay_inside_the_walls(path):
    name, found = relative(path), imports(path)
    if "sglang" in found:
        assert name in SEAM or name.startswith(CPU_ENGINE), "only the seam imports sglang"
    if name.startswith("aurora_sglang_plugin"):
        assert "aurora_trainer" not in found, "the plugin never imports the trainer"
    if name.startswith("kernels"):
        assert not found & {"aurora_trainer", "aurora_sglang_plugin", "sglang"}, (
            "kernels import neither package"
        )


def test_the_trainers_path_needs_none_of_its_offline_tools():
    offline = ("aurora_trainer.tools", "aurora_trainer.lab")
    path = [
        p
        for p in SOURCES
        if p.parts[len(ROOT.parts)] == "aurora_trainer"
        and p.parent.name not in ("tools", "lab")
        and p.stem != "cli"
    ]
    assert len(path) > 20
    for file in path:
        assert not [m for m in modules(file) if m.startswith(offline)], file


def test_both_packages_are_cheap_to_import():
    for package in ("aurora_sglang_plugin", "aurora_trainer"):
        for init in (ROOT / package).rglob("__init__.py"):
            assert init.read_text() == "" or init.parent.name == "cpu_engine", init


@pytest.mark.parametrize("module", CONTRACTS)
def test_a_contract_imports_neither_torch_nor_sglang(module):
    code = (
        f"import sys, aurora_sglang_plugin.{module}; "
        "print(sorted(set(sys.modules) & {'torch', 'sglang', 'transformers', 'aurora_trainer'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


FORBIDDEN = {
    r"\b(pickle|dill|joblib|marshal)\b": "pickle",
    r"torch\.load\(": "torch.load",
    r"trust_remote_code\s*=\s*True": "trust_remote_code",
    r"trust-remote-code": "trust_remote_code",
    r"\bshell\s*=\s*True": "a shell",
    r"(?<![.\w])(eval|exec)\(": "eval",
}


def code_of(path: Path) -> str:
    """The source without comments and docstrings, where these words may be discussed."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                node.body[0].value.value = ""
    return ast.unparse(tree)


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=relative)
def test_nothing_forbidden(path):
    code = code_of(path)
    for pattern, what in FORBIDDEN.items():
        assert not re.search(pattern, code), f"{path}: {what}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_names_say_what_a_file_does(path):
    assert not re.search(r"utils|common|helper|manager|base", path.stem)


def test_files_stay_readable():
    lines = {relative(p): len(p.read_text().splitlines()) for p in SOURCES}
    assert not {name: n for name, n in lines.items() if n > 350}
