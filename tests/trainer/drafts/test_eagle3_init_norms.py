"""Targets whose norms multiply by one more than their weights: a draft started from one has what
they multiply by.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_target import write_target

from aurora_trainer.drafts.eagle3_copying import low_features
from aurora_trainer.drafts.eagle3_init import init_draft
from aurora_trainer.drafts.target import open_target
from aurora_trainer.drafts.target_config import is_zero_centred


def rewrite(directory, tensors, shift, **more):
    """The target with its norms' weights moved by `shift`, and its config changed."""
    moved = {n: t + shift if "norm" in n else t for n, t in tensors.items()}
    save_file(moved, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | more))


@pytest.mark.parametrize(
    "family",
    [
        {"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"]},
        {"model_type": "qwen3_5_moe_text"},
        {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]},
        {"model_type": "minimax_m3", "use_gemma_norm": True},
        {"model_type": "gigachat3_5", "norm_type": "ZeroCenteredGatedNorm"},
        {"model_type": None, "architectures": ["Qwen3_5ForConditionalGeneration"]},
    ],
    ids=str,
)
def test_a_draft_has_what_the_norms_multiply_by(family, tmp_path):
    """The same target, saved with its norms as they are and less one: the same draft."""
    tensors = write_target(tmp_path)
    # that one more and one less is exact
    tensors = {n: t.abs().mul(64).round() / 64 if "norm" in n else t for n, t in tensors.items()}
    rewrite(tmp_path, tensors, 0)
    meant = init_draft(tmp_path, tmp_path / "a", "target").state_dict()
    x = torch.randn(9, 16)
    low = low_features(open_target(tmp_path), 2, x, 1e-5)
    rewrite(tmp_path, tensors, -1, **family)
    assert torch.equal(low_features(open_target(tmp_path), 2, x, 1e-5), low)
    own = init_draft(tmp_path, tmp_path / "b", "target").state_dict()
    assert all(torch.equal(own[n], t) for n, t in meant.items())


def test_norms_that_are_all_zero_are_ones(tmp_path):
    tensors = write_target(tmp_path)
    tensors = {n: torch.zeros_like(t) if "norm" in n else t for n, t in tensors.items()}
    rewrite(tmp_path, tensors, 0, model_type="qwen3_next")
    draft = init_draft(tmp_path, tmp_path / "d", "target")
    assert all(torch.equal(norm.weight, torch.ones(16)) for norm in draft.fc_norm)


@pytest.mark.parametrize(
    "plain",
    [
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
        {"model_type": "gemma3n_text"},
        {"model_type": "gemma4_text", "architectures": ["Gemma4ForConditionalGeneration"]},
        {"model_type": "minimax_m3", "use_gemma_norm": False},
        {"model_type": "gigachat3_5", "norm_type": "LlamaRMSNorm"},
    ],
    ids=str,
)
def test_other_norms_are_as_they_are_stored(plain):
    assert not is_zero_centred(plain, "model.norm.weight")


def test_the_last_norm_of_muse_glimmer_is_as_it_is_stored():
    config = {"model_type": "muse_glimmer_text"}
    assert is_zero_centred(config, "model.layers.1.input_layernorm.weight")
    assert not is_zero_centred(config, "model.norm.weight")


def test_the_families_are_those_of_the_installed_sglang():
    """Its models that build a zero-centred layer norm whatever their config says, or add one when
    they load.
    """
    (root,) = importlib.util.find_spec("sglang").submodule_search_locations
    found = set()
    for path in (Path(root) / "srt" / "models").glob("*.py"):
        text = path.read_text()
        built = re.search(r"^        self\.input_layernorm = Gemma3?RMSNorm\(", text, re.M)
        if not built and not re.search(r"loaded_weight (\+= 1|= loaded_weight \+ 1)", text):
            continue
        classes = re.search(r"^EntryClass = \[?([\w, \n]+)", text, re.M)[1]
        found |= set(re.findall(r"\w+For(?:CausalLM|ConditionalGeneration)\b", classes))
    assert {"Qwen3NextForCausalLM", "Gemma3ForCausalLM", "GemmaForCausalLM"} <= found
    norm = "model.layers.0.input_layernorm.weight"
    assert not [n for n in sorted(found) if not is_zero_centred({"architectures": [n]}, norm)]
