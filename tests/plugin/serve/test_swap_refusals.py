"""Versions that are not what they should be are refused, counted and forgotten; the next good one
is taken.

Every file goes through the real directory, watcher and checks.
"""

import json

import pytest
import torch
from reload_site import TARGET, VD, Draft, H, Site, V, checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

from aurora_sglang_plugin.config import SwapConfig, WeightsConfig
from aurora_sglang_plugin.serve.swap import Reloader


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_fp16_overflow_is_refused(tmp_path):
    site = Site(tmp_path)
    # a server in float16: 1e6 is finite in the file and infinite there
    site.model.half()
    site.reloader = Reloader(
        site.model, site.hot, WeightsConfig(directory=tmp_path), SwapConfig(), TARGET
    )
    site.publish(checkpoint(1) | {"norm.weight": torch.full((H,), 1e6)})
    assert site.step() is None and site.reloader.counters()["refused_values"] == 1


def test_a_draft_with_the_targets_head_is_refused(tmp_path):
    model = Draft(nn.Parameter(torch.zeros(V, H)))
    model.load_lm_head_from_target = True
    with pytest.raises(ValueError, match="lm_head"):
        Reloader(model, None, WeightsConfig(directory=tmp_path), SwapConfig(), TARGET)


def bad_tensors(change):
    tensors = checkpoint(2)
    change(tensors)
    return lambda site: site.publish(tensors)


def spoil(edit):
    def make(site):
        site.publish(checkpoint(2))
        edit(site.directory / "v000002")

    return make


def edit_manifest(version_dir, **fields):
    path = version_dir / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def flip_byte(version_dir):
    path = version_dir / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def swap_two_tensors(version_dir):
    path = version_dir / "model.safetensors"
    tensors = load_file(path)
    tensors["norm.weight"], tensors["midlayer.hidden_norm.weight"] = torch.ones(H), torch.zeros(H)
    save_file(tensors, path)


NAN = torch.tensor(float("nan"))
BAD = {
    "missing manifest": ("missing", spoil(lambda d: (d / "manifest.json").unlink())),
    "missing weights": ("missing", spoil(lambda d: (d / "model.safetensors").unlink())),
    "truncated": ("size", spoil(lambda d: (d / "model.safetensors").write_bytes(b"x" * 99))),
    "empty manifest": ("manifest", spoil(lambda d: (d / "manifest.json").write_bytes(b""))),
    "field of another type": ("manifest", spoil(lambda d: edit_manifest(d, parent="one"))),
    "future format": ("format", spoil(lambda d: edit_manifest(d, format=2))),
    "renamed": ("name", spoil(lambda d: edit_manifest(d, version=7))),
    "bit flip": ("hash", spoil(flip_byte)),
    "other config, same size": (
        "hash",
        spoil(
            lambda d: (d / "config.json").write_text(
                (d / "config.json").read_text().replace("8", "9")
            )
        ),
    ),
    "other content": ("hash", spoil(swap_two_tensors)),
    "other target": ("target", lambda site: site.publish(checkpoint(2), target="0" * 32)),
    "other config": ("config", lambda site: site.publish(checkpoint(2), {"hidden_size": 16})),
    "other aux layers": (
        "config",
        lambda site: site.publish(
            checkpoint(2), {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}}
        ),
    ),
    "nan": ("values", bad_tensors(lambda t: t["fc.weight"].view(-1)[3].copy_(NAN))),
    "bf16 inf": (
        "values",
        bad_tensors(lambda t: t.update({"norm.weight": (NAN / 1).to(torch.bfloat16).repeat(H)})),
    ),
    "missing name": ("names", bad_tensors(lambda t: t.pop("midlayer.self_attn.k_proj.weight"))),
    "unknown name": ("names", bad_tensors(lambda t: t.update({"layers.0.extra": torch.ones(2)}))),
    "same name twice": (
        "names",
        bad_tensors(lambda t: t.update({"model.norm.weight": torch.ones(H)})),
    ),
    "missing d2t": ("names", bad_tensors(lambda t: t.pop("d2t"))),
    "wrong shape": ("shape", bad_tensors(lambda t: t.update({"norm.weight": torch.ones(1)}))),
    "wrong dtype": (
        "dtype",
        bad_tensors(lambda t: t.update({"norm.weight": torch.ones(H, dtype=torch.int64)})),
    ),
    "d2t out of range": (
        "d2t",
        bad_tensors(lambda t: t.update({"d2t": torch.full((VD,), V - VD + 1)})),
    ),
    "d2t maps twice": ("d2t", bad_tensors(lambda t: t["d2t"][1].fill_(int(t["d2t"][0]) - 1))),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_weights_are_refused_counted_and_forgotten(site, case):
    site.publish(checkpoint(1))
    assert site.step() == 1
    cause, make = BAD[case]
    make(site)
    for _ in range(3):
        assert site.step() is None
    site.assert_whole(1)
    counted = site.reloader._watcher.failures
    assert set(counted) == {cause} and counted[cause] == (3 if cause == "missing" else 1)
    # the next good one is taken
    site.publish(checkpoint(4))
    site.assert_whole(1)
    assert site.step() == 3
    site.assert_whole(4)
