"""The dashboard, the rules and the runbook name what exists; promtool accepts the rules and their
unit tests.
"""

import ast
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import dashboard
import pytest
import yaml
from metric_pages import DOCS, documented

FOLDER = DOCS / "dashboards"
RULES = yaml.safe_load((FOLDER / "rules.yml").read_text())
DASHBOARD = json.loads((FOLDER / "aurora.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
QUERIES += [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]
RULE_LIST = [rule for group in RULES["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULE_LIST if "alert" in rule}
RECORDED = {rule["record"] for rule in RULE_LIST if "record" in rule}


def known() -> set[str]:
    """Every name that a query may use."""
    names = set(RECORDED)
    for name, (kind, _) in (documented("Server") | documented("Trainer")).items():
        names |= (
            {f"{name}_{part}" for part in ("bucket", "sum", "count")}
            if kind == "histogram"
            else {name}
        )
    return names


def used(expr: str) -> set[str]:
    return set(re.findall(r"(?<![\w\"])aurora[\w:]+(?=[\s{)\[]|$)", expr))


@pytest.mark.parametrize("source", ["dashboard", "rules"])
def test_every_metric_exists(source):
    for expr in QUERIES if source == "dashboard" else [rule["expr"] for rule in RULE_LIST]:
        names = used(expr)
        assert names <= known(), (expr, names - known())
        assert names or "ALERTS" in expr, expr


def test_scripts_read_metrics_that_exist():
    """A name that is gone would be 0 for ever in a figure."""
    others = {"aurora_domain", "aurora_kernels", "aurora_sglang_plugin", "aurora_trainer"}
    read = set()
    for script in (DOCS.parent / "scripts").glob("*.py"):
        texts = (n.value for n in ast.walk(ast.parse(script.read_text())) if is_text(n))
        read |= {m[1] for t in texts if (m := re.match(r"(aurora_\w*)(\{|$)", t))} - others
    assert len(read) >= 8 and read <= known(), read - known()


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_every_recording_rule_is_documented_and_used():
    rows = re.findall(r"^\| `(aurora[\w]*:[\w:]+)` \|", (DOCS / "metrics.md").read_text(), re.M)
    assert set(rows) == RECORDED and len(rows) == len(RECORDED)
    in_use = set().union(
        *(used(expr) for expr in [*QUERIES, *(rule["expr"] for rule in ALERTS.values())])
    )
    assert in_use >= RECORDED


def test_every_alert_has_its_section_in_the_runbook():
    headings = re.findall(r"^## (.*)$", (DOCS / "runbook.md").read_text(), re.M)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    # and no section for an alert that is gone
    assert set(headings) == set(ALERTS)
    for name, rule in ALERTS.items():
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}, name
        page, anchor = rule["annotations"]["runbook_url"].split("#")
        assert (DOCS.parent / page).is_file() and anchor in anchors, name
        assert rule["labels"]["severity"] in ("page", "ticket"), name


def test_every_alert_is_unit_tested():
    text = (FOLDER / "rules_test.yml").read_text()
    assert set(re.findall(r"Aurora[A-Z]\w+", text)) == set(ALERTS)


def test_the_runbook_names_what_exists():
    text = re.sub(r"^```.*?^```", "", (DOCS / "runbook.md").read_text(), flags=re.M | re.S)
    names = set(re.findall(r"`(aurora_\w+)", text))
    assert len(names) > 10 and names <= set(documented("Server") | documented("Trainer")), names


def test_the_dashboard_is_what_its_source_says():
    assert dashboard.PRINTED.read_text() == dashboard.text(), "run `make dashboards`"


def test_panels_are_whole():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    places = set()
    for panel in DASHBOARD["panels"]:
        x, y, w, h = (panel["gridPos"][name] for name in "xywh")
        cells = {(column, line) for column in range(x, x + w) for line in range(y, y + h)}
        assert not cells & places and x + w <= 24, panel["title"]
        places |= cells
    for panel in PANELS:
        assert panel["title"] and panel["targets"], panel["id"]
        for target in [panel, *panel["targets"]]:
            assert target["datasource"]["uid"] == "${datasource}", panel["title"]


def promtool(*arguments: str) -> str:
    tool = os.environ.get("PROMTOOL") or shutil.which("promtool")
    if not tool:
        pytest.skip(
            "no promtool: install Prometheus (apt-get install prometheus), or name it in PROMTOOL"
        )
    run = subprocess.run([Path(tool), *arguments], cwd=FOLDER, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def test_prometheus_accepts_rules_and_example():
    assert "24 rules found" in promtool("check", "rules", "rules.yml")
    assert "valid" in promtool("check", "config", "prometheus.yml")


def test_alerts_fire_when_they_should():
    assert "SUCCESS" in promtool("test", "rules", "rules_test.yml")
