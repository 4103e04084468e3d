"""Print the Grafana dashboard from docs/dashboards/aurora.toml, its one source.

    python scripts/dashboard.py            writes docs/dashboards/aurora.json
    python scripts/dashboard.py --check    says whether that file is what would be written

aurora.toml has rows, and panels in them from left to right. A panel has `title`, `about` (its
tooltip) and `queries`, pairs of an expression and a legend; `kind` is timeseries unless it says
stat or heatmap, `unit` Grafana's name of a unit, `min` the axis' lower end; `right` names a series
(or, as a regular expression, several) that has an axis of its own on the right.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

DASHBOARDS = Path(__file__).parents[1] / "docs" / "dashboards"
SOURCE, PRINTED = DASHBOARDS / "aurora.toml", DASHBOARDS / "aurora.json"

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
# width and height, in Grafana's units of 1/24 of the page
SIZES = {"stat": (3, 4), "timeseries": (8, 7), "heatmap": (8, 7)}
PAGE = 24
OPTIONS = {
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "none",
    },
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom"},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "heatmap": {
        "calculate": False, "yAxis": {"unit": "short"},
        "color": {"mode": "scheme", "scheme": "Blues"},
    },
}  # fmt: skip
TARGETS = {
    "stat": {"instant": True, "range": False}, "timeseries": {}, "heatmap": {"format": "heatmap"},
}  # fmt: skip
# a line that is absent for a minute is one line
LINE = {"lineWidth": 1, "fillOpacity": 10, "showPoints": "never", "spanNulls": 60_000}
TWO_AXES = {"lineWidth": 1, "fillOpacity": 0, "showPoints": "never"}
STACK = {"fillOpacity": 40, "stacking": {"mode": "normal", "group": "A"}}
DASHED = {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [4, 4]}}


def build(source: dict) -> dict:
    """The dashboard as Grafana reads it."""
    panels: list[dict] = []
    x = y = height = 0
    for row in source["row"]:
        y, x = y + (height if x else 0), 0
        place = {"h": 1, "w": PAGE, "x": 0, "y": y}
        head = {"id": len(panels) + 1, "type": "row", "title": row["title"], "collapsed": False}
        panels.append(head | {"gridPos": place, "panels": []})
        y += 1
        for panel in row["panel"]:
            kind = panel.get("kind", "timeseries")
            width, tall = SIZES[kind]
            if x + width > PAGE:
                x, y = 0, y + height
            place, height = {"h": tall, "w": width, "x": x, "y": y}, tall
            panels.append(drawn(panel, kind, len(panels) + 1, place))
            x += width
        if x >= PAGE:
            x, y = 0, y + height
    return (
        source["dashboard"]
        | {"templating": TEMPLATING, "annotations": ANNOTATIONS}
        | {"panels": panels}
    )


def drawn(panel: dict, kind: str, number: int, place: dict) -> dict:
    return {
        "id": number,
        "type": kind,
        "title": panel["title"],
        "description": panel["about"],
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": fields(panel, kind),
        "targets": [
            {"refId": chr(ord("A") + n), "datasource": DATASOURCE, "expr": expr}
            | ({"legendFormat": legend} if legend else {})
            | TARGETS[kind]
            for n, (expr, legend) in enumerate(panel["queries"])
        ],
        "options": OPTIONS[kind],
    }


def fields(panel: dict, kind: str) -> dict:
    defaults: dict = {k: panel[k] for k in ("unit", "decimals", "min") if k in panel}
    overrides = []
    if kind == "timeseries":
        defaults["custom"] = LINE
        if panel.get("stacked"):
            defaults["custom"] = LINE | STACK
    if "right" in panel:
        defaults["custom"] = TWO_AXES
        pattern = panel["right"].startswith(".*")
        matcher = {"id": "byRegexp" if pattern else "byName", "options": panel["right"]}
        axis = [{"id": "custom.axisPlacement", "value": "right"}]
        overrides = [{"matcher": matcher, "properties": axis + [DASHED] * pattern}]
    return {"defaults": defaults, "overrides": overrides}


TEMPLATING = {
    "list": [
        {
            "name": "datasource",
            "label": "Prometheus",
            "type": "datasource",
            "query": "prometheus",
            "current": {},
        }
    ]
}
ANNOTATIONS = {
    "list": [
        {
            "name": "Swaps",
            "enable": True,
            "iconColor": "green",
            "datasource": DATASOURCE,
            "expr": "max by (instance) (changes(aurora_draft_version[$__interval])) > 0",
            "titleFormat": "draft swapped",
            "textFormat": "{{instance}}",
        },
        {
            "name": "Changes of traffic",
            "enable": True,
            "iconColor": "orange",
            "datasource": DATASOURCE,
            "expr": "sum by (instance) (changes(aurora_trainer_traffic_changes_total[$__interval]))"
            " > 0",
            "titleFormat": "traffic changed",
            "textFormat": "{{instance}}",
        },
    ]
}


def text() -> str:
    return json.dumps(build(tomllib.loads(SOURCE.read_text())), indent=2) + "\n"


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PRINTED.write_text(text())
    elif PRINTED.read_text() != text():
        sys.exit(f"{PRINTED} is not what {SOURCE} says; run `make dashboards`")
