"""Weights that must not be loaded: a live server refuses each, counts it, and serves on as
before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from drafts import disturb
from rig import wait_until
from safetensors.torch import load_file, save_file

from aurora_sglang_plugin.weights.manifest import CURRENT, version_name
from aurora_sglang_plugin.weights.writer import WeightsWriter

PARAMS = {"max_new_tokens": 32}


def made_elsewhere(loop, folder, change=lambda tensors: None) -> tuple[int, Path]:
    """The next version, whole and with a manifest that describes it, not yet where the server
    looks.
    """
    draft = disturb(loop.draft(0), seed=loop.writer.newest, size=0.1)
    tensors = draft.checkpoint()
    change(tensors)
    elsewhere = WeightsWriter(folder)
    elsewhere.newest = loop.writer.newest
    version = elsewhere.publish(
        tensors, draft.config.to_json(), target=loop.fingerprint, parent=0, optimizer_step=0
    )
    elsewhere.close()
    return version, folder / version_name(version)


def truncated(loop, folder):
    version, path = made_elsewhere(loop, folder)
    os.truncate(path / "model.safetensors", 1000)
    return version, path


def renamed(loop, folder):
    def change(tensors):
        tensors["layers.0.mlp.gate.weight"] = tensors.pop("layers.0.mlp.gate_proj.weight")

    return made_elsewhere(loop, folder, change)


def wrong_shape(loop, folder):
    return made_elsewhere(
        loop, folder, lambda t: t.update({"fc.weight": t["fc.weight"][:, :-1].clone()})
    )


def wrong_hash(loop, folder):
    version, path = made_elsewhere(loop, folder)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    return version, path


def not_finite(loop, folder):
    version, path = made_elsewhere(loop, folder)
    tensors = load_file(path / "model.safetensors")
    tensors["norm.weight"][3] = torch.nan
    save_file(tensors, path / "model.safetensors")
    _describe_again(path, tensors)
    return version, path


def another_target(loop, folder):
    version, path = made_elsewhere(loop, folder)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"target": "0" * 32}))
    return version, path


def _describe_again(path, tensors):
    """A manifest whose sizes and hashes are right, so that the values themselves are what is
    refused.
    """
    manifest = json.loads((path / "manifest.json").read_text())
    data = (path / "model.safetensors").read_bytes()
    manifest["files"]["model.safetensors"] = {
        "nbytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    for name, tensor in tensors.items():
        digest = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
        manifest["tensors"][name]["sha256"] = digest
    (path / "manifest.json").write_text(json.dumps(manifest))


BAD = {
    "size": truncated,
    "names": renamed,
    "shape": wrong_shape,
    "hash": wrong_hash,
    "values": not_finite,
    "target": another_target,
}


def name_current(loop, text):
    temporary = loop.weights / "CURRENT.tmp"
    temporary.write_text(text)
    temporary.rename(loop.weights / CURRENT)


def refused(loop, cause):
    return loop.metrics().get(f"aurora_weights_refused{{{cause}}}", 0)


@pytest.mark.parametrize("cause", list(BAD))
def test_refused(cause, chain, stream, tmp_path):
    prompt = stream[33000:33040]
    served = chain.settled_version()
    expected = chain.generate([prompt], PARAMS)[0]
    before = refused(chain, cause)
    version, path = BAD[cause](chain, tmp_path / "elsewhere")
    shutil.move(path, chain.weights / version_name(version))
    chain.writer.newest = version
    name_current(chain, version_name(version) + "\n")
    wait_until(
        lambda: refused(chain, cause) == before + 1, f"refusal by {cause}: {chain.metrics()}", 10
    )
    answer = chain.generate([prompt], PARAMS)[0]
    assert answer["output_ids"] == expected["output_ids"]
    assert chain.version() == served


@pytest.mark.parametrize(
    "text", ["v1", "", "../../etc/passwd", "v000000000000000000000000000000000000000"]
)
def test_garbage_for_current(text, chain, stream):
    served = chain.settled_version()
    before = refused(chain, "current")
    name_current(chain, text)
    wait_until(lambda: refused(chain, "current") > before, f"refusal: {chain.metrics()}", 10)
    assert chain.generate([stream[33100:33120]], PARAMS) and chain.version() == served


def test_a_good_one_afterwards_is_served(chain, stream):
    swaps = chain.metrics()["aurora_swaps"]
    name_current(chain, "nonsense")
    chain.wait_for_version(chain.publish(disturb(chain.draft(0), seed=77, size=0.05)))
    assert chain.metrics()["aurora_swaps"] == swaps + 1
