"""The metrics that docs/metrics.md documents, and those of a page that a process serves, in one
form to compare.
"""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

DOCS = Path(__file__).parents[2] / "docs"
OF_EVERY_SERVER_SERIES = {"tp_rank", "dp_rank"}

# name -> type, labels
Families = dict[str, tuple[str, frozenset[str]]]


def documented(section: str) -> Families:
    """Section "Server" or "Trainer" of docs/metrics.md."""
    text = re.search(rf"^## {section}$(.*?)^## ", (DOCS / "metrics.md").read_text(), re.M | re.S)[1]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.+?) \| (.+?) \|$", text, re.M)
    always = OF_EVERY_SERVER_SERIES if section == "Server" else set()
    return {
        name: (kind, frozenset(re.findall(r"`(\w+)`", labels)) | always)
        for name, kind, labels, *_ in rows
    }


def exported(page: str, prefix: str) -> Families:
    """The families of a /metrics page; a histogram's `le` is left out."""
    found = {}
    for family in text_string_to_metric_families(page):
        if family.name.startswith(prefix):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = frozenset(label for sample in family.samples for label in sample.labels) - {
                "le"
            }
            found[name] = (family.type, labels)
    return found


def values(page: str) -> dict[str, float]:
    """Every sample as name{label="value",...} -> value, labels in alphabetical order."""
    found = {}
    for family in text_string_to_metric_families(page):
        for s in family.samples:
            labels = ",".join(f'{k}="{v}"' for k, v in sorted(s.labels.items()))
            found[f"{s.name}{{{labels}}}" if labels else s.name] = s.value
    return found
