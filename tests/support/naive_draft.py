"""Drafts of every variant, and EAGLE3 computed one token at a time to compare them with."""

import math
from dataclasses import replace

import torch

from aurora_sglang_plugin.drafts.eagle3_config import DraftConfig
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.eagle3_init import randomise

CONFIG = DraftConfig(
    hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
    vocab_size=50,
    draft_vocab_size=50, aux_layer_ids=(0, 1, 2),
)  # fmt: skip
VARIANTS = {
    "plain": CONFIG,
    "fc_norm": replace(CONFIG, fc_norm=True),
    "norm_before_fc": replace(CONFIG, norm_before_fc=True),
    "norm_output": replace(CONFIG, norm_output=True),
    "bias": replace(CONFIG, bias=True),
    "two layers": replace(CONFIG, num_hidden_layers=2),
    "two aux of another width": replace(CONFIG, aux_layer_ids=(0, 2), num_aux=2,
    target_hidden_size=12),
    "reduced vocabulary": replace(CONFIG, draft_vocab_size=20),
    "attention_bias": replace(CONFIG, attention_bias=True),
    "EAGLE 3.1": replace(CONFIG, norm_before_fc=True, norm_output=True),
    "yarn rope": replace(CONFIG, rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 4.0,
        "beta_slow": 1.0,
        "extrapolation_factor": 1, "attn_factor": 1.25, "truncate": True,
    }),
    "linear rope": replace(CONFIG, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "llama3 rope": replace(CONFIG, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }),
}  # fmt: skip


def make(config: DraftConfig, dtype=torch.float64) -> Draft:
    g = torch.Generator().manual_seed(0)
    embed = torch.randn(config.vocab_size, config.hidden_size, generator=g)
    d2t = None
    if config.draft_vocab_size < config.vocab_size:
        d2t = (
            torch.randperm(config.vocab_size, generator=g)[: config.draft_vocab_size].sort().values
        )
        d2t = d2t - torch.arange(config.draft_vocab_size)
    draft = Draft(config, embed, d2t)
    randomise(draft, 1)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return draft.to(dtype)


class Naive:
    """EAGLE3 one token at a time, with a growing KV cache; a node sees a copy of the cache of its
    parent.
    """

    def __init__(self, draft: Draft):
        self.c, self.w, self.embed = draft.config, draft.checkpoint(torch.float64), draft.embed

    def norm(self, x, name):
        return x / (x.pow(2).mean() + self.c.rms_norm_eps).sqrt() * self.w[name + ".weight"]

    def linear(self, x, name):
        return self.w[name + ".weight"] @ x + self.w.get(name + ".bias", 0.0)

    def rope(self, x, position):
        half, out = self.c.head_dim // 2, x.clone()
        for i in range(half):
            f = self.c.rope_theta ** (-2 * i / self.c.head_dim)
            size, s = 1.0, self.c.rope_scaling or {"rope_type": "default"}
            if s["rope_type"] == "llama3":
                # turns within the original length
                n = s["original_max_position_embeddings"] * f / (2 * math.pi)
                smooth = min(
                    max(
                        (n - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"]),
                        0,
                    ),
                    1,
                )
                f = f * smooth + f / s["factor"] * (1 - smooth)
            elif s["rope_type"] == "linear":
                f = f / s["factor"]
            elif s["rope_type"] == "yarn":
                low, high = (
                    self.c.head_dim
                    * math.log(s["original_max_position_embeddings"] / (2 * math.pi * s[beta]))
                    / (2 * math.log(self.c.rope_theta))
                    for beta in ("beta_fast", "beta_slow")
                )  # fmt: skip
                slow = min(
                    max(
                        (i - max(math.floor(low), 0)) / (math.ceil(high) - max(math.floor(low), 0)),
                        0,
                    ),
                    1,
                )
                f = f * (1 - slow) + f / s["factor"] * slow
                size = s["attn_factor"] * (1 + 0.1 * math.log(s["factor"]))
            angle = torch.tensor(position * f, dtype=torch.float64)
            a, b = x[:, i], x[:, i + half]
            cos, sin = size * angle.cos(), size * angle.sin()
            out[:, i], out[:, i + half] = a * cos - b * sin, b * cos + a * sin
        return out

    def project(self, feature):
        if self.c.norm_before_fc:
            feature = self.norm(feature, "input_norm")
        if self.c.fc_norm:
            feature = torch.cat(
                [self.norm(f, f"fc_norm.{i}") for i, f in enumerate(feature.chunk(self.c.num_aux))]
            )
        return self.linear(feature, "fc")

    def step(self, token, state, position, cache):
        """(pre-norm state, logits, cache of every layer after this token)."""
        cache, hidden = [list(layer) for layer in cache], state
        for n in range(self.c.num_hidden_layers):
            at = f"layers.{n}."
            x = self.norm(hidden, at + "hidden_norm")
            if n == 0:
                x = torch.cat([self.norm(self.embed[token], at + "input_layernorm"), x])
            q, k, v = (
                self.linear(x, f"{at}self_attn.{p}_proj").view(-1, self.c.head_dim) for p in "qkv"
            )
            q, k = self.rope(q, position), self.rope(k, position)
            cache[n].append((k, v))
            o = []
            for h in range(self.c.num_attention_heads):
                g = h // (self.c.num_attention_heads // self.c.num_key_value_heads)
                keys, values = (torch.stack([kv[i][g] for kv in cache[n]]) for i in (0, 1))
                o.append(torch.softmax(keys @ q[h] / self.c.head_dim**0.5, 0) @ values)
            hidden = hidden + self.linear(torch.cat(o), at + "self_attn.o_proj")
            x = self.norm(hidden, at + "post_attention_layernorm")
            gate, up = self.linear(x, at + "mlp.gate_proj"), self.linear(x, at + "mlp.up_proj")
            hidden = hidden + self.linear(gate / (1 + (-gate).exp()) * up, at + "mlp.down_proj")
        return hidden, self.w["lm_head.weight"] @ self.norm(hidden, "norm"), cache

    def carried(self, state):
        return self.norm(state, "norm") if self.c.norm_output else state
