"""An untrained draft for a given target: random, or started from the target's own last layer and
head.

Started from the target, it has the target's head and norms, an RMS norm for each feature, and as
many key heads as hold the embedding. It can copy: it looks for its own token earlier on and
proposes what followed (eagle3_copying.py).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from aurora_sglang_plugin.drafts.aux_layers import ids_that_name
from aurora_sglang_plugin.drafts.eagle3_config import DraftConfig
from aurora_sglang_plugin.drafts.eagle3_rope import nested, read_rope
from aurora_trainer.drafts import vocab
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.eagle3_copying import copy_from_context
from aurora_trainer.drafts.target import Target, open_target

Kind = Literal["random", "target"]
# Standard deviation of the logits of a state that knows nothing; half its square is lost, in nats.
SPREAD = 0.5


def init_draft(
    target_dir: str | Path,
    out_dir: Path,
    kind: Kind = "target",
    draft_vocab: int | None = None,
    token_counts: Tensor | None = None,
    aux_layer_ids: tuple[int, ...] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    kv_heads: int | None = None,
    eagle31: bool = False,
) -> Draft:
    """Write config.json and model.safetensors of an untrained draft to out_dir, and return it.

    draft_vocab: keep this many target tokens, the most frequent of token_counts [V] (and every
        end-of-text token).
    aux_layer_ids: layers of the target whose output is a feature, low to high; None for
        `default_aux_layer_ids`.
    kv_heads: key-value heads of its attention; None: the target's, or as many as hold the embedding
        for
    kind "target". eagle31: see `draft_config`; such a draft takes the target's head and norm, and
    does not copy. Raises ValueError for a target that a draft cannot be made for.
    """
    target = open_target(target_dir)
    v = target.config["vocab_size"]
    embed = target.embedding()
    if kind not in ("random", "target"):
        raise ValueError(f"kind {kind!r}: expected random or target")
    config = draft_config(target, draft_vocab or v, aux_layer_ids, kv_heads, eagle31, kind)
    d2t = None
    if config.draft_vocab_size < v:
        if token_counts is None or token_counts.shape != (v,):
            raise ValueError(
                f"a draft vocabulary of {draft_vocab} needs token_counts of shape ({v},)"
            )
        d2t = vocab.most_frequent(token_counts, draft_vocab, keep=target.eos_token_ids)
    draft = Draft(config, embed, d2t)
    randomise(draft, seed)
    if kind == "target":
        outputs = tuple(aux_layer_ids or default_aux_layer_ids(target.config["num_hidden_layers"]))
        start_from_target(draft, target, outputs, seed)
    draft.save(out_dir, dtype)
    return draft


def default_aux_layer_ids(num_layers: int) -> tuple[int, ...]:
    """Three layers whose outputs are features: SGLang's own choice, or low, middle and last for a
    shallow target.
    """
    if num_layers >= 8:
        return (1, num_layers // 2 - 1, num_layers - 4)
    # the last layer's output is never captured
    last = num_layers - 2
    return tuple(sorted({0, last // 2, last}))


def draft_config(
    target: Target,
    draft_vocab_size: int,
    aux_layer_ids: tuple[int, ...] | None = None,
    kv_heads: int | None = None,
    eagle31: bool = False,
    kind: Kind = "target",
) -> DraftConfig:
    """One layer with the target's widths and heads; of kind "target" with a norm for each feature
    and as many key heads as hold the embedding. Raises ValueError.

    Where the target has none of its own to go by: an MLP of 3 H where the target's experts are
    narrower than that is useful, 8 key heads for latent attention, and no rope scaling for a
    scaling that the trainer does not compute.
    eagle31: the shape of EAGLE 3.1, one norm over all features before fc, and the normed state
        handed on.
    """
    raw = dict(target.config)
    inner = raw.get("intermediate_size") or 0
    if not inner or (target.is_mixture and inner < 2 * raw["hidden_size"]):
        inner = 3 * raw["hidden_size"]
    if "kv_lora_rank" in raw:
        raw["num_key_value_heads"] = min(8, raw["num_attention_heads"])
    by_layer_type = nested(raw.get("rope_parameters") or {})
    if by_layer_type:
        raw["rope_parameters"] = by_layer_type.get(
            "full_attention", next(iter(by_layer_type.values()))
        )
    theta, scaling, _ = read_rope(raw)
    layers, heads = raw["num_hidden_layers"], raw["num_attention_heads"]
    chosen, kv_heads = kv_heads, kv_heads or raw.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(
            f"--kv-heads {kv_heads}: expected a divisor of the target's {heads} attention heads"
        )
    outputs = tuple(aux_layer_ids or default_aux_layer_ids(layers))
    if len(outputs) < 2:
        raise ValueError(f"aux layers {outputs}: expected two or more different ids, ascending")
    ids = ids_that_name(outputs, target.config)
    config = DraftConfig(
        hidden_size=raw["hidden_size"],
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=target.head_dim,
        vocab_size=raw["vocab_size"],
        draft_vocab_size=draft_vocab_size,
        aux_layer_ids=tuple(ids),
        entered_layer_ids=None if ids == list(outputs) else tuple(o + 1 for o in outputs),
        num_aux=len(outputs),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        norm_before_fc=eagle31,
        norm_output=eagle31,
    )
    if kind == "target" and not eagle31:
        heads = chosen or enough_key_heads(config)
        config = replace(config, fc_norm=True, num_key_value_heads=heads)
    return config


@torch.no_grad()
def randomise(draft: Draft, seed: int) -> None:
    """Matrices normal with standard deviation 1 / sqrt(fan in), norms one, biases zero.

    Reproducible by seed.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in draft.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


@torch.no_grad()
def start_from_target(draft: Draft, target: Target, outputs: tuple[int, ...], seed: int) -> None:
    """Overwrite what the target can supply; `outputs` are the target's layers whose outputs are the
    features.
    """
    layer = draft.layers[0]
    layer.input_layernorm.weight.copy_(target.tensor("model.layers.0.input_layernorm.weight"))
    # The target's head is sharp because its states know the next token. These do not: sharp and
    # wrong costs more than a uniform guess.
    norm = target.tensor("model.norm.weight").float()
    head = target.head()[vocab.target_ids(draft.d2t)].float()
    spread = (head * norm).square().sum(-1).mean().sqrt()
    draft.norm.weight.copy_(norm * (SPREAD / spread).clamp(max=1.0))
    draft.lm_head.weight.copy_(head)
    if not draft.config.fc_norm:
        return
    # The target's next layer reads the output through this norm, which makes massive dimensions
    # small.
    for fc_norm, output in zip(draft.fc_norm, outputs, strict=True):
        fc_norm.weight.copy_(target.tensor(f"model.layers.{output + 1}.input_layernorm.weight"))
    copy_from_context(draft, target, outputs[0], head * norm, seed)


def enough_key_heads(config: DraftConfig) -> int:
    """As few as hold the whole embedding: the next token enters the draft through its value heads
    alone.
    """
    heads = config.num_attention_heads
    enough = (
        n
        for n in range(config.num_key_value_heads, heads + 1)
        if n * config.head_dim >= config.hidden_size
    )
    return next((n for n in enough if heads % n == 0), heads)
