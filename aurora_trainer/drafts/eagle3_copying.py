"""An untrained draft that can copy, from the target's weights alone: it looks for its token and
proposes what followed.

Position j holds the token after position j and the features of position j. The lowest feature says
which token stood AT j. So a position whose own token stood at j before attends to position j, and
proposes the token that position j holds. Half of the key heads do this. The other half attend to
their own position and hand its embedding to the MLP, the target's last.

What links the two views of a token, its embedding and the lowest feature, are canonical variates
over the vocabulary: the pairs of directions that agree best. Features of single tokens come from
the target's low layers, attention left out. Queries and keys match in the rotary pairs that turn
least with distance.

Dimensions: H hidden, D head, V tokens looked at, VD draft vocabulary, R directions that match
    tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aurora_trainer.drafts import vocab
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.target import Target

# tokens looked at; at least 2 H
SAMPLE = 8192
# R
MATCHED = 64
# radians a token that a rotary pair may turn
SLOW = 1e-3
# of the mean variance of a direction
RIDGE = 0.3
# attention score of a match; others are around 0
SHARPNESS = 20.0
# and of a position with itself
OWN_SHARPNESS = 8.0
# Sizes of what makes up the state: the token at its position, the highest feature, all features
# mixed at random, its own token's embedding, the token to copy.
AT, HIGHEST, MIXED, OWN, COPY = 3.0, 0.5, 0.1, 1.0, 3.0
# of what the target's last MLP would add
MLP = 0.2


@torch.no_grad()
def copy_from_context(draft: Draft, target: Target, lowest: int, rows: Tensor, seed: int) -> None:
    """Overwrite a random draft's fc, attention and MLP; `lowest` is the target layer whose output
    is the lowest feature, `rows` [VD, H] the target's head times its norm, of the draft's
    vocabulary.

    Expects `fc_norm` with the weights that the draft is to have. A low layer without a dense SiLU
    MLP is left out.
    """
    layer, config = draft.layers[0], draft.config
    h, kv_heads, d = config.hidden_size, config.num_key_value_heads, config.head_dim
    random = torch.Generator().manual_seed(seed)
    ids = vocab.target_ids(draft.d2t)
    some = torch.linspace(0, len(ids) - 1, min(len(ids), max(SAMPLE, 2 * h))).long()
    raw = draft.embed[ids[some]].float()
    # what queries and values read
    x = layer.input_layernorm(raw)
    feature = draft.fc_norm[0](low_features(target, lowest, raw, config.rms_norm_eps))
    of_embedding, of_feature = canonical_variates(x, feature, min(MATCHED, h // 2))
    matched = len(of_feature)

    # directions of the state that say which token stood at its position
    where = _orthonormal(matched, h, random)
    draft.fc.weight.mul_(MIXED)
    draft.fc.weight[:, :h] += AT * where.T @ of_feature
    draft.fc.weight[:, -h:] += HIGHEST * torch.eye(h)
    layer.hidden_norm.weight.fill_(1.0)
    # its size, about, which hidden_norm divides by
    state = (AT**2 * matched / h + HIGHEST**2) ** 0.5
    _last_mlp(draft, target)

    attention, group = layer.self_attn, config.num_attention_heads // kv_heads
    copies = max(1, kv_heads // 2)
    slow = min(max(int((draft.inv_freq < SLOW).sum()), 1), matched // 2 or 1)
    pairs = torch.arange(d // 2 - slow, d // 2)
    turned = torch.cat([pairs, pairs + d // 2])[: max(matched, 1)]
    values, back = _copied(x, rows[some], min(copies * d, h))
    attention.q_proj.weight.mul_(0.1)
    attention.k_proj.weight.zero_()
    attention.v_proj.weight.zero_()
    attention.o_proj.weight.zero_()
    own = _orthonormal(min(h, max(kv_heads - copies, 0) * d), h, random)
    for head_of in range(kv_heads):
        # first rows of its first query head and of the key head
        query, key = head_of * group * d, head_of * d
        q, k, v = (
            attention.q_proj.weight[query:],
            attention.k_proj.weight[key:],
            attention.v_proj.weight[key:],
        )
        q[:d] = 0
        if head_of < copies:
            mix = _orthonormal(len(turned), matched, random)
            scale = (SHARPNESS * d**0.5 / len(turned)) ** 0.5
            q[turned, :h] = scale * mix @ of_embedding
            k[turned, h:] = scale * mix @ where * (state / AT)
            part = slice(key, min(key + d, len(values)))
            v[: len(values[part]), :h] = values[part]
            attention.o_proj.weight[:, query : query + len(values[part])] = COPY * back[:, part]
        else:
            look = _orthonormal(len(turned), h, random)
            look *= (OWN_SHARPNESS * d**0.5 / (x @ look.T).square().sum(-1).mean()).sqrt()
            q[turned, :h] = look
            k[turned, :h] = look
            v[:d, :h] = torch.randn(d, h, generator=random) / (h**0.5 * x.square().mean().sqrt())
            first = (head_of - copies) * d
            own_rows = own[first : first + d]
            attention.o_proj.weight[:, query : query + len(own_rows)] = (
                OWN * own_rows.T * (h / len(own)) ** 0.5
            )


def _last_mlp(draft: Draft, target: Target) -> None:
    """The target's last MLP, where it is dense and of the draft's width; its share is small: it
    knows other states.
    """
    layer, at = draft.layers[0], f"model.layers.{target.config['num_hidden_layers'] - 1}."
    layer.mlp.down_proj.weight.zero_()
    names = [f"{name}_proj" for name in ("gate", "up", "down")]
    if not all(target.stored(f"{at}mlp.{name}.weight") for name in names):
        return
    weights = [target.tensor(f"{at}mlp.{name}.weight").float() for name in names]
    if weights[0].shape == layer.mlp.gate_proj.weight.shape:
        layer.post_attention_layernorm.weight.copy_(
            target.norm(at + "post_attention_layernorm.weight")
        )
        for name, weight, share in zip(names, weights, (1.0, 1.0, MLP), strict=True):
            getattr(layer.mlp, name).weight.copy_(share * weight)


@torch.no_grad()
def low_features(target: Target, layers_up_to: int, x: Tensor, eps: float) -> Tensor:
    """What the target's layers 0 ..

    `layers_up_to` make of embeddings x [V, H] by their MLPs alone.
    """
    act = target.config.get("hidden_act") or target.config.get("hidden_activation") or "silu"
    for n in range(layers_up_to + 1 if act == "silu" else 0):
        at = f"model.layers.{n}."
        names = [f"{at}mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
        if all(map(target.stored, [*names, at + "post_attention_layernorm.weight"])):
            weight = target.norm(at + "post_attention_layernorm.weight")
            y = F.rms_norm(x, weight.shape, weight, eps)
            gate, up, down = (target.tensor(name).float() for name in names)
            x = x + (F.silu(y @ gate.T) * (y @ up.T)) @ down.T
    return x


def canonical_variates(x: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(a, b), both [count, H]: of x and y [V, H], the pairs of directions that agree best, each of
    variance one.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    white_x, white_y = _whitening(x), _whitening(y)
    u, _, vt = torch.linalg.svd(white_x @ (x.T @ y / len(x)) @ white_y)
    a, b = u[:, :count].T @ white_x, vt[:count] @ white_y
    return a / (x @ a.T).std(0)[:, None], b / (y @ b.T).std(0)[:, None]


def _whitening(x: Tensor) -> Tensor:
    covariance = x.T @ x / len(x)
    covariance += RIDGE * covariance.trace() / len(covariance) * torch.eye(len(covariance))
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.rsqrt() @ vectors.T


def _copied(x: Tensor, rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(values [rank, H] of x, back [H, rank]): the head's rows [V, H] by least squares from `rank`
    numbers of x.
    """
    rows = rows - rows.mean(0)
    rows = rows / rows.square().mean(-1, keepdim=True).sqrt()
    x = x - x.mean(0)
    values = torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)[:, :rank].T
    z = x @ values.T
    gram = z.T @ z
    gram += 0.01 * gram.trace() / rank * torch.eye(rank)
    return values, torch.linalg.solve(gram, z.T @ rows).T


def _orthonormal(count: int, size: int, random: torch.Generator) -> Tensor:
    """[count, size], rows of length one at right angles; fewer where `size` is smaller."""
    return torch.linalg.qr(torch.randn(size, min(count, size), generator=random)).Q.T
