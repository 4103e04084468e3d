"""A weights directory that moves while both sides run, and versions of a newer trainer."""

import json
import shutil

import pytest
from published import FIELDS, tensors
from test_file_systems import watch

from aurora_sglang_plugin.weights.manifest import FORMATS, ManifestError, read_manifest
from aurora_sglang_plugin.weights.writer import WeightsWriter


def test_both_sides_follow_a_directory_that_was_moved(tmp_path):
    """To another disk, behind the name that they know; the last versions come with it."""
    place = tmp_path / "weights"
    (tmp_path / "old").mkdir()
    place.symlink_to("old")
    writing = WeightsWriter(place)
    found, staged = watch(place)
    for version in (1, 2):
        writing.publish(tensors(float(version)), {}, **FIELDS | {"parent": version - 1})
        found.poll()
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    place.unlink()
    found.poll()
    place.symlink_to("new")
    found.poll()
    assert writing.publish(tensors(3.0), {}, **FIELDS | {"parent": 2}) == 3
    found.poll()
    assert staged == [1, 2, 3] and not found.failures
    assert not (tmp_path / "old" / "v000003").exists()
    # a rollback finds the parent that came along
    found.reject(3, 2, write=True)
    found.poll()
    assert found.seen_version == 2 and (tmp_path / "new" / "REJECTED").exists()
    # another trainer finds the place taken
    with pytest.raises(ValueError, match="written by another trainer"):
        WeightsWriter(tmp_path / "new")
    # a server that is started with the new name has the newest that stands, at once
    restarted, staged = watch(tmp_path / "new")
    restarted.poll()
    assert staged == [2]
    writing.close()


def edit(path, **fields):
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | fields))


def test_a_version_of_a_newer_trainer_is_taken_if_it_can_be_understood(tmp_path):
    writing = WeightsWriter(tmp_path)
    found, staged = watch(tmp_path)
    writing.publish(tensors(1.0), {}, **FIELDS)
    path = tmp_path / "v000001" / "manifest.json"
    files = json.loads(path.read_text())["files"]
    files["config.json"]["added_later"] = 1
    edit(path, added_later={"of": "any type"}, files=files)
    found.poll()
    assert staged == [1]
    writing.publish(tensors(2.0), {}, **FIELDS)
    # whatever else is in it
    edit(tmp_path / "v000002" / "manifest.json", format=FORMATS[-1] + 1, tensors=["otherwise"])
    found.poll()
    assert staged == [1] and found.failures == {"format": 1}
    with pytest.raises(ManifestError, match="upgrade the server"):
        read_manifest(tmp_path / "v000002")
    # nested deeper than any decoder goes
    nested = b'{"added_later":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (tmp_path / "v000002" / "manifest.json").write_bytes(nested)
    with pytest.raises(ManifestError) as error:
        read_manifest(tmp_path / "v000002")
    assert error.value.cause == "manifest"
    writing.close()
    writing = WeightsWriter(tmp_path)
    writing.publish(tensors(3.0), {}, **FIELDS)
    found.poll()
    assert staged == [1, 3]
    writing.close()
