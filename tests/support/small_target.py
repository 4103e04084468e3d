"""A small random target, as Hugging Face would save it, to change or to start a draft from."""

import json

import torch
from safetensors.torch import save_file


def write_target(directory, *, model_type="qwen3", layers=4, tied=False, sharded=False, h=16, v=60):
    """A random target as Hugging Face would save it; Qwen3's q_norm and k_norm have no place in the
    draft.
    """
    i, heads, kv, d = 24, 4, 2, 8
    g = torch.Generator().manual_seed(0)
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": model_type, "hidden_size": h,
        "intermediate_size": i,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "vocab_size": v,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
        "rope_theta": 5e4,
        "tie_word_embeddings": tied, "eos_token_id": 59,
    }  # fmt: skip
    if model_type == "qwen3":
        config["head_dim"] = d
    else:
        d = h // heads
    shapes = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    if not tied:
        shapes["lm_head.weight"] = (v, h)
    for n in range(layers):
        at = f"model.layers.{n}."
        shapes |= {
            at + "input_layernorm.weight": (h,), at + "post_attention_layernorm.weight": (h,),
            at + "mlp.gate_proj.weight": (i, h), at + "mlp.up_proj.weight": (i, h),
            at + "mlp.down_proj.weight": (h, i),
            at + "self_attn.q_proj.weight": (heads * d, h),
            at + "self_attn.o_proj.weight": (h, heads * d),
            at + "self_attn.k_proj.weight": (kv * d, h),
            at + "self_attn.v_proj.weight": (kv * d, h),
        }  # fmt: skip
        if model_type == "qwen3":
            shapes |= {at + "self_attn.q_norm.weight": (d,), at + "self_attn.k_norm.weight": (d,)}
    tensors = {n: torch.randn(s, generator=g) for n, s in shapes.items()}
    (directory / "config.json").write_text(json.dumps(config))
    if sharded:
        names = list(tensors)
        parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in parts.items():
            save_file({n: tensors[n] for n in part}, directory / file)
        weight_map = {n: file for file, part in parts.items() for n in part}
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map})
        )
    else:
        save_file(tensors, directory / "model.safetensors")
    return tensors
