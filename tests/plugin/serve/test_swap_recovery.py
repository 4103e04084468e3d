"""What an operator's calls do to a draft: a version is taken back, what drafts is put back after it
was overwritten, another target comes.
"""

import json
import subprocess

import pytest
import torch
from reload_site import TARGET, VD, H, Site, checkpoint

from aurora_sglang_plugin.weights.manifest import version_name


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_an_operator_takes_a_version_back(site):
    """The runbook's two commands: a line in REJECTED and a touch of CURRENT."""
    site.publish(checkpoint(1))
    site.step()
    site.writer.publish(
        checkpoint(2), {"hidden_size": H}, target=TARGET, parent=1, optimizer_step=2
    )
    assert site.step() == 2
    subprocess.run(
        """echo '{"version": 2}' >> REJECTED && touch CURRENT""",
        shell=True,
        check=True,
        cwd=site.directory,
    )
    assert site.step() == 1
    site.assert_whole(1)
    assert site.reloader.counters()["refused_rejected"] == 1


def spoil(site):
    for name, p in site.model.named_parameters():
        if "embed_tokens" not in name:
            p.data.fill_(-9.0)
    site.hot.fill_(-9)


def test_what_drafts_is_put_back(site):
    """The draft that the server began with and a version from their copies; after an exchange there
    is none of what drafts, and CURRENT is read."""
    initial = {n: p.detach().clone() for n, p in site.model.named_parameters()}
    spoil(site)
    site.reloader.restore()
    assert all(torch.equal(p, initial[n]) for n, p in site.model.named_parameters())
    assert torch.equal(site.hot, torch.arange(VD))
    for seed in (1, 2):
        site.publish(checkpoint(seed))
        assert site.step() == seed
        spoil(site)
        site.reloader.restore()
        site.assert_whole(seed)
    site.reloader.exchange()
    spoil(site)
    site.reloader.restore()
    assert site.step() == 2
    site.assert_whole(2)
    assert site.reloader.counters()["swaps"] == 4


def test_what_no_copy_holds_is_read_again(site):
    """The staging copy was given a version that failed, and CURRENT names the one that drafts
    again.
    """
    site.publish(checkpoint(1))
    site.publish(checkpoint(2))
    site.step()
    # as a staging that failed leaves it
    site.reloader._in_staging = None
    spoil(site)
    site.reloader.restore()
    assert site.step() == 2
    site.assert_whole(2)


def test_another_target(site):
    """What was staged for the old target is not swapped in, what was refused is looked at again."""
    site.publish(checkpoint(1))
    site.step()
    site.publish(checkpoint(2))
    # staged, not yet swapped
    site.reloader._watcher.poll()
    site.reloader.retarget("e" * 32)
    assert site.reloader.apply_pending() is None and site.reloader.version == 1
    site.assert_whole(1)
    assert site.step() is None and site.reloader._watcher.failures == {"target": 1}
    site.publish(checkpoint(3), target="e" * 32)
    assert site.step() == 3
    site.publish(checkpoint(4))
    assert site.step() is None
    site.reloader.retarget(TARGET)
    assert site.step() == 4
    site.assert_whole(4)
    refused = dict(site.reloader._watcher.failures)
    site.reloader.retarget("e" * 32)
    # what drafts goes on, and is no news
    assert site.step() is None
    assert site.reloader._watcher.failures == refused
    assert site.reloader.counters()["target_changes"] == 3


def test_a_rejection_by_another_server_is_heeded_while_the_version_drafts(site):
    for seed in (1, 2):
        site.publish(checkpoint(seed))
        site.step()
    path = site.directory / version_name(2) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parent": 1}))
    assert site.step() is None
    with open(site.directory / "REJECTED", "a") as file:
        file.write('{"version": 2}\n')
    assert site.step() == 1
    site.assert_whole(1)
    site.publish(checkpoint(3))
    assert site.step() == 3
