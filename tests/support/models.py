"""Random tiny models on disk: a target that SGLang serves and a draft that fits it, in a second."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def make_random_target(
    directory: Path,
    *,
    layers: int = 6,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 512,
    tokenizer: bool = False,
    seed: int = 0,
) -> Path:
    """A Qwen3 checkpoint with random float32 weights; serve it with --skip-tokenizer-init unless
    `tokenizer`.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        eos_token_id=vocab - 1,
        bos_token_id=None,
        # far from uniform logits, so that greedy decoding has no near ties
        initializer_range=0.2,
        dtype="float32",
    )
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    if tokenizer:
        _save_byte_tokenizer(Path(directory), vocab)
    return Path(directory)


def make_random_draft(
    directory: Path,
    target: Path,
    *,
    draft_vocab: int | None = None,
    aux_layer_ids: list[int] | None = None,
    seed: int = 1,
    scale: float = 0.2,
    changes: dict | None = None,
) -> Path:
    """An EAGLE3 checkpoint for `target`, written name by name as SGLang's loader expects it.

    `draft_vocab` prunes the vocabulary to random ids (d2t); `changes` are merged into config.json
    afterwards.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    target_config = json.loads((Path(target) / "config.json").read_text())
    hidden, vocab = target_config["hidden_size"], target_config["vocab_size"]
    heads, kv_heads, head_dim = (
        target_config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    inner, draft_vocab = 2 * hidden, draft_vocab or vocab
    num_aux = len(aux_layer_ids) if aux_layer_ids else 3
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * scale

    tensors = {
        "fc.weight": matrix(hidden, num_aux * hidden),
        "midlayer.self_attn.q_proj.weight": matrix(heads * head_dim, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": matrix(kv_heads * head_dim, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": matrix(kv_heads * head_dim, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": matrix(hidden, heads * head_dim),
        "midlayer.mlp.gate_proj.weight": matrix(inner, hidden),
        "midlayer.mlp.up_proj.weight": matrix(inner, hidden),
        "midlayer.mlp.down_proj.weight": matrix(hidden, inner),
        "lm_head.weight": matrix(draft_vocab, hidden),
    }
    for norm in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        tensors[f"midlayer.{norm}.weight"] = torch.ones(hidden)
    tensors["norm.weight"] = torch.ones(hidden)
    if draft_vocab < vocab:
        ids = torch.randperm(vocab, generator=generator)[:draft_vocab].sort().values
        tensors["d2t"] = ids - torch.arange(draft_vocab)
        tensors["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill_(0, ids, True)
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 4096,
        "vocab_size": vocab,
        "draft_vocab_size": draft_vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    if aux_layer_ids:
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": aux_layer_ids}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config | (changes or {}), indent=1))
    return directory


def _save_byte_tokenizer(directory: Path, vocab: int) -> None:
    """Bytes as tokens; ids past 255 decode to nothing that matters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [f"<{i}>" for i in range(len(alphabet), vocab)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": words[-1],
        "model_max_length": 4096,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
