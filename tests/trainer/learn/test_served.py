"""What the trainer takes for served when a published version is damaged on the disk: that version
and nothing else is lost.
"""

import json
import shutil

import pytest
import torch
from trainer_process import config

from aurora_sglang_plugin.weights.manifest import REJECTED, version_name
from aurora_trainer.daemon import Daemon


@pytest.fixture(scope="module")
def published(models, tmp_path_factory):
    """A weights directory of versions 1 to 3, each with another `fc`."""
    site = tmp_path_factory.mktemp("published")
    training = Daemon(config(models, site)).training
    for version in (1, 2, 3):
        tensors = training.draft.checkpoint(training.served.dtype)
        tensors["fc.weight"] = torch.full_like(tensors["fc.weight"], version / 8)
        about = dict(target=training.target, parent=version - 1, optimizer_step=version)
        training.writer.publish(tensors, training.draft.config.to_json("float32"), **about)
    training.close()
    return site / "weights"


@pytest.fixture
def site(published, tmp_path):
    shutil.copytree(published, tmp_path / "weights")
    return tmp_path


def fill(draft) -> float:
    return draft.fc.weight.detach().float().unique().item()


def flipped(path, at: int = -1, bits: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bits
    path.write_bytes(data)


def overwritten(path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def blank(path) -> None:
    path.write_bytes(b" " * path.stat().st_size)


def a_directory(path) -> None:
    path.unlink()
    path.mkdir()


WEIGHTS, CONFIG, MANIFEST = "model.safetensors", "config.json", "manifest.json"
# name of the file, what happened to it, and the version that is left; 0 is the initial draft
DAMAGE = {
    "a finite bit flip": (WEIGHTS, flipped, 2),
    "NaN": (WEIGHTS, lambda p: overwritten(p, p.stat().st_size - 64, b"\xff" * 64), 2),
    "broken header": (WEIGHTS, lambda p: overwritten(p, 0, b"\xff" * 16), 2),
    "blank config": (CONFIG, blank, 2),
    "file that is a directory": (WEIGHTS, a_directory, 0),
    "truncated": (WEIGHTS, lambda p: p.write_bytes(p.read_bytes()[:-9]), 0),
    "blank manifest": (MANIFEST, blank, 0),
    "bytes in the manifest": (MANIFEST, lambda p: overwritten(p, 0, b"\xff\xfe"), 0),
    "manifest that is a directory": (MANIFEST, a_directory, 0),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_version_gives_way_when_the_trainer_starts(models, site, name, caplog):
    file, damage, left = DAMAGE[name]
    damage(site / "weights" / version_name(3) / file)
    training = Daemon(config(models, site)).training
    training.resume_from_published()
    assert training.served.version == training.parent == left
    if left:
        assert fill(training.served.draft) == fill(training.draft) == left / 8
    else:
        assert training.served.draft is training.served.initial
    assert sum("published version" in r.getMessage() for r in caplog.records) == 1
    training.close()


def test_a_damaged_ancestor_gives_way_when_a_server_rolls_back(models, site):
    training = Daemon(config(models, site)).training
    training.resume_from_published()
    assert training.served.version == 3
    flipped(site / "weights" / version_name(2) / WEIGHTS)
    (site / "weights" / REJECTED).write_text(json.dumps({"version": 3}) + "\n")
    training.apply_rollbacks()
    assert training.served.version == training.parent == 1
    assert fill(training.draft) == 1 / 8
    training.apply_rollbacks()
    assert training.served.version == 1
    training.close()


def test_a_version_that_is_damaged_while_it_is_served_is_trained_on_from_memory(models, site):
    training = Daemon(config(models, site)).training
    training.resume_from_published()
    wanted = {n: p.requires_grad for n, p in training.draft.named_parameters()}
    flipped(site / "weights" / version_name(3) / WEIGHTS)
    draft = training.served.to_train()
    assert fill(draft) == 3 / 8
    assert {n: p.requires_grad for n, p in draft.named_parameters()} == wanted
    training.close()


def test_all_damaged_is_the_initial_draft(models, site):
    for version in (1, 2, 3):
        flipped(site / "weights" / version_name(version) / WEIGHTS)
    manifest = site / "weights" / version_name(2) / MANIFEST
    # names a later version: no way back may go in a circle
    manifest.write_text(manifest.read_text().replace('"parent":1', '"parent":3'))
    training = Daemon(config(models, site)).training
    assert training.served.version == 0
    training.close()


@pytest.mark.parametrize("content", [b"", b"v1\n", b"\xff\xfe", b"../../etc"])
def test_a_damaged_current_is_taken_for_the_newest_and_mended(models, site, content):
    (site / "weights" / "CURRENT").write_bytes(content)
    training = Daemon(config(models, site)).training
    assert training.served.version == training.writer.newest == 3
    about = dict(target=training.target, parent=3, optimizer_step=9)
    tensors = training.draft.checkpoint(training.served.dtype)
    training.writer.publish(tensors, training.draft.config.to_json("float32"), **about)
    training.close()
    assert (site / "weights" / "CURRENT").read_text() == "v000004\n"
