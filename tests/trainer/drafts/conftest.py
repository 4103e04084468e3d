"""A small target, and a draft in SGLang's form to rewrite as others write theirs."""

import json

import pytest
from foreign_drafts import AUX, H, V
from models import make_random_draft, make_random_target
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_random_target(tmp_path_factory.mktemp("target"), vocab=V, hidden=H)


@pytest.fixture
def source(target, tmp_path):
    """A draft in SGLang's form, to rewrite: its directory, tensors and config."""
    directory = make_random_draft(tmp_path / "source", target, draft_vocab=40, aux_layer_ids=AUX)
    return (
        directory,
        load_file(directory / "model.safetensors"),
        json.loads((directory / "config.json").read_text()),
    )
