"""A target's fingerprint: the same on a machine that holds only what the trainer reads, another for
another target."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import make_random_draft, make_random_target
from safetensors.torch import load_file, save_file

from aurora_sglang_plugin.weights.manifest import target_fingerprint
from aurora_trainer.drafts.target import open_target
from aurora_trainer.tools.check import _draft, _target


@pytest.fixture
def target(tmp_path):
    return make_random_target(tmp_path / "target", layers=6)


def shard(directory: Path, *, tied=False, prefix="") -> None:
    """Three files and an index: the embedding with the first layer, the rest, the head."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = {}
    for name, tensor in tensors.items():
        if tied and name == "lm_head.weight":
            continue
        part = 1 if "embed" in name or "layers.0." in name else 3 if "lm_head" in name else 2
        files.setdefault(f"model-0000{part}-of-00003.safetensors", {})[prefix + name] = tensor
    for file, part in files.items():
        save_file(part, directory / file)
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {n: f for f, part in files.items() for n in part},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kept", [[1, 3], [1]])
@pytest.mark.parametrize("kind", [{}, {"tied": True}, {"prefix": "language_model."}])
def test_the_trainers_machine_needs_what_it_reads_only(kind, kept, target, tmp_path):
    shard(target, **kind)
    few = tmp_path / "few"
    shutil.copytree(target, few)
    for file in few.glob("model-*.safetensors"):
        if int(file.name[10]) not in kept:
            file.unlink()
    assert target_fingerprint(str(few)) == target_fingerprint(str(target))
    draft = make_random_draft(tmp_path / "draft", target, aux_layer_ids=[0, 2, 4])
    assert "fingerprint" in _target(str(few)) and "fits the target" in _draft(str(few), draft)
    opened = open_target(few)
    if 3 in kept or kind.get("tied"):
        assert torch.equal(opened.head(), open_target(target).head())
    else:
        with pytest.raises(
            ValueError, match="model-00003-of-00003.safetensors is not here.*lm_head"
        ):
            opened.head()
    with pytest.raises(ValueError, match="is not here"):
        opened.tensor("model.layers.5.input_layernorm.weight")


def test_without_its_own_file_the_embedding_is_named(target):
    shard(target)
    (target / "model-00001-of-00003.safetensors").unlink()
    for read in (lambda: target_fingerprint(str(target)), lambda: open_target(target).embedding()):
        with pytest.raises(
            ValueError, match="model-00001-of-00003.safetensors is not (there|here).*embed"
        ):
            read()


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.5.mlp.down_proj.weight",
    ],
)
def test_two_fine_tunes_differ(name, target):
    before = target_fingerprint(str(target))
    tensors = load_file(target / "model.safetensors")
    tensors[name].view(-1)[-1] += 1
    save_file(tensors, target / "model.safetensors")
    assert target_fingerprint(str(target)) != before


def test_in_a_large_target_the_first_layers_tell(target):
    """A fine-tune of a low rank leaves embedding and head as they are, and no layer."""
    shard(target)
    before = target_fingerprint(str(target))
    path = target / "model-00001-of-00003.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 0.01
    save_file(tensors, path)
    assert target_fingerprint(str(target)) != before


def test_another_config_or_dtype_is_another_target(target):
    before = target_fingerprint(str(target))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    # the same, written otherwise
    assert target_fingerprint(str(target)) == before
    (target / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    changed = target_fingerprint(str(target))
    save_file(
        {n: t.half() for n, t in load_file(target / "model.safetensors").items()},
        target / "model.safetensors",
    )
    assert len({before, changed, target_fingerprint(str(target))}) == 3


def test_other_files_beside_it_do_not_count(target):
    before = target_fingerprint(str(target))
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, target / "consolidated.safetensors")
    (target / "README.md").write_text("hello")
    assert target_fingerprint(str(target)) == before


def test_other_formats_and_damage(target):
    path = target / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        target_fingerprint(str(target))
    path.unlink()
    (target / "pytorch_model.bin").write_bytes(b"x" * 100_000)
    first = target_fingerprint(str(target))
    (target / "pytorch_model.bin").write_bytes(b"x" * 99_999 + b"y")
    assert target_fingerprint(str(target)) != first
    (target / "config.json").write_text("[")
    with pytest.raises(ValueError, match="not JSON"):
        target_fingerprint(str(target))
