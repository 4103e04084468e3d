"""The dashboard against reality: a real server and trainer under traffic, scraped by a real
Prometheus.

    python scripts/check_dashboards.py [--seconds 120] [--outage]

Starts the demo's server and trainer, and Prometheus with docs/dashboards/prometheus.yml and
rules.yml (ports and intervals replaced). Then every panel's query, the swap marks and every
recording rule must return data, no rule may fail, and no alert may fire; `aurora-trainer top` must
see both sides. `--outage`: the trainer is then stopped, and AuroraTrainerAbsent must fire.
Prometheus comes from $PROMETHEUS or the PATH (Debian: apt-get install prometheus).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from children import TRAINER, Trainer, run_to_end, start
from clients import send
from demo import LEARNING, NUM_STEPS, TARGET, make_prompts
from passes import write_config
from serve import Server, free_port

FOLDER = Path(__file__).parents[1] / "docs" / "dashboards"
# what Grafana would put there
INTERVALS = {"$__rate_interval": "20s", "$__interval": "5s"}
SCRAPE = "1s"
OUTAGE_S = 180


class Prometheus:
    """A real one on a port of its own, with the committed configuration."""

    def __init__(self, executable: str, home: Path, server: int, trainer: int):
        self.port = free_port()
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": SCRAPE, "evaluation_interval": SCRAPE}
        ports = {"sglang": server, "aurora-trainer": trainer}
        for job in config["scrape_configs"]:
            job["static_configs"] = [{"targets": [f"127.0.0.1:{ports.pop(job['job_name'])}"]}]
        assert not ports, f"docs/dashboards/prometheus.yml has no job {set(ports)}"
        rules = (FOLDER / "rules.yml").read_text().replace("interval: 15s", f"interval: {SCRAPE}")
        (home / "rules.yml").write_text(rules)
        (home / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.log = home / "prometheus.log"
        address = f"--web.listen-address=127.0.0.1:{self.port}"
        data = ["--config.file", home / "prometheus.yml", "--storage.tsdb.path", home / "data"]
        self.process = start([executable, *data, address], self.log)

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        self.process.wait(20)

    def get(self, path: str, **query: Any) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=30) as response:
            return json.loads(response.read())["data"]

    def newest(self, expr: str, since_s: float) -> list[float]:
        """The last value of each series of a query's range that has one, NaN left out."""
        now = time.time()
        for name, value in INTERVALS.items():
            expr = expr.replace(name, value)
        found = self.get("query_range", query=expr, start=now - since_s, end=now, step=2)["result"]
        values = [
            [float(v) for _, v in series["values"] if math.isfinite(float(v))] for series in found
        ]
        return [series[-1] for series in values if series]


def main() -> None:
    options = arguments()
    executable = os.environ.get("PROMETHEUS") or shutil.which("prometheus")
    if not executable:
        sys.exit(
            "check_dashboards: no prometheus on the PATH or in $PROMETHEUS (Debian: apt-get install"
            " prometheus)"
        )
    with tempfile.TemporaryDirectory() as scratch:
        failures = check(executable, options.target.resolve(), Path(scratch), options)
    sys.exit(f"check_dashboards: {failures} of the checks failed" if failures else 0)


def check(executable: str, target: Path, home: Path, options: argparse.Namespace) -> int:
    """Returns how many checks failed."""
    draft, trainer_port = home / "draft", free_port()
    run_to_end([*TRAINER, "init-draft", target, draft, "--kind", "target"])
    config = write_config(home, target, draft, LEARNING)
    settings = [
        "checkpoint.every_s=15",
        f"metrics.port={trainer_port}",
        "metrics.rescore_every_steps=4",
    ]
    prompts = make_prompts(target, 2000)["code"]
    serve = dict(algorithm="AURORA", num_steps=NUM_STEPS, draft=draft, args=["--enable-metrics"])
    with (
        Trainer(config, home / "trainer.log", *(f"--set=trainer.{s}" for s in settings)) as trainer,
        Server(
            target, **serve, env={"AURORA_CONFIG": str(config)}, log=home / "server.log"
        ) as server,
        Prometheus(executable, home, server.port, trainer_port) as prometheus,
        traffic(server, prompts),
    ):
        print(
            f"traffic for {options.seconds:g} s, a real Prometheus scrapes every {SCRAPE}",
            flush=True,
        )
        time.sleep(options.seconds)
        if trainer.process.poll() is not None:
            sys.exit(f"the trainer ended:\n{(home / 'trainer.log').read_text()[-3000:]}")
        failures = queries(prometheus, options.seconds) + rules(prometheus)
        top = [
            *TRAINER,
            "top",
            "--once",
            "--server",
            server.url,
            "--trainer",
            f"http://127.0.0.1:{trainer_port}",
        ]
        shown = subprocess.run(top, capture_output=True, text=True)
        print(shown.stdout + shown.stderr, flush=True)
        failures += shown.returncode != 0
        if options.outage:
            failures += outage(prometheus, trainer)
    return failures


