"""An untrained draft for a given target: random, or started from the target's own last layer and head.

Started from the target, the highest aux feature passes through `fc` unchanged, attention adds the embedding of the
slot's own token (as the residual stream of the next position begins with it), and the target's last MLP, final norm and
head read the sum. The final norm is scaled down: the target's head is sharp because the target's states know the next
token, and the draft's, which still say what came before it, would be sharp and wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from aurora_sglang_plugin.aux_layers import ids_that_name
from aurora_sglang_plugin.draft_config import DraftConfig
from aurora_sglang_plugin.rope import nested, read_rope
from aurora_trainer import vocab
from aurora_trainer.draft import Draft
from aurora_trainer.target import Target, open_target

Kind = Literal["random", "target"]
# Standard deviation of the first logits of a state that knows nothing: above a uniform guess by half its square (nats).
SPREAD = 0.25


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

    draft_vocab: keep this many target tokens, the most frequent of token_counts [V] (and every end-of-text token).
    aux_layer_ids: layers of the target whose output is a feature, low to high; None for `default_aux_layer_ids`.
    kv_heads: key-value heads of its attention; None: the target's. eagle31: see `draft_config`.
    Raises ValueError for a target that a draft cannot be made for.
    """
    target = open_target(target_dir)
    v = target.config["vocab_size"]
    embed = target.embedding()
    config = draft_config(target, draft_vocab or v, aux_layer_ids, kv_heads, eagle31)
    d2t = None
    if config.draft_vocab_size < v:
        if token_counts is None or token_counts.shape != (v,):
            raise ValueError(f"a draft vocabulary of {draft_vocab} needs token_counts of shape ({v},)")
        d2t = vocab.most_frequent(token_counts, draft_vocab, keep=target.eos_token_ids)
    draft = Draft(config, embed, d2t)
    randomise(draft, seed)
    if kind == "target":
        act = target.config.get("hidden_act") or target.config.get("hidden_activation") or "silu"
        if act != "silu":
            raise ValueError(
                f"{target.directory}: its MLP computes {act}, a draft's computes silu; expected --kind random"
            )
        start_from_target(draft, target)
    elif kind != "random":
        raise ValueError(f"kind {kind!r}: expected random or target")
    draft.save(out_dir, dtype)
    return draft


