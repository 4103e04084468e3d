"""The manifests of docs/deploy: kustomize builds them, the published schemas take them, and every
command, setting, port, path and figure in them is the program's own. That SGLang takes the servers'
commands is in tests/plugin/test_algorithm.py, which asks it once for all."""

from __future__ import annotations

import base64
import contextlib
import copy
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import manifests
import pytest
import yaml
from manifests import (
    DEPLOY,
    MODELS,
    ROOT,
    VERSIONS,
    WAYS,
    check,
    config_text,
    container,
    kubectl,
    pod,
)
from models import make_random_target
from typer.main import get_command

from aurora_sglang_plugin.config import ENV_CONFIG, ServerConfig, load
from aurora_sglang_plugin.endpoint import is_local
from aurora_sglang_plugin.link.keys import check_pair, load_server_keys, load_trainer_keys
from aurora_trainer.cli import app
from aurora_trainer.config import TrainerFile
from aurora_trainer.drafts.target import read_config
from aurora_trainer.tools import plan, sizes

DASHBOARDS = ROOT / "docs" / "dashboards"
NAME, UNITS = "app.kubernetes.io/name", {"Mi": 1 << 20, "Gi": 1 << 30}


@pytest.fixture(scope="module")
def built() -> dict[str, dict[tuple[str, str], dict]]:
    """Way of use -> (kind, name) -> object."""
    return {way: manifests.build(way) for way in WAYS}


@pytest.fixture(scope="module")
def base(built):
    return built["without-draft"]


def trainer_words(objects: dict) -> list[str]:
    parts = container(objects, "StatefulSet")
    return parts["command"] + parts["args"]


@pytest.fixture
def config(base, tmp_path) -> TrainerFile:
    (tmp_path / "aurora.toml").write_text(config_text(base))
    return load(TrainerFile, tmp_path / "aurora.toml")


# ---- the schemas


@pytest.mark.parametrize("way", WAYS)
def test_kustomize_builds_it_and_the_schemas_take_it(built, way):
    kinds = {kind for kind, _ in built[way]}
    assert kinds >= {
        "Deployment", "StatefulSet", "Service", "PersistentVolumeClaim", "NetworkPolicy",
        "ConfigMap", "ServiceMonitor", "PrometheusRule", "PodDisruptionBudget", "Namespace",
    }  # fmt: skip
    for thing in built[way].values():
        check(thing)
        where = thing["metadata"].get("namespace")
        assert where == "aurora" or thing["kind"] == "Namespace"


@pytest.mark.parametrize("kind", ["Deployment", "ServiceMonitor", "PrometheusRule"])
def test_a_schema_refuses_what_nobody_knows(base, kind):
    thing = copy.deepcopy(next(o for (of, _), o in base.items() if of == kind))
    thing["spec"]["repilcas"] = 1
    with pytest.raises(jsonschema.ValidationError):
        check(thing)
    del thing["spec"]["repilcas"]
    key = {"Deployment": "replicas", "ServiceMonitor": "endpoints", "PrometheusRule": "groups"}
    thing["spec"][key[kind]] = "two"
    with pytest.raises(jsonschema.ValidationError):
        check(thing)


# ---- what an object names is there


def test_prometheus_finds_the_jobs_that_the_rules_name(base):
    rules = yaml.safe_load((DASHBOARDS / "rules.yml").read_text())
    assert base["PrometheusRule", "aurora"]["spec"] == rules
    jobs = set(re.findall(r'job="([^"]+)"', json.dumps(rules).replace('\\"', '"')))
    found = set()
    for (kind, _), monitor in base.items():
        if kind != "ServiceMonitor":
            continue
        labels = monitor["spec"]["selector"]["matchLabels"]
        service = base["Service", labels[NAME]]
        assert labels.items() <= service["metadata"]["labels"].items()
        names = {port["name"] for port in service["spec"]["ports"]}
        assert {e["port"] for e in monitor["spec"]["endpoints"]} <= names
        found.add(service["metadata"]["labels"][monitor["spec"]["jobLabel"]])
    assert found == jobs == {"sglang", "aurora-trainer"}


def test_the_dashboard_is_the_one_that_is_printed(base):
    board = base["ConfigMap", "aurora-dashboard"]
    assert board["data"] == {"aurora.json": (DASHBOARDS / "aurora.json").read_text()}
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"


# ---- settings and commands


