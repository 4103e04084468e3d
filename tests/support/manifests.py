"""The manifests of docs/deploy, built by kustomize."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
CRDS = Path(__file__).parent / "crds"
WAYS = ("with-draft", "untrained-draft", "without-draft")
# of a pod
MODELS, VERSIONS = "/models", "/aurora/versions"


def kubectl(*words: str) -> str:
    """What it prints. It talks to no cluster."""
    beside = Path(sys.executable).parent / "kubectl"
    tool = os.environ.get("KUBECTL") or (beside if beside.exists() else shutil.which("kubectl"))
    if not tool:
        pytest.skip("no kubectl: `make setup` installs one on Linux, or name it in KUBECTL")
    return subprocess.run([tool, *words], capture_output=True, text=True, check=True).stdout


def build(way: str) -> dict[tuple[str, str], dict]:
    """(kind, name) -> object, of one way of use."""
    objects = list(yaml.safe_load_all(kubectl("kustomize", str(DEPLOY / "overlays" / way))))
    found = {(o["kind"], o["metadata"]["name"]): o for o in objects}
    assert len(found) == len(objects)
    return found


def pod(objects: dict, kind: str) -> dict:
    """The template of the one Deployment or StatefulSet."""
    (found,) = (o for (of, _), o in objects.items() if of == kind)
    return found["spec"]["template"]


def container(objects: dict, kind: str, name: str = "", init: bool = False) -> dict:
    found = pod(objects, kind)["spec"]["initContainers" if init else "containers"]
    return next(c for c in found if c["name"] == name) if name else found[0]


def config_text(objects: dict) -> str:
    (found,) = (o for (_, name), o in objects.items() if name.startswith("aurora-config"))
    return found["data"]["aurora.toml"]


def check(thing: dict) -> None:
    """By the published schema, unknown fields refused."""
    if (crd := CRDS / f"{thing['kind']}.json").exists():
        assert thing["apiVersion"] in json.loads(crd.read_text())["$comment"]
        jsonschema.Draft202012Validator(json.loads(crd.read_text())).validate(thing)
        return
    kubernetes = pytest.importorskip(
        "kubernetes_validate", reason="`make setup` installs kubernetes-validate"
    )
    kubernetes.validate(thing, kubernetes.latest_version(), strict=True)
