"""The goals of the layout, measured: python scripts/house.py prints each with what it is now.

Imports are those that run when a module is imported or used; what stands under TYPE_CHECKING is
for readers and checkers alone.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("aurora_sglang_plugin", "aurora_trainer", "kernels")

# A room imports only from rooms further up in its package's list.
ROOMS = {
    "aurora_sglang_plugin": (
        "endpoint disk_faults metric_families config",
        "drafts",
        "link weights",
        "serve",
        "cpu_engine metrics metrics_thread",
        "attached worker algorithm plugin server_args",
    ),
    "aurora_trainer": (
        "schedule metric_families tensorboard checkpoint terminal",
        "intake recordings",
        "drafts",
        "learn",
        "metrics status",
        "config",
        "daemon",
        "lab",
        "tools",
        "cli",
    ),
}

# A fact and the pattern of its definition: each must stand in one file of the product.
FACTS = {
    "accept length, offline": r"^def (accept_length|walked)\(",
    "a draft's names and shapes": r"^def expected_shapes\(",
    "header of a safetensors file": r"^def read_header\(path",
    "reasons of drops": r'"queue_full", ',
    "reasons of refused weights": r'"dtype", "format", "hash"',
    "reasons of rejected messages": r'"frames", "dtype"',
    "fingerprint of a target": r"^def target_fingerprint\(",
}

# What an EAGLE3 draft is made of: its tensors, the keys of its config, and the modules that know
# them. `aux_hidden_states` is not among them: the wire's name of the features of any kind, as
# `hot_token_id` is SGLang's of the target ids, and the algorithm's name EAGLE3 is the seam's.
PARTS = re.compile(
    r"midlayer|d2t|t2d|\bfc\b|fc_norm|input_norm|hidden_norm|\blm_head\b"
    r"|aux.layer|eagle_config|eagle31|\beagle3(_|\b)"
)


def sources(*folders: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    return [ROOT / name for name in listed]


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__").replace("kernels", "aurora_kernels", 1)


def imported(tree: ast.AST, names: set[str]) -> Iterator[str]:
    """The modules among `names` that a file imports, wherever in it, but for TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from {inner, node.module} & names if inner not in names else {inner}
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & names
        else:
            yield from imported(node, names)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One path for each import that leads back to where it began."""
    found, done = [], set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append(path[path.index(name) :] + [name])
        elif name not in done:
            for other in sorted(graph[name]):
                walk(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        walk(name, [])
    return found


def rank(name: str) -> tuple[str, int] | None:
    package, _, rest = name.partition(".")
    room = rest.split(".")[0]
    for at, rooms in enumerate(ROOMS.get(package, ())):
        if room in rooms.split():
            return package, at
    return None


def upward(graph: dict[str, set[str]]) -> list[str]:
    out = []
    for name, others in sorted(graph.items()):
        own = rank(name)
        for other in sorted(others):
            its = rank(other)
            if own and its and own[0] == its[0] and its[1] > own[1]:
                out.append(f"{name} imports {other}")
    return out


def tasks() -> Iterator[tuple[str, int, list[str]]]:
    """(task, goal, the files that it opens) of CONTRIBUTING's table."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for task, files, goal in re.findall(r"^\| (.+?) \| (.+?) \| (\d+) \|$", text, re.M):
        # either of two is one; what has no name of its own counts too
        yield task, int(goal), re.split(r"[,;] ", files)


def main() -> int:
    product = [p for p in sources(*PACKAGES) if p.suffix == ".py"]
    scripts = [p for p in sources("scripts") if p.suffix == ".py"]
    names = {module(p) for p in product}
    graph = {
        module(p): set(imported(ast.parse(p.read_text()), names)) - {module(p)} for p in product
    }
    everything = [p for p in sources() if p.suffix == ".py"]
    text = {p: p.read_text().splitlines() for p in everything}
    long_lines = sum(len(line) > 100 for lines in text.values() for line in lines)
    long_files = {str(p.relative_to(ROOT)): len(t) for p, t in text.items() if len(t) > 350}
    offline = ("cpu_engine", "tools", "lab")
    path = sum(p.stat().st_size for p in product if p.parent.name not in offline)
    outside = sum(p.stat().st_size for p in product + scripts)
    homes = defaultdict(set)
    for p in product:
        for fact, pattern in FACTS.items():
            if re.search(pattern, p.read_text(), re.MULTILINE):
                homes[fact].add(str(p.relative_to(ROOT)))
    # a fact that is found nowhere has moved, and is not looked at
    homeless = {fact: sorted(homes[fact]) for fact in FACTS if len(homes[fact]) != 1}
    spelled = [
        str(p.relative_to(ROOT))
        for p in product
        if "drafts" not in p.parts and PARTS.search(p.read_text())
    ]
    rows = [
        ("import circles", 0, circles(graph)),
        ("upward imports", 0, upward(graph)),
        ("facts without their one home", 0, [f"{k}: {', '.join(v)}" for k, v in homeless.items()]),
        ("lines over 100 characters", 100, long_lines),
        ("files over 350 lines", 0, [f"{k} {v}" for k, v in sorted(long_files.items())]),
        ("kB of the path", 450, round(path / 1e3)),
        ("kB outside tests", 715, round(outside / 1e3)),
        ("files outside drafts/ that spell EAGLE3's parts", 0, spelled),
    ]
    rows += [(f"files to {task}", goal, len(files)) for task, goal, files in tasks()]
    missed = 0
    for what, goal, now in rows:
        count = len(now) if isinstance(now, list) else now
        missed += count > goal
        print(f"{'ok  ' if count <= goal else 'OVER'} {what}: {count}, goal at most {goal}")
        for item in now if isinstance(now, list) else ():
            print(f"       {' > '.join(item) if isinstance(item, list) else item}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
