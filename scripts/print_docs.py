"""Print the tables of the docs from the declarations that they repeat.

    python scripts/print_docs.py            writes the tables into docs/*.md
    python scripts/print_docs.py --check    says whether the pages are what would be written

A table stands between `<!-- make docs: NAME -->` and `<!-- end -->`; `TABLES` says what makes it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from aurora_sglang_plugin import metrics as server
from aurora_sglang_plugin.metric_families import Family
from aurora_trainer.metric_families import intake, learning

DOCS = Path(__file__).parents[1] / "docs"
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


TABLES: dict[str, Callable[[], list[str]]] = {
    "metrics of every rank": lambda: metrics(server.OF_RANK),
    "metrics of capture": lambda: metrics(server.of_capture(3)),
    "metrics of the stream": lambda: metrics(intake.STREAM),
    "metrics of the recording": lambda: metrics(intake.RECORDING),
    "metrics of samples": lambda: metrics(intake.SAMPLES),
    "metrics of training": lambda: metrics(learning.TRAINING),
    "metrics of versions": lambda: metrics(learning.VERSIONS),
}


def printed(text: str) -> str:
    """The page with its tables as they should be."""

    def table(block: re.Match) -> str:
        return block[1] + "".join(f"{row}\n" for row in TABLES[block[2]]()) + block[4]

    return BLOCK.sub(table, text)


def pages() -> dict[Path, str]:
    """Every page that has a printed table, and what it should be."""
    texts = {page: page.read_text() for page in sorted(DOCS.rglob("*.md"))}
    return {page: printed(text) for page, text in texts.items() if BLOCK.search(text)}


def main(check: bool) -> int:
    stale = {page: text for page, text in pages().items() if page.read_text() != text}
    for page, text in stale.items():
        if not check:
            page.write_text(text)
        print(f"{page.relative_to(DOCS.parent)}: {'run `make docs`' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
