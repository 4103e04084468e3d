"""An untrained draft for a given target: random, or started from the target's own last layer and
head.

Started from the target, it has the target's head and norms, an RMS norm for each feature, and as
many key heads as hold the embedding. It can copy: it looks for its own token earlier on and
proposes what followed (eagle3_copying.py).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from aurora_sglang_plugin.drafts.eagle3_for_target import (
    Kind,
    default_aux_layer_ids,
    draft_config,
)
from aurora_sglang_plugin.drafts.kinds import UNTRAINED
from aurora_trainer.drafts import vocab
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.eagle3_copying import copy_from_context
from aurora_trainer.drafts.target import Target, open_target

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
        end-of-text token); None: as many as `draft_config` says. Without counts the first ids are
        kept: a tokenizer's most frequent ones.
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
    config = draft_config(target.config, draft_vocab, aux_layer_ids, kv_heads, eagle31, kind)
    if token_counts is None:
        token_counts = torch.arange(v, 0, -1)
    if token_counts.shape != (v,):
        raise ValueError(
            f"token counts are of shape {tuple(token_counts.shape)}; expected ({v},), one for each"
            " token of the target"
        )
    d2t = None
    if config.draft_vocab_size < v:
        size, ends = config.draft_vocab_size, target.eos_token_ids
        d2t = vocab.most_frequent(token_counts, size, keep=ends)
    draft = Draft(config, embed, d2t)
    randomise(draft, seed)
    if kind == "target":
        outputs = tuple(aux_layer_ids or default_aux_layer_ids(target.config["num_hidden_layers"]))
        start_from_target(draft, target, outputs, seed)
    draft.save(out_dir, dtype)
    _say_untrained(out_dir / "config.json")
    return draft


def _say_untrained(config: Path) -> None:
    said = json.loads(config.read_text()) | {UNTRAINED: True}
    config.write_text(json.dumps(said, indent=2) + "\n")


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
    layer.input_layernorm.weight.copy_(target.norm("model.layers.0.input_layernorm.weight"))
    # The target's head is sharp because its states know the next token. These do not: sharp and
    # wrong costs more than a uniform guess.
    norm = target.norm("model.norm.weight")
    head = target.head()[vocab.target_ids(draft.d2t)].float()
    spread = (head * norm).square().sum(-1).mean().sqrt()
    draft.norm.weight.copy_(norm * (SPREAD / spread).clamp(max=1.0))
    draft.lm_head.weight.copy_(head)
    if not draft.config.fc_norm:
        return
    # The target's next layer reads the output through this norm, which makes massive dimensions
    # small.
    for fc_norm, output in zip(draft.fc_norm, outputs, strict=True):
        fc_norm.weight.copy_(target.norm(f"model.layers.{output + 1}.input_layernorm.weight"))
    copy_from_context(draft, target, outputs[0], head * norm, seed)
