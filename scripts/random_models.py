"""A target and a draft of a real model's shape with random weights, if none can be fetched."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from aurora_sglang_plugin.drafts.eagle3_config import DraftConfig
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.eagle3_init import randomise

# shapes of the targets' config.json, and the draft's vocabulary
SHAPES = {
    "qwen3-8b": (
        dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
             num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936),
        32768,
    ),
    "tiny": (
        dict(hidden_size=128, intermediate_size=256, num_hidden_layers=9,
             num_attention_heads=2, num_key_value_heads=1, head_dim=64, vocab_size=512),
        512,
    ),
}  # fmt: skip


def make_models(home: Path, shape: str) -> tuple[Path, Path]:
    """A target and a draft of random weights, in bfloat16."""
    fields, draft_vocab = SHAPES[shape]
    target, draft = home / "target", home / "draft"
    target.mkdir()
    more = dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_act="silu",
        rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=4096, attention_bias=False,
        tie_word_embeddings=False, eos_token_id=0, torch_dtype="bfloat16",
    )  # fmt: skip
    (target / "config.json").write_text(json.dumps(fields | more))
    shards = target_shards(fields)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        names = list(pool.map(write_shard, itertools.repeat(target), shards, shards.values()))
    weight_map = {name: file for file, tensors in zip(names, shards.values()) for name in tensors}
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    shared = {k: v for k, v in fields.items() if k != "num_hidden_layers"}
    config = DraftConfig(**shared, draft_vocab_size=draft_vocab, max_position_embeddings=4096)
    # the server has the target's own
    embed = torch.zeros(1, 1).expand(fields["vocab_size"], fields["hidden_size"])
    model = Draft(config, embed, None if draft_vocab == fields["vocab_size"] else spread(config))
    randomise(model, 0)
    model.save(draft, torch.bfloat16)
    return target, draft


def target_shards(fields: dict) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes by name, by shard: one for each layer, and one each for embedding and head."""
    hidden, inner, head = (fields[k] for k in ("hidden_size", "intermediate_size", "head_dim"))
    q, kv = (fields[k] * head for k in ("num_attention_heads", "num_key_value_heads"))
    layer = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, q),
        "self_attn.q_norm": (head,), "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    words = (fields["vocab_size"], hidden)
    shards = {
        "embed": {"model.embed_tokens.weight": words},
        "head": {"lm_head.weight": words, "model.norm.weight": (hidden,)},
    }
    for i in range(fields["num_hidden_layers"]):
        shards[f"layer{i}"] = {f"model.layers.{i}.{n}.weight": s for n, s in layer.items()}
    return shards


def write_shard(target: Path, name: str, shapes: dict[str, tuple[int, ...]]) -> str:
    torch.set_num_threads(1)
    torch.manual_seed(hash_of(name))

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        # a block of noise again and again: noise of this size takes a minute
        rows = min(shape[0], 256)
        block = torch.randn(rows, shape[1]) * shape[1] ** -0.5
        signs = torch.randint(2, (-(-shape[0] // rows), 1, shape[1])) * 2 - 1
        return (block * signs).flatten(0, 1)[: shape[0]].to(torch.bfloat16).contiguous()

    file = f"{name}.safetensors"
    save_file({n: values(shape) for n, shape in shapes.items()}, target / file)
    return file


def hash_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def spread(config: DraftConfig) -> torch.Tensor:
    """d2t of draft tokens that lie evenly in the vocabulary."""
    ids = torch.arange(config.draft_vocab_size) * config.vocab_size // config.draft_vocab_size
    return ids - torch.arange(config.draft_vocab_size)
