"""Drafts as others write them: another layout of names and config in a directory that is there."""

import json

from safetensors.torch import save_file

V, H, AUX = 64, 32, [0, 2, 4]


def rewrite(directory, tensors, config):
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))


def speculators(tensors, config):
    """The nested config of speculators and its names; layers by what enters them."""
    names = {n.replace("midlayer.", "layers.0."): t for n, t in tensors.items()}
    outer = ("architectures", "draft_vocab_size", "eagle_config", "tie_word_embeddings")
    nested = {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "draft_vocab_size": 40, "norm_before_residual": False, "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
        "speculators_config": {"algorithm": "eagle3"},
        "transformer_layer_config": {k: v for k, v in config.items() if k not in outer},
    }  # fmt: skip
    return names, nested
