"""A Qwen3 language model for training on a CPU, or on a GPU: parameters under Hugging Face's names,
arithmetic in few passes.

Dimension letters: B rows, T tokens of a row, H hidden, D head, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3Config

# logits of this many positions exist at a time, so that they stay in the processor's cache
_LOSS_ROWS = 1024


class TargetModel(nn.Module):
    """`forward(ids [B, T])` gives the final hidden states [B, T, H], in the dtype of the
    arithmetic.

    The parameters are float32 and have the names that Qwen3ForCausalLM gives them.
    """

    def __init__(self, config: Qwen3Config, compute_dtype: torch.dtype):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        hidden, head, wide = config.hidden_size, config.head_dim, config.intermediate_size
        shapes = {
            "model.embed_tokens.weight": (config.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not config.tie_word_embeddings:
            shapes["lm_head.weight"] = (config.vocab_size, hidden)
        for layer in range(config.num_hidden_layers):
            shapes |= {
                f"model.layers.{layer}.{name}.weight": shape
                for name, shape in {
                    "input_layernorm": (hidden,),
                    "post_attention_layernorm": (hidden,),
                    "self_attn.q_norm": (head,),
                    "self_attn.k_norm": (head,),
                    "self_attn.q_proj": (config.num_attention_heads * head, hidden),
                    "self_attn.k_proj": (config.num_key_value_heads * head, hidden),
                    "self_attn.v_proj": (config.num_key_value_heads * head, hidden),
                    "self_attn.o_proj": (hidden, config.num_attention_heads * head),
                    "mlp.gate_proj": (wide, hidden),
                    "mlp.up_proj": (wide, hidden),
                    "mlp.down_proj": (hidden, wide),
                }.items()
            }
        self.weights = {name: nn.Parameter(_initial(name, shape)) for name, shape in shapes.items()}
        # Dots are not allowed in the names of registered parameters.
        self.registered = nn.ParameterList(self.weights.values())

    @property
    def head(self) -> torch.Tensor:
        """The output matrix [V, H]."""
        return self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        cast = {
            name: weight.to(self.compute_dtype)
            for name, weight in self.weights.items()
            if "embed" not in name
        }
        x = F.embedding(ids, self.weights["model.embed_tokens.weight"]).to(self.compute_dtype)
        rotary = [part.to(ids.device) for part in self._rotary(ids.size(1))]
        hidden, epsilon = (self.config.hidden_size,), self.config.rms_norm_eps
        for layer in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            part = {
                name.removeprefix(prefix): w for name, w in cast.items() if name.startswith(prefix)
            }
            x = x + self._attention(
                F.rms_norm(x, hidden, part["input_layernorm.weight"], epsilon), part, rotary
            )
            h = F.rms_norm(x, hidden, part["post_attention_layernorm.weight"], epsilon)
            gate, up = F.linear(
                h, torch.cat((part["mlp.gate_proj.weight"], part["mlp.up_proj.weight"]))
            ).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, part["mlp.down_proj.weight"])
        return F.rms_norm(x, hidden, cast["model.norm.weight"], epsilon)

    def _attention(
        self, x: torch.Tensor, part: dict[str, torch.Tensor], rotary: tuple
    ) -> torch.Tensor:
        rows, tokens, _ = x.shape
        head, q_heads, kv_heads = (
            self.config.head_dim,
            self.config.num_attention_heads,
            self.config.num_key_value_heads,
        )
        cos, sin, mask = rotary
        fused = torch.cat([part[f"self_attn.{name}_proj.weight"] for name in "qkv"])
        heads = F.linear(x, fused).view(rows, tokens, -1, head).transpose(1, 2)
        q, k, v = heads.split((q_heads, kv_heads, kv_heads), 1)

        def rotated(raw: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
            left, right = F.rms_norm(raw, (head,), norm, self.config.rms_norm_eps).chunk(2, -1)
            return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)

        q, k = (
            rotated(q, part["self_attn.q_norm.weight"]),
            rotated(k, part["self_attn.k_norm.weight"]),
        )
        # Grouped queries share a key head as more rows of one product; at this size that beats the
        # fused operator.
        q = q.reshape(rows, kv_heads, -1, head)
        scores = (q @ k.mT).view(rows, q_heads, tokens, tokens) * head**-0.5 + mask
        mixed = scores.softmax(-1).view(rows, kv_heads, -1, tokens) @ v
        mixed = mixed.view(rows, q_heads, tokens, head).transpose(1, 2).reshape(rows, tokens, -1)
        return F.linear(mixed, part["self_attn.o_proj.weight"])

    def _rotary(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        theta, head = self.config.rope_parameters["rope_theta"], self.config.head_dim
        angles = torch.arange(tokens)[:, None] * theta ** (-torch.arange(0, head, 2) / head)
        mask = torch.full((tokens, tokens), -1e9).triu(1)
        return tuple(part.to(self.compute_dtype) for part in (angles.cos(), angles.sin(), mask))


def _initial(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        # every layer starts as the identity
        return torch.zeros(shape)
    return torch.randn(shape) * (0.02 if "embed" in name or "lm_head" in name else shape[1] ** -0.5)


class NextTokenLoss(torch.autograd.Function):
    """`apply(hidden [N, H], head [V, H], labels [N], avoid [N] bool or None)`; logits are never
    whole in memory.

    The mean of -log p(label), and of -log(1 - p(label)) if `avoid` says that the label is what
    must not come next (Welleck et al., 2019). The gradients are taken on the way forward: with
    respect to the logits they are p - one_hot(label), times -p(label) / (1 - p(label)) if
    avoided.
    """

    @staticmethod
    def forward(ctx, hidden, head, labels, avoid=None) -> torch.Tensor:
        compute_head = head.to(hidden.dtype)
        d_hidden, d_head, total = torch.empty_like(hidden), torch.zeros_like(head), 0.0
        for start in range(0, len(hidden), _LOSS_ROWS):
            part = slice(start, start + _LOSS_ROWS)
            expected = labels[part, None]
            logits = (hidden[part] @ compute_head.T).float()
            log_p = logits.sub_(logits.logsumexp(-1, keepdim=True))
            label_log_p = log_p.gather(1, expected)
            losses, scale = -label_log_p, torch.full_like(label_log_p, 1 / len(hidden))
            if avoid is not None:
                # bounds the pull of a loop that the model is sure of
                p = label_log_p.exp().clamp(max=0.95)
                losses = torch.where(avoid[part, None], -torch.log1p(-p), losses)
                scale = torch.where(avoid[part, None], -p / (1 - p), 1.0) / len(hidden)
            total += losses.sum()
            d_logits = (
                log_p.exp_()
                .scatter_add_(1, expected, torch.full_like(label_log_p, -1.0))
                .mul_(scale)
            )
            d_logits = d_logits.to(hidden.dtype)
            d_hidden[part] = d_logits @ compute_head
            d_head += d_logits.T @ hidden[part]
        ctx.save_for_backward(d_hidden, d_head)
        return total / len(hidden)

    @staticmethod
    def backward(ctx, d_loss: torch.Tensor):
        d_hidden, d_head = ctx.saved_tensors
        return d_hidden * d_loss.to(d_hidden.dtype), d_head * d_loss, None, None