def test_both_sides_take_the_settings_and_they_are_the_pods(config, base, tmp_path):
    assert load(ServerConfig, tmp_path / "aurora.toml").link == config.link
    trainer, server = container(base, "StatefulSet"), container(base, "Deployment")
    ports = {port["name"]: port["containerPort"] for port in trainer["ports"]}
    host, _, port = config.link.endpoint.removeprefix("tcp://").rpartition(":")
    assert ("Service", host) in base and int(port) == ports["link"]
    assert config.link.bind == f"tcp://0.0.0.0:{ports['link']}"
    assert not is_local(config.link.endpoint) and config.link.trainer_keys
    metrics = config.trainer.metrics
    assert (metrics.host, metrics.port) == ("0.0.0.0", ports["metrics"])
    writable = {m["mountPath"] for m in trainer["volumeMounts"] if not m.get("readOnly")}
    for directory in (config.weights.directory, config.trainer.checkpoint.directory):
        assert any(str(directory).startswith(f"{mount}") for mount in writable)
    assert VERSIONS in {m["mountPath"] for m in server["volumeMounts"] if not m.get("readOnly")}
    paths = {e["name"]: e.get("value") for e in server["env"]}
    mounts = {m["name"]: m["mountPath"] for m in server["volumeMounts"]}
    assert paths[ENV_CONFIG] == f"{mounts['config']}/aurora.toml"


def option(words: list[str], name: str) -> str | None:
    return next((w.partition("=")[2] for w in words if w.startswith(f"{name}=")), None)


@pytest.mark.parametrize("way", WAYS)
def test_the_trainers_command_is_its_own(built, way, tmp_path):
    first, name, *words = trainer_words(built[way])
    assert first == "aurora-trainer"
    given = get_command(app).commands[name].make_context(name, list(words)).params
    (tmp_path / "aurora.toml").write_text(config_text(built[way]))
    config = load(TrainerFile, tmp_path / "aurora.toml", given["overrides"] or ())
    server = container(built[way], "Deployment")["args"]
    draft = option(server, "--speculative-draft-model-path")
    # one draft for both sides, or none
    assert (config.trainer.model.draft and str(config.trainer.model.draft)) == draft
    assert (draft is None) == (way == "without-draft")
    assert option(server, "--model-path") == config.trainer.model.target


def test_probes_ask_for_what_is_there(base):
    sglang = Path(importlib.util.find_spec("sglang").origin).parent / "srt" / "entrypoints"
    source = (sglang / "http_server.py").read_text()
    server, trainer = container(base, "Deployment"), container(base, "StatefulSet")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert f'@app.get("{server[probe]["httpGet"]["path"]}")' in source
        assert server[probe]["httpGet"]["port"] == "http"
        # never the link's port, whose strangers are counted
        assert trainer[probe]["httpGet"] == {"path": "/metrics", "port": "metrics"}
    wait_s = int(re.search(r'"SGLANG_HEALTH_CHECK_TIMEOUT", (\d+)\)', source)[1])
    assert server["livenessProbe"]["timeoutSeconds"] > wait_s
    assert server["startupProbe"]["timeoutSeconds"] > wait_s
    (_, seconds) = server["lifecycle"]["preStop"]["exec"]["command"]
    grace = pod(base, "Deployment")["spec"]["terminationGracePeriodSeconds"]
    assert grace > 60 + int(seconds)


def shell(one: dict, here: dict[str, Path]) -> None:
    """Run an init container's script, its paths in folders of this machine."""
    text = one["args"][0]
    for path, folder in here.items():
        text = text.replace(path, str(folder))
    command = [shutil.which(one["command"][0]), *one["command"][1:], text]
    beside = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{beside}:{os.environ['PATH']}"}
    subprocess.run(command, check=True, timeout=120, env=environment)


def mount(folder: Path, secret: dict) -> Path:
    """As the kubelet mounts a Secret for an fsGroup."""
    data = folder / "..2026_11_26"
    data.mkdir(parents=True)
    (folder / "..data").symlink_to(data.name)
    for name, text in secret["data"].items():
        (data / name).write_bytes(base64.b64decode(text))
        (data / name).chmod(0o440)
        (folder / name).symlink_to(f"..data/{name}")
    folder.chmod(0o1777)
    return folder


