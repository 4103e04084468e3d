"""Publishing: a reader finds the old version or the new one, complete, wherever the writer is
killed.
"""

import json
import os
import subprocess
import sys

import pytest
from published import FIELDS, read_current, tensors

from aurora_sglang_plugin.weights.manifest import (
    read_manifest,
    rejected_versions,
    version_name,
)
from aurora_sglang_plugin.weights.writer import WeightsWriter, versions


def test_versions_count_on_and_old_ones_go(tmp_path):
    writer = WeightsWriter(tmp_path, keep=3)
    for i in range(1, 6):
        assert writer.publish(tensors(i), {"a": 1}, **FIELDS, gate={"reason": "first"}) == i
    assert versions(tmp_path) == [3, 4, 5]
    assert read_current(tmp_path) == (5, 5.0)
    manifest = read_manifest(tmp_path / "v000005")
    assert (
        manifest.gate == {"reason": "first"}
        and manifest.map_sha256 == manifest.tensors["d2t"].sha256
    )
    assert manifest.tensors["norm.weight"].dtype == "BF16"
    # the name on disk, which other versions of either side read
    written = json.loads((tmp_path / "v000005" / "manifest.json").read_text())
    assert written["d2t_sha256"] == manifest.map_sha256
    writer.close()
    assert WeightsWriter(tmp_path).publish(tensors(9), {}, **FIELDS) == 6


def test_current_is_never_removed(tmp_path):
    writer = WeightsWriter(tmp_path, keep=2)
    writer.publish(tensors(1), {}, **FIELDS)
    # versions that nobody made current
    for stray in (7, 8, 9):
        (tmp_path / version_name(stray)).mkdir()
    writer.publish(tensors(2), {}, **FIELDS)
    assert read_current(tmp_path) == (2, 2.0)


def test_equal_weights_are_not_published_again(tmp_path):
    writer = WeightsWriter(tmp_path)
    assert writer.publish(tensors(1), {}, **FIELDS) == 1
    assert writer.publish(tensors(1), {}, **FIELDS) is None
    writer.close()
    assert WeightsWriter(tmp_path).publish(tensors(1), {}, **FIELDS) is None
    assert versions(tmp_path) == [1]


def test_weights_of_an_earlier_version_may_come_again(tmp_path):
    """The initial draft, whenever traffic suits it better."""
    writer = WeightsWriter(tmp_path)
    assert [writer.publish(tensors(fill), {}, **FIELDS) for fill in (1, 2, 1, 1)] == [1, 2, 3, None]
    writer.close()
    assert WeightsWriter(tmp_path).publish(tensors(2), {}, **FIELDS) == 4


def test_a_version_that_was_never_current_may_come_again(tmp_path):
    writer = WeightsWriter(tmp_path)
    for fill in (1, 2):
        writer.publish(tensors(fill), {}, **FIELDS)
    # as if killed before CURRENT was replaced
    (tmp_path / "CURRENT").write_text("v000001\n")
    writer.close()
    assert WeightsWriter(tmp_path).publish(tensors(2), {}, **FIELDS) == 3


def test_a_second_writer_is_refused_with_the_first_ones_pid(tmp_path):
    first = WeightsWriter(tmp_path)
    with pytest.raises(ValueError, match=f"process {os.getpid()}"):
        WeightsWriter(tmp_path)
    first.close()
    WeightsWriter(tmp_path).close()


def test_rejected_lists_versions_and_skips_half_lines(tmp_path):
    assert rejected_versions(tmp_path) == set()
    (tmp_path / "REJECTED").write_text(
        json.dumps({"version": 3, "reason": "canary"}) + '\n{"version": 4}\n{"vers'
    )
    assert rejected_versions(tmp_path) == {3, 4}


KILLED_WRITER = """
import os, sys, torch
sys.path[:0] = {path!r}
import published as t
from aurora_sglang_plugin.weights.writer import WeightsWriter
from pathlib import Path
steps = []
for i in range(1000):
    directory = Path({directory!r}) / str(i)
    writer = WeightsWriter(directory, keep=2)
    for fill in (1, 2):
        writer.publish(t.tensors(fill), {{}}, **t.FIELDS)
    writer.close()
    pid = os.fork()
    if pid == 0:  # the killed process: its third publish ends before system call i
        count = iter(range(1000))
        def step(name):
            if next(count) == i:
                os.kill(os.getpid(), 9)
        WeightsWriter(directory, keep=2, step=step).publish(t.tensors(3), {{}}, **t.FIELDS)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if status == 0:
        break
print(i)
"""


def test_a_writer_killed_at_any_step_leaves_old_or_new(tmp_path):
    code = KILLED_WRITER.format(path=sys.path, directory=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    steps = int(run.stdout)
    # mkdir, 3 files x 3, syncs, renames, CURRENT, clean-up
    assert steps > 15
    found = []
    for i in range(steps):
        directory = tmp_path / str(i)
        found.append(read_current(directory))
        # whatever has a version's name is whole
        for version in versions(directory):
            read_manifest(directory / version_name(version))
        # the next writer cleans up and goes on
        writer = WeightsWriter(directory, keep=2)
        assert not list(directory.glob("*.tmp-*"))
        assert writer.publish(tensors(4), {}, **FIELDS) > found[-1][0]
        assert read_current(directory)[1] == 4.0
        writer.close()
    assert set(found) == {(2, 2.0), (3, 3.0)} and found == sorted(found)
