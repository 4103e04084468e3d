"""The EAGLE3 draft in PyTorch: the computation that SGLang serves, arranged for training.

Dimensions: T positions (packed sequences), R computed positions, Q node queries of one level, M
nodes of all levels so far, H hidden, F feature width, V target vocabulary, VD draft vocabulary, D
head.

`context` is level 0 (the draft-extend of the server: token and target feature of every committed
position), `nodes` is one deeper level (the server's draft steps: token and the parent's state).
States are PRE-norm; `logits` applies the final norm. Each layer's keys and values come back to be
passed to the next level.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from aurora_kernels.tree_attention import tree_attention
from safetensors.torch import save_file
from torch import Tensor, nn

from aurora_sglang_plugin.drafts.eagle3_config import DraftConfig
from aurora_sglang_plugin.drafts.eagle3_vocab import MAP, MAPS
from aurora_trainer.drafts import vocab
from aurora_trainer.drafts.batch import Batch
from aurora_trainer.drafts.eagle3_files import read_tensors
from aurora_trainer.drafts.eagle3_rope import inverse_frequencies, magnitude, rotate

# parameters whose names begin so: the head, and the matrices at either end of the draft
HEAD = ("lm_head",)
ENDS = (*HEAD, "fc")
# for each layer (k, v), both [rows, Hkv, D]
KV = list[tuple[Tensor, Tensor]]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Projections only: what attends to what is the caller's."""

    def __init__(self, config: DraftConfig, size: int):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=False)
        bias = config.bias or config.attention_bias
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=bias)

    def query(self, x: Tensor, rope: Tensor) -> Tensor:
        return rotate(self.q_proj(x).unflatten(-1, (self.heads, -1)), rope)

    def key_value(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (p(x).unflatten(-1, (self.kv_heads, -1)) for p in (self.k_proj, self.v_proj))
        return rotate(k, rope), v


class MLP(nn.Module):
    def __init__(self, config: DraftConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Layer 0 reads cat([embedding, state]); later layers read the state alone."""

    def __init__(self, config: DraftConfig, index: int):
        super().__init__()
        self.is_input_layer = index == 0
        self.self_attn = Attention(config, config.hidden_size * (2 if self.is_input_layer else 1))
        self.mlp = MLP(config)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # the server's later layers hold this one and never read it
        self.input_layernorm.weight.requires_grad_(self.is_input_layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def attention_input(self, embeds: Tensor, state: Tensor) -> Tensor:
        if self.is_input_layer:
            return torch.cat([self.input_layernorm(embeds), self.hidden_norm(state)], -1)
        return self.hidden_norm(state)

    def finish(self, state: Tensor, o: Tensor) -> Tensor:
        """The layer's output (residual included) from its raw input and its attention [.., Hq,
        D].
        """
        state = state + self.self_attn.o_proj(o.flatten(-2))
        return state + self.mlp(self.post_attention_layernorm(state))


class Draft(nn.Module):
    """Parameters carry their checkpoint names.

    `embed` is the target's [V, H]: read, never trained, never saved.
    """

    embed: Tensor
    d2t: Tensor
    draft_ids: Tensor
    inv_freq: Tensor
    # ModuleLists, which cannot say of what
    fc_norm: Sequence[RMSNorm]
    layers: Sequence[Layer]

    def __init__(self, config: DraftConfig, embed: Tensor, d2t: Tensor | None = None):
        super().__init__()
        if embed.shape != (config.vocab_size, config.hidden_size):
            raise ValueError(
                f"the target's embedding is {tuple(embed.shape)}, the draft's config expects"
                f" ({config.vocab_size}, {config.hidden_size}); give the draft the target it was"
                " made for"
            )
        self.config = config
        if d2t is None:
            if config.draft_vocab_size != config.vocab_size:
                raise ValueError(
                    f"a draft vocabulary of {config.draft_vocab_size} of {config.vocab_size}"
                    " needs d2t"
                )
            d2t = torch.zeros(config.vocab_size, dtype=torch.int64)
        vocab.check(d2t, config.draft_vocab_size, config.vocab_size)
        self.register_buffer("embed", embed.detach(), persistent=False)
        self.register_buffer("d2t", d2t, persistent=False)
        self.register_buffer("draft_ids", vocab.draft_ids(d2t, config.vocab_size), persistent=False)
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)
        self.rope_magnitude = magnitude(config)
        width = config.target_hidden_size or config.hidden_size
        if config.norm_before_fc:
            self.input_norm = RMSNorm(config.feature_size, config.rms_norm_eps)
        if config.fc_norm:
            norms = [RMSNorm(width, config.rms_norm_eps) for _ in range(config.num_aux)]
            self.fc_norm = cast(Sequence[RMSNorm], nn.ModuleList(norms))
        self.fc = nn.Linear(config.feature_size, config.hidden_size, bias=config.bias)
        layers = [Layer(config, i) for i in range(config.num_hidden_layers)]
        self.layers = cast(Sequence[Layer], nn.ModuleList(layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)

    def compute_in(self, device: torch.device | str, dtype: torch.dtype) -> Draft:
        """Itself, moved to `device` with weights and embedding in `dtype`; the rotary frequencies
        stay float32.
        """
        inv_freq = self.inv_freq
        self.to(device, dtype)
        self.inv_freq = inv_freq.to(device)
        return self

    def copy(self) -> Draft:
        """Another one with weights of its own; what is the target's is shared by both."""
        return copy.deepcopy(self, {id(self.embed): self.embed})

    def states(self, batch: Batch) -> list[Tensor]:
        """The state [Q, H] of every query of a batch, level by level."""
        first = batch.levels[0]
        state, context_kv = self.context(
            batch.tokens, batch.features, batch.positions, batch.context_start, first.parent
        )
        out, node_kv = [state], None
        for level in batch.levels[1:]:
            state, node_kv = self.nodes(
                level.tokens, out[-1][level.parent], level.positions, context_kv, node_kv,
                level.context_start, level.context_end, level.ancestors,
            )  # fmt: skip
            out.append(state)
        return out

    def context(
        self,
        tokens: Tensor,
        features: Tensor,
        positions: Tensor,
        context_start: Tensor,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, KV]:
        """Level 0.

        Position t holds tokens[t] [T], features[t] [T, F] and attends to positions context_start[t]
        .. t.

        Returns the states [R, H] of the positions `rows` [R] (None: all) and each layer's keys and
        values of all positions. Positions that are context only need no state, hence `rows`.
        """
        embeds, rope = self._embeds(tokens), self._rope(positions)
        state = self._project(features.to(self.fc.weight.dtype))
        kv: KV = []
        index = torch.arange(len(tokens), device=tokens.device)
        for n, layer in enumerate(self.layers):
            x = layer.attention_input(embeds, state)
            kv.append(layer.self_attn.key_value(x, rope))
            if n == len(self.layers) - 1 and rows is not None:
                index, x, state, rope = rows, x[rows], state[rows], rope[rows]
            o = self._attend(layer, x, rope, kv[-1], None, context_start[index], index + 1, None)
            state = layer.finish(state, o)
        return state, kv

    def nodes(
        self,
        tokens: Tensor,
        parent_state: Tensor,
        positions: Tensor,
        context_kv: KV,
        node_kv: KV | None,
        context_start: Tensor,
        context_end: Tensor,
        ancestors: Tensor,
    ) -> tuple[Tensor, KV]:
        """One deeper level of Q queries: tokens [Q] with their parents' states [Q, H].

        node_kv holds the nodes of all earlier levels (None at level 1); this level's follow them in
        order, and `ancestors` int64 [Q, A] (-1: none; each query's own node included) indexes the
        result. Returns the states [Q, H] and the extended node_kv.
        """
        embeds, rope = self._embeds(tokens), self._rope(positions)
        state = self.norm(parent_state) if self.config.norm_output else parent_state
        extended: KV = []
        for n, layer in enumerate(self.layers):
            x = layer.attention_input(embeds, state)
            kv = layer.self_attn.key_value(x, rope)
            if node_kv is not None:
                k, v = (torch.cat([old, new]) for old, new in zip(node_kv[n], kv, strict=True))
                kv = k, v
            extended.append(kv)
            o = self._attend(
                layer, x, rope, context_kv[n], kv, context_start, context_end, ancestors
            )
            state = layer.finish(state, o)
        return state, extended

    def logits(self, state: Tensor) -> Tensor:
        """[.., VD], over draft ids."""
        return self.lm_head(self.norm(state))

    @property
    def head(self) -> tuple[Tensor, Tensor, float]:
        """What makes logits of a state: the norm's weight [H], the head's [VD, H], and epsilon."""
        return self.norm.weight, self.lm_head.weight, self.config.rms_norm_eps

    def to_draft_ids(self, ids: Tensor) -> Tensor:
        """Of target ids; -1 stays, and stands where the draft has no such token."""
        return torch.where(ids >= 0, self.draft_ids[ids.clamp_min(0)], -1)

    def to_target_ids(self, ids: Tensor) -> Tensor:
        """Of draft ids."""
        return ids + self.d2t[ids]

    def _attend(
        self, layer, x, rope, context_kv, node_kv, context_start, context_end, ancestors
    ) -> Tensor:
        q = layer.self_attn.query(x, rope)
        scale = self.config.head_dim**-0.5
        return tree_attention(
            q, *context_kv, *(node_kv or (None, None)), context_start, context_end, ancestors, scale
        )

    def _embeds(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embed).to(self.fc.weight.dtype)

    def _rope(self, positions: Tensor) -> Tensor:
        angles = positions.to(self.inv_freq.dtype)[:, None] * self.inv_freq
        return torch.cat([angles.cos(), angles.sin()], -1) * self.rope_magnitude

    def _project(self, features: Tensor) -> Tensor:
        if self.config.norm_before_fc:
            features = self.input_norm(features)
        if self.config.fc_norm:
            chunks = features.chunk(self.config.num_aux, -1)
            features = torch.cat(
                [norm(c) for norm, c in zip(self.fc_norm, chunks, strict=True)], -1
            )
        return self.fc(features)

    @classmethod
    def load(cls, directory: Path, embed: Tensor) -> Draft:
        """A draft in float32 from config.json and its safetensors.

        Raises ValueError for anything unexpected.
        """
        config, tensors = DraftConfig.read(directory), read_tensors(directory)
        draft = cls(config, embed, tensors.pop(MAP, None))
        draft.load_checkpoint(tensors, str(directory))
        return draft

    @torch.no_grad()
    def load_checkpoint(self, tensors: dict[str, Tensor], whose: str = "checkpoint") -> None:
        """Copy weights in place; the vocabulary's maps are those that it was made with.

        Raises ValueError for missing, unknown, misshapen or non-finite tensors.
        """
        tensors = {n: t for n, t in tensors.items() if n not in MAPS}
        own = dict(self.named_parameters())
        unread = {n for n, p in own.items() if not p.requires_grad}
        missing = sorted(own.keys() - unread - tensors.keys())
        unknown = sorted(tensors.keys() - own.keys())
        if missing or unknown:
            raise ValueError(f"{whose}: tensors missing {missing}, not known {unknown}")
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise ValueError(
                    f"{whose}: {name} is {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
                )
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                raise ValueError(f"{whose}: {name} is {tensor.dtype} or not finite")
        for name, tensor in tensors.items():
            own[name].copy_(tensor)

    def checkpoint(
        self, dtype: torch.dtype = torch.float32, masters: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Copies of what model.safetensors holds, on the CPU; with d2t and t2d where the vocabulary
        is reduced.

        masters: by name, what parameters are the rounding of and what is copied in their stead.
        """
        weights = {n: p.detach() for n, p in self.named_parameters()} | dict(masters or {})
        tensors = {n: w.to("cpu", dtype, copy=True).contiguous() for n, w in weights.items()}
        if self.d2t.any() or len(self.d2t) < self.config.vocab_size:
            tensors[MAP] = self.d2t.cpu().clone()
            tensors["t2d"] = vocab.mask(self.d2t, self.config.vocab_size).cpu()
        return tensors

    def save(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and model.safetensors, not atomically (publishing is somebody
        else's).
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = self.config.to_json(str(dtype).removeprefix("torch."))
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(
            self.checkpoint(dtype), directory / "model.safetensors", metadata={"format": "pt"}
        )