def test_the_pages_commands_make_secrets_that_the_pods_take(base, tmp_path, config):
    """From keygen to the keys that each side loads; the Secrets' own mounts would be refused."""
    page = (DEPLOY / "README.md").read_text()
    (block,) = (b for b in re.findall(r"```bash\n(.*?)```", page, re.S) if "keygen" in b)
    secrets = {}
    with contextlib.chdir(tmp_path):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["aurora-trainer"]:
                get_command(app)(words[1:], standalone_mode=False)
            if words[:3] == ["kubectl", "create", "secret"]:
                made = yaml.safe_load(kubectl(*words[1:], "--dry-run=client", "--output=yaml"))
                check(made)
                secrets[made["metadata"]["name"]] = made
    loaded = []
    for kind, load_keys, at in (
        ("StatefulSet", load_trainer_keys, config.link.trainer_keys),
        ("Deployment", load_server_keys, config.link.server_keys),
    ):
        volumes = {v["name"]: v for v in pod(base, kind)["spec"]["volumes"]}
        secret = secrets[volumes["secrets"]["secret"]["secretName"]]
        mounted = mount(tmp_path / kind / "secrets", secret)
        with pytest.raises(ValueError):
            load_keys(mounted)
        keys = tmp_path / kind / "keys"
        shell(container(base, kind, "keys", init=True), {"/secrets": mounted, f"{at.parent}": keys})
        loaded.append(load_keys(keys / at.name))
    check_pair(*loaded)
    assert set(loaded[0].servers.values()) == {"server"}


def test_the_untrained_draft_is_made_once_and_waited_for(built, tmp_path):
    objects = built["untrained-draft"]
    target = make_random_target(tmp_path / "models" / "target", vocab=64, hidden=32)
    versions = tmp_path / "versions"
    (versions / "draft.new").mkdir(parents=True)
    here = {MODELS: target.parent, VERSIONS: versions}
    make = container(objects, "StatefulSet", "make-draft", init=True)
    shell(make, here)
    draft = versions / "draft"
    made = {p.name: p.stat().st_mtime_ns for p in draft.iterdir()}
    assert {"config.json", "model.safetensors"} <= set(made)
    shell(make, here)
    assert made == {p.name: p.stat().st_mtime_ns for p in draft.iterdir()}
    assert [p.name for p in versions.iterdir()] == ["draft"]
    shell(container(objects, "Deployment", "wait-for-draft", init=True), here)


# ---- figures


def nbytes(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def test_what_is_asked_for_is_enough_for_an_8b_target(base, config):
    target = read_config(ROOT / "docs" / "examples" / "models" / "qwen3-8b.json")
    found = plan.plan(target, config, sizes.Load(servers=2))
    host, weights = found["trainer_host"], found["weights"]
    needed = sum(n for key, n in host.items() if key.endswith("_bytes"))
    limit = nbytes(container(base, "StatefulSet")["resources"]["limits"]["memory"])
    # PyTorch and Python take some
    assert needed + (8 << 30) < limit
    claims = base["StatefulSet", "aurora-trainer"]["spec"]["volumeClaimTemplates"]
    room = nbytes(claims[0]["spec"]["resources"]["requests"]["storage"])
    assert weights["checkpoints_disk_bytes"] + weights["checkpoint_bytes"] < room
    versions = base["PersistentVolumeClaim", "aurora-versions"]
    room = nbytes(versions["spec"]["resources"]["requests"]["storage"])
    assert weights["disk_bytes"] + 2 * weights["version_bytes"] < room


@pytest.mark.parametrize("side, kind", [("server", "Deployment"), ("trainer", "StatefulSet")])
def test_the_container_files_are_of_this_repository(base, side, kind):
    """None is built here, there is no builder; what they name is here."""
    text = (DEPLOY / f"{side}.Containerfile").read_text()
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for word in line.split()}
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {p.partition(".")[0] for p in project["tool"]["setuptools"]["packages"]}
    packages = packages - {"aurora_kernels"} | {"kernels"}
    assert copied >= packages | {"pyproject.toml", project["project"]["readme"]}
    context = pod(base, kind)["spec"]["securityContext"]
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}\n" in text
    image = f"registry.example/aurora-{side}:{project['project']['version']}"
    assert image in text and container(base, kind)["image"] == image
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.M)[1])
    assert container(base, kind)["command"][: len(entry)] == entry
    torch = re.search(r"torch==[\d.]+", (ROOT / "Makefile").read_text())[0]
    sglang = re.search(r"sglang==([\d.]+)", (ROOT / "Makefile").read_text())[1]
    assert f"FROM lmsysorg/sglang:v{sglang}\n" in text if side == "server" else torch in text