@contextmanager
def traffic(server: Server, prompts: list[list[int]]) -> Iterator[None]:
    over = threading.Event()
    thread = threading.Thread(target=lambda: list(send(server, prompts, until=over)), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(60)


def queries(prometheus: Prometheus, since_s: float) -> int:
    """Every query of the dashboard, and every recording rule by its name."""
    dashboard = json.loads((FOLDER / "aurora.json").read_text())
    asked = [("annotation", a["name"], a["expr"]) for a in dashboard["annotations"]["list"]]
    for panel in dashboard["panels"]:
        asked += [("panel", panel["title"], target["expr"]) for target in panel.get("targets", [])]
    for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]:
        asked += [
            ("rule", rule["record"], rule["record"]) for rule in group["rules"] if "record" in rule
        ]
    failures = 0
    for what, name, expr in asked:
        values = prometheus.newest(expr, since_s)
        failures += not values
        shown = ", ".join(f"{v:.4g}" for v in values[:4]) + (
            f" and {len(values) - 4} more" if len(values) > 4 else ""
        )
        print(
            f"{'ok  ' if values else 'FAIL'} {what:10} {name[:52]:52}"
            f" {shown or 'no data: ' + expr}",
            flush=True,
        )
    print(
        f"{len(asked) - failures} of {len(asked)} queries and recording rules return data",
        flush=True,
    )
    return failures


def rules(prometheus: Prometheus) -> int:
    """No rule fails to evaluate, no alert fires, both targets are up."""
    found = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    broken = [rule["name"] for rule in found if rule["health"] != "ok"]
    firing = [rule["name"] for rule in found if rule.get("state") == "firing"]
    down = [
        t["scrapeUrl"] for t in prometheus.get("targets")["activeTargets"] if t["health"] != "up"
    ]
    print(
        f"{len(found)} rules, broken {broken or 'none'}, firing {firing or 'none'}, targets down"
        f" {down or 'none'}"
    )
    return len(broken) + len(firing) + len(down) + (not found)


def outage(prometheus: Prometheus, trainer: Trainer) -> int:
    """The trainer is killed under traffic: the alert must fire, for the server and for the
    scrape.
    """
    trainer.process.kill()
    began = time.monotonic()
    while time.monotonic() - began < OUTAGE_S:
        alerts = prometheus.get("alerts")["alerts"]
        jobs = {
            a["labels"]["job"]
            for a in alerts
            if a["state"] == "firing" and a["labels"]["alertname"] == ABSENT
        }
        if jobs == {"sglang", "aurora-trainer"}:
            print(
                f"ok   {ABSENT} fires for both jobs {time.monotonic() - began:.0f} s after the"
                " trainer was killed"
            )
            return 0
        time.sleep(1)
    print(f"FAIL {ABSENT} did not fire within {OUTAGE_S} s: {alerts}")
    return 1


ABSENT = "AuroraTrainerAbsent"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=120, help="of traffic before the queries")
    parser.add_argument(
        "--target",
        type=Path,
        default=TARGET,
        help="such as one of make_target.py; default: the demo's",
    )
    parser.add_argument(
        "--outage",
        action="store_true",
        help="then kill the trainer and wait for the alert, 2 minutes",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
