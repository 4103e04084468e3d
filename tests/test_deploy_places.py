"""The manifests of docs/deploy: pods, services, policies and volumes meet."""

from __future__ import annotations

import manifests
import pytest
import yaml
from manifests import DEPLOY, MODELS, WAYS, check, pod

NAME = "app.kubernetes.io/name"


@pytest.fixture(scope="module")
def built() -> dict[str, dict[tuple[str, str], dict]]:
    """Way of use -> (kind, name) -> object."""
    return {way: manifests.build(way) for way in WAYS}


@pytest.fixture(scope="module")
def base(built):
    return built["without-draft"]


def test_selectors_ports_and_volumes_meet(built):
    for way, objects in built.items():
        pods = {t["metadata"]["labels"][NAME]: t for t in (
            pod(objects, "Deployment"), pod(objects, "StatefulSet"))}  # fmt: skip
        ports = {
            name: {p["name"]: p["containerPort"] for p in t["spec"]["containers"][0]["ports"]}
            for name, t in pods.items()
        }
        services = {o["metadata"]["name"]: o for (k, _), o in objects.items() if k == "Service"}
        for name, service in services.items():
            assert service["spec"]["selector"] == {NAME: name}
            for port in service["spec"]["ports"]:
                assert ports[name][port["targetPort"]] == port["port"]
        for (kind, _), thing in objects.items():
            if kind == "NetworkPolicy":
                check_policy(thing["spec"], ports)
            if kind == "PodDisruptionBudget":
                assert thing["spec"]["selector"]["matchLabels"][NAME] in pods
        for name, template in pods.items():
            spec = template["spec"]
            volumes = {volume["name"]: volume for volume in spec["volumes"]}
            claimed = {"checkpoints"} if name == "aurora-trainer" else set()
            containers = [*spec["containers"], *spec["initContainers"]]
            mounted = {m["name"] for c in containers for m in c["volumeMounts"]}
            assert mounted == {*volumes, *claimed}, way
            for volume in volumes.values():
                if claim := volume.get("persistentVolumeClaim"):
                    assert ("PersistentVolumeClaim", claim["claimName"]) in objects
                if of := volume.get("configMap"):
                    assert ("ConfigMap", of["name"]) in objects
            for one in containers:
                assert one["image"].startswith("registry.example/aurora-")
                assert one["resources"]["requests"] and one["resources"]["limits"]["memory"]
                assert one["securityContext"]["readOnlyRootFilesystem"]
        assert objects["StatefulSet", "aurora-trainer"]["spec"]["serviceName"] in services


def check_policy(spec: dict, ports: dict) -> None:
    own = ports[spec["podSelector"]["matchLabels"][NAME]]
    for rule in spec["ingress"]:
        assert all(port["port"] in own for port in rule["ports"])
    for rule in [*spec["ingress"], *spec["egress"]]:
        for peer in rule.get("from", []) + rule.get("to", []):
            selector = peer.get("podSelector")
            # else of another namespace
            if selector and "namespaceSelector" not in peer:
                other = ports[selector["matchLabels"][NAME]]
                numbers = {port["port"] for port in rule["ports"]}
                assert numbers <= {*own, *other.values()}


def test_the_models_volume_can_be_filled(base):
    """Both sides only read it; the page's pod writes it, with what they run as."""
    fill = yaml.safe_load((DEPLOY / "fill.yaml").read_text())
    check(fill)
    (volume,) = fill["spec"]["volumes"]
    (mount_,) = fill["spec"]["containers"][0]["volumeMounts"]
    claim = volume["persistentVolumeClaim"]
    assert not claim.get("readOnly") and not mount_.get("readOnly")
    assert mount_["mountPath"] == MODELS and mount_["name"] == volume["name"]
    made = base["PersistentVolumeClaim", claim["claimName"]]
    # three pods on as many nodes
    assert made["spec"]["accessModes"] == ["ReadWriteMany"]
    for name in ("runAsUser", "runAsGroup", "fsGroup"):
        ours = fill["spec"]["securityContext"][name]
        assert ours == pod(base, "Deployment")["spec"]["securityContext"][name], name
    page = (DEPLOY / "README.md").read_text()
    assert f"fill:{MODELS}/target" in page and "docs/deploy/fill.yaml" in page


def test_only_prometheus_reaches_the_trainers_figures(base):
    policy = base["NetworkPolicy", "aurora-trainer"]["spec"]
    ports = {port["port"]: rule["from"] for rule in policy["ingress"] for port in rule["ports"]}
    (peer,) = ports["metrics"]
    assert peer["podSelector"]["matchLabels"] == {NAME: "prometheus"} and peer["namespaceSelector"]
