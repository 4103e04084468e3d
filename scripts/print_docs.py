"""Print the tables of the docs from the declarations that they repeat.

    python scripts/print_docs.py            writes the tables into docs/*.md
    python scripts/print_docs.py --check    says whether the pages are what would be written

A table stands between `<!-- make docs: NAME -->` and `<!-- end -->`; `TABLES` says what makes it.
A metric's row is its declaration, a setting's its field and the comment above it, a model's what
`aurora-trainer plan` says of it. The rules for Prometheus are printed for its operator too.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from aurora_sglang_plugin import metrics as server
from aurora_sglang_plugin.config import load
from aurora_sglang_plugin.metric_families import Family
from aurora_trainer.config import TrainerFile
from aurora_trainer.drafts.target import read_config
from aurora_trainer.metric_families import intake, learning
from aurora_trainer.tools import plan, sizes

DOCS = Path(__file__).parents[1] / "docs"
# name in the table -> (file, tensor-parallel ranks)
MODELS = {
    "Qwen3-4B": ("qwen3-4b", 1),
    "Qwen3-8B": ("qwen3-8b", 1),
    "Llama 3.1 8B": ("llama-3.1-8b", 1),
    "Qwen3-Coder-Next": ("qwen3-coder-next", 4),
    "MiniMax M2.1": ("minimax-m2.1", 4),
    "Kimi K2.5": ("kimi-k2.5", 8),
}
BLOCK = re.compile(r"^(<!-- make docs: (.+?) -->\n)(.*?)^(<!-- end -->)$", re.M | re.S)


def metrics(families: Mapping[str, Family]) -> list[str]:
    """A row for each metric."""
    rows = ["| metric | type | labels | meaning | when to look |", "|---|---|---|---|---|"]
    for name, family in families.items():
        total = "_total" if family.kind == "counter" else ""
        labels = ", ".join(f"`{label}`" for label in family.labels) or "-"
        rows.append(
            f"| `{name}{total}` | {family.kind} | {labels} | {family.help}. | {family.look} |"
        )
    return rows


def settings() -> list[str]:
    """A table for each section of the configuration, in the order of the file."""
    rows = []
    for path, section in sections(TrainerFile):
        about = " ".join(inspect.getdoc(section).split("\n\n")[0].split())
        rows += [f"### [{path}]", "", about, "", "| setting | default | meaning |", "|---|---|---|"]
        comments = comments_above(section)
        for name, field in section.model_fields.items():
            default = None if field.is_required() else field.default
            rows.append(f"| `{path}.{name}` | {as_toml(default)} | {comments[name]} |")
        rows.append("")
    return rows[:-1]


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """(path, section) of every section that has settings; one holds settings or sections."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            yield path, model
            return
        yield from sections(inner, f"{path}.{name}".strip("."))


def comments_above(section: type[BaseModel]) -> dict[str, str]:
    """The comment above each field of a class."""
    source = inspect.getsource(section)
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            first = last = node.lineno - 1
            while lines[first - 1].lstrip().startswith("#"):
                first -= 1
            text = (line.lstrip().removeprefix("#").strip() for line in lines[first:last])
            found[node.target.id] = " ".join(text)
    return found


def as_toml(default: Any) -> str:
    """A default as a file would say it, - for none."""
    if default is None:
        return "-"
    if isinstance(default, str | Path):
        return f'`"{default}"`'
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, dict):
        return "`{ " + ", ".join(f"{k} = {v}" for k, v in default.items()) + " }`"
    if isinstance(default, tuple):
        return f"`{list(default)}`"
    return f"`{default}`"


def planned(stem: str, tp: int, small: bool) -> dict:
    config = load(TrainerFile, DOCS / "examples" / f"{stem}.toml")
    target = read_config(DOCS / "examples" / "models" / f"{stem}.json")
    whole = target.config["vocab_size"]
    return plan.plan(target, config, sizes.Load(tp=tp), None if small else whole)


def model_row(name: str) -> str:
    """A line of the table: the full vocabulary / the small one beside it."""
    stem, tp = MODELS[name]
    full, small = planned(stem, tp, False), planned(stem, tp, True)

    def both(section: str, key: str, unit: float, form: str) -> str:
        return " / ".join(f"{found[section][key] / unit:{form}}" for found in (full, small))

    cells = [
        f"[{name}]({stem}.toml)",
        str(tp),
        both("draft", "parameters", 1e6, ",.0f"),
        f"{full['link']['bytes_per_generated_token'] / 1e3:.1f}",
        f"{full['link']['bytes_per_s'] / 1e6:.0f}",
        both("server", "extra_device_bytes_per_rank", 1e9, ".2f"),
        both("trainer_device", "total_bytes", 1e9, ".1f"),
        f"{full['trainer_host']['seconds_of_traffic_in_the_buffer']:.0f}",
        both("weights", "version_bytes", 1e9, ".2f"),
        both("weights", "checkpoint_bytes", 1e9, ".1f"),
        both("training", "flops_per_s", 1e12, ".0f"),
    ]
    return f"| {' | '.join(cells)} |"


def models() -> list[str]:
    """What `plan` says of each model in docs/examples."""
    names = "model, TP, params, kB/token, MB/s, server GB, trainer GB, buffer s, version GB"
    head = [*names.split(", "), "checkpoint GB", "TFLOP/s"]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *map(model_row, MODELS)]


TABLES: dict[str, Callable[[], list[str]]] = {
    "metrics of every rank": lambda: metrics(server.OF_RANK),
    "metrics of capture": lambda: metrics(server.of_capture(3)),
    "metrics of the stream": lambda: metrics(intake.STREAM),
    "metrics of the recording": lambda: metrics(intake.RECORDING),
    "metrics of samples": lambda: metrics(intake.SAMPLES),
    "metrics of training": lambda: metrics(learning.TRAINING),
    "metrics of versions": lambda: metrics(learning.VERSIONS),
    "settings": settings,
    "models": models,
}


def printed(text: str) -> str:
    """The page with its tables as they should be."""

    def table(block: re.Match) -> str:
        return block[1] + "".join(f"{row}\n" for row in TABLES[block[2]]()) + block[4]

    return BLOCK.sub(table, text)


def prometheus_rule() -> str:
    """docs/dashboards/rules.yml as the Prometheus operator takes it."""
    groups = (DOCS / "dashboards" / "rules.yml").read_text().partition("\ngroups:")[2]
    indented = re.sub(r"^(?=.)", "  ", f"groups:{groups}", flags=re.M)
    return (
        "# Printed from rules.yml by `make docs`; edit that one.\n"
        "apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\n"
        f"metadata:\n  name: aurora\nspec:\n{indented}"
    )


def pages() -> dict[Path, str]:
    """Every page that is printed, or has a printed table, and what it should be."""
    texts = {page: page.read_text() for page in sorted(DOCS.rglob("*.md"))}
    found = {page: printed(text) for page, text in texts.items() if BLOCK.search(text)}
    return found | {DOCS / "dashboards" / "prometheus-rule.yaml": prometheus_rule()}


def main(check: bool) -> int:
    stale = {p: t for p, t in pages().items() if not p.exists() or p.read_text() != t}
    for page, text in stale.items():
        if not check:
            page.write_text(text)
        print(f"{page.relative_to(DOCS.parent)}: {'run `make docs`' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
