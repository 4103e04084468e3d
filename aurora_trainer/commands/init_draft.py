"""An untrained draft for a given target: random, or started from the target's own last layer and head.

Started from the target, it has the target's head and norms, an RMS norm for each feature, and as many key heads as hold
the embedding. It can copy: it looks for its own token earlier on and proposes what followed (look_back.py).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from aurora_trainer import vocab
from aurora_trainer.commands.look_back import look_back
from aurora_trainer.draft import Draft
from aurora_trainer.draft_config import ARCHITECTURE, DraftConfig, not_computed
from aurora_trainer.target import Target, open_target

Kind = Literal["random", "target"]
LLAMA = {"architectures": [ARCHITECTURE], "model_type": "llama"}


def init_draft(
    target_dir: str | Path,
    out_dir: Path,
    kind: Kind = "target",
    draft_vocab: int | None = None,
    token_counts: Tensor | None = None,
    aux_layer_ids: tuple[int, ...] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Draft:
    """Write config.json and model.safetensors of an untrained draft to out_dir, and return it.

    draft_vocab: keep this many target tokens, the most frequent of token_counts [V] (and every end-of-text token).
    aux_layer_ids: layers of the target whose output is a feature, low to high; None for `default_aux_layer_ids`.
    Raises ValueError for a target that a draft cannot be made for.
    """
    target = open_target(target_dir)
    v = target.config["vocab_size"]
    embed = target.embedding()
    config = draft_config(target, draft_vocab or v, aux_layer_ids)
    d2t = None
    if config.draft_vocab_size < v:
        if token_counts is None or token_counts.shape != (v,):
            raise ValueError(f"a draft vocabulary of {draft_vocab} needs token_counts of shape ({v},)")
        d2t = vocab.most_frequent(token_counts, draft_vocab, keep=target.eos_token_ids)
    if kind == "target":
        config = replace(config, fc_norm=True, num_key_value_heads=enough_key_heads(config))
    elif kind != "random":
        raise ValueError(f"kind {kind!r}: expected random or target")
    draft = Draft(config, embed, d2t)
    randomise(draft, seed)
    if kind == "target":
        layers = target.config["num_hidden_layers"]
        start_from_target(draft, target, tuple(aux_layer_ids or default_aux_layer_ids(layers)), seed)
    draft.save(out_dir, dtype)
    return draft


def default_aux_layer_ids(num_layers: int) -> tuple[int, ...]:
    """Three layers whose outputs are features: SGLang's own choice, or low, middle and last for a shallow target."""
    if num_layers >= 8:
        return (1, num_layers // 2 - 1, num_layers - 4)
    last = num_layers - 2  # the last layer's output is never captured
    return tuple(sorted({0, last // 2, last}))


def draft_config(target: Target, draft_vocab_size: int, aux_layer_ids: tuple[int, ...] | None = None) -> DraftConfig:
    """One layer with the target's widths and heads. Raises ValueError.

    Where the target has none of its own to go by: an MLP of 3 H where the target's experts are narrower than that is
    useful, 8 key heads for latent attention, and no rope scaling for a scaling that the trainer does not compute.
    """
    raw = dict(target.config)
    if target.is_mixture and raw["intermediate_size"] < 2 * raw["hidden_size"]:
        raw["intermediate_size"] = 3 * raw["hidden_size"]
    if "kv_lora_rank" in raw:
        raw["num_key_value_heads"] = min(8, raw["num_attention_heads"])
    if not_computed({k: raw[k] for k in ("rope_theta", "rope_scaling", "rope_parameters") if k in raw} | LLAMA):
        theta = (raw.get("rope_parameters") or {}).get("rope_theta", raw.get("rope_theta", 10000.0))
        raw |= {"rope_theta": theta, "rope_scaling": None, "rope_parameters": None}
    layers = raw["num_hidden_layers"]
    ids = tuple(aux_layer_ids or default_aux_layer_ids(layers))
    if len(ids) < 2 or list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] > layers - 2:
        raise ValueError(
            f"aux layers {ids} of a target of {layers} layers: expected two or more different ids, ascending, "
            f"between 0 and {layers - 2} (the last layer's output is never captured)"
        )
    return DraftConfig.from_json(
        {
            **LLAMA,
            "num_hidden_layers": 1,
            "head_dim": target.head_dim,
            "draft_vocab_size": draft_vocab_size,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(ids)},
            **{
                key: raw[key]
                for key in (
                    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size",
                    "hidden_act", "rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling",
                    "rope_parameters",
                )
                if key in raw
            },
        }
    )  # fmt: skip


@torch.no_grad()
def randomise(draft: Draft, seed: int) -> None:
    """Matrices normal with standard deviation 1 / sqrt(fan in), norms one, biases zero. Reproducible by seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in draft.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


@torch.no_grad()
def start_from_target(draft: Draft, target: Target, outputs: tuple[int, ...], seed: int) -> None:
    """Overwrite what the target can supply; `outputs` are the target's layers whose outputs are the features."""
    layer = draft.layers[0]
    layer.input_layernorm.weight.copy_(target.tensor("model.layers.0.input_layernorm.weight"))
    # the target's next layer reads the output through this norm, which makes massive dimensions small
    for norm, output in zip(draft.fc_norm, outputs, strict=True):
        norm.weight.copy_(target.tensor(f"model.layers.{output + 1}.input_layernorm.weight"))
    look_back(draft, target, outputs[0], seed)


def enough_key_heads(config: DraftConfig) -> int:
    """As few as hold the whole embedding: the next token enters the draft through its value heads alone."""
    heads = config.num_attention_heads
    enough = (n for n in range(config.num_key_value_heads, heads + 1) if n * config.head_dim >= config.hidden_size)
    return next((n for n in enough if heads % n == 0), heads)