def default_aux_layer_ids(num_layers: int) -> tuple[int, ...]:
    """Three layers whose outputs are features: SGLang's own choice, or low, middle and last for a shallow target."""
    if num_layers >= 8:
        return (1, num_layers // 2 - 1, num_layers - 4)
    last = num_layers - 2  # the last layer's output is never captured
    return tuple(sorted({0, last // 2, last}))


def draft_config(
    target: Target,
    draft_vocab_size: int,
    aux_layer_ids: tuple[int, ...] | None = None,
    kv_heads: int | None = None,
    eagle31: bool = False,
) -> DraftConfig:
    """One layer with the target's widths and heads. Raises ValueError.

    Where the target has none of its own to go by: an MLP of 3 H where the target's experts are narrower than that is
    useful, 8 key heads for latent attention, and no rope scaling for a scaling that the trainer does not compute.
    eagle31: the shape of EAGLE 3.1, one norm over all features before fc, and the normed state handed on.
    """
    raw = dict(target.config)
    inner = raw.get("intermediate_size") or 0
    if not inner or (target.is_mixture and inner < 2 * raw["hidden_size"]):
        inner = 3 * raw["hidden_size"]
    if "kv_lora_rank" in raw:
        raw["num_key_value_heads"] = min(8, raw["num_attention_heads"])
    by_layer_type = nested(raw.get("rope_parameters") or {})
    if by_layer_type:
        raw["rope_parameters"] = by_layer_type.get("full_attention", next(iter(by_layer_type.values())))
    theta, scaling, _ = read_rope(raw)
    layers, heads = raw["num_hidden_layers"], raw["num_attention_heads"]
    kv_heads = kv_heads or raw.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(f"--kv-heads {kv_heads}: expected a divisor of the target's {heads} attention heads")
    outputs = tuple(aux_layer_ids or default_aux_layer_ids(layers))
    if len(outputs) < 2:
        raise ValueError(f"aux layers {outputs}: expected two or more different ids, ascending")
    ids = ids_that_name(outputs, target.config)
    return DraftConfig(
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
def start_from_target(draft: Draft, target: Target) -> None:
    """Overwrite what the target's last layer, final norm and head can supply, and `look_at_own_token`."""
    h, layer = draft.config.hidden_size, draft.layers[0]
    last = f"model.layers.{target.config['num_hidden_layers'] - 1}."
    if not (target.stored(f"{last}mlp.gate_proj.weight") or target.packed(f"{last}mlp.gate_proj.weight")):
        raise ValueError(
            f"{target.directory}: its last layer has no dense MLP that a draft could start from (a mixture of experts?)"
            "; expected one, or --kind random"
        )
    draft.fc.weight.zero_()
    draft.fc.weight[:, -h:] = torch.eye(h)
    layer.hidden_norm.weight.copy_(target.tensor(last + "input_layernorm.weight"))
    layer.input_layernorm.weight.copy_(target.tensor("model.layers.0.input_layernorm.weight"))
    layer.post_attention_layernorm.weight.copy_(target.tensor(last + "post_attention_layernorm.weight"))
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(layer.mlp, name).weight.copy_(target.tensor(f"{last}mlp.{name}.weight"))
    norm, head = target.tensor("model.norm.weight").float(), target.head()[vocab.target_ids(draft.d2t)].float()
    # over the vocabulary, of a normalised state of any direction: 3.8 on Qwen2.5-0.5B
    spread = (head * norm).square().sum(-1).mean().sqrt()
    draft.norm.weight.copy_(norm * (SPREAD / spread).clamp(max=1.0))
    draft.lm_head.weight.copy_(head)
    look_at_own_token(draft)


@torch.no_grad()
def look_at_own_token(draft: Draft, sharpness: float = 8.0, sample: int = 8192) -> None:
    """Attention of the first layer that adds, at first, the embedding of the slot's own token to the state.

    In each group of query heads the first one attends to its own slot: its q and the group's k are one random
    projection of the embedding, so that a slot's score with itself (about `sharpness`) exceeds all others. Values are
    the embedding's principal components (as many as all key heads hold), and o_proj maps them back, by least squares
    over `sample` tokens. The other query heads stay random and add nothing yet.
    """
    layer, config = draft.layers[0], draft.config
    attention, h, d, kv_heads = layer.self_attn, config.hidden_size, config.head_dim, config.num_key_value_heads
    group = config.num_attention_heads // kv_heads
    tokens = torch.linspace(0, config.vocab_size - 1, min(sample, config.vocab_size)).long()
    raw = draft.embed[tokens].float()
    x = layer.input_layernorm(raw)  # what the embedding half of q, k and v reads
    rank = min(kv_heads * d, h)
    components = torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)[:, :rank].T  # [rank, H], largest first
    attention.v_proj.weight.zero_()
    attention.v_proj.weight[:rank, :h] = components
    back = torch.linalg.lstsq(x @ components.T, raw).solution.T  # [H, rank]
    attention.o_proj.weight.zero_()
    for head in range(kv_heads):
        projection = torch.linalg.qr(attention.k_proj.weight[head * d : (head + 1) * d, :h].T).Q.T  # [min(D, H), H]
        size = (x @ projection.T).square().sum(-1).mean()  # of a slot's product with itself
        projection = projection * (sharpness * d**0.5 / size).sqrt()
        query, key = head * group * d, head * d  # first rows of the group's first query head and of its key head
        for weight, first in ((attention.q_proj.weight, query), (attention.k_proj.weight, key)):
            weight[first : first + d] = 0
            weight[first : first + len(projection), :h] = projection
        part = back[:, key : key + d]
        attention.o_proj.weight[:, query : query + part.shape[1]] = part
