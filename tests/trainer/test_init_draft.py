import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora_trainer import vocab
from aurora_trainer.commands.init_draft import default_aux_layer_ids, init_draft
from aurora_trainer.commands.look_back import low_features
from aurora_trainer.draft import Draft
from aurora_trainer.target import open_target


def write_target(directory, *, model_type="qwen3", layers=4, tied=False, sharded=False, h=16, v=60):
    """A random target as Hugging Face would save it; Qwen3's q_norm and k_norm have no place in the draft."""
    i, heads, kv, d = 24, 4, 2, 8
    g = torch.Generator().manual_seed(0)
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": model_type, "hidden_size": h, "intermediate_size": i,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": v,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "rope_theta": 5e4,
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
            at + "mlp.gate_proj.weight": (i, h), at + "mlp.up_proj.weight": (i, h), at + "mlp.down_proj.weight": (h, i),
            at + "self_attn.q_proj.weight": (heads * d, h), at + "self_attn.o_proj.weight": (h, heads * d),
            at + "self_attn.k_proj.weight": (kv * d, h), at + "self_attn.v_proj.weight": (kv * d, h),
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
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(tensors, directory / "model.safetensors")
    return tensors


@pytest.mark.parametrize(
    "kind", [{}, {"sharded": True}, {"tied": True}, {"model_type": "llama"}, {"model_type": "llama", "tied": True}]
)
def test_started_from_the_target_it_has_its_head_and_norms(kind, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    tensors = write_target(target, **kind)
    out = tmp_path / "draft"
    init_draft(target, out, "target")
    draft = Draft.load(out, open_target(target).embedding())
    assert draft.config.aux_layer_ids == (0, 1, 2) and draft.config.rope_theta == 5e4
    assert draft.config.head_dim == (4 if kind.get("model_type") == "llama" else 8)
    # 16 numbers of embedding: 4 heads of 4 hold them, 2 of 8
    assert draft.config.num_key_value_heads == (4 if kind.get("model_type") == "llama" else 2)
    head = tensors["model.embed_tokens.weight" if kind.get("tied") else "lm_head.weight"]
    assert torch.equal(draft.lm_head.weight, head)
    softer = draft.norm.weight / tensors["model.norm.weight"]
    torch.testing.assert_close(softer, softer[:1].expand(16))
    for n, norm in enumerate(draft.fc_norm):
        assert torch.equal(norm.weight, tensors[f"model.layers.{n + 1}.input_layernorm.weight"])


def test_started_from_the_target_it_proposes_what_followed_its_token_before(tmp_path):
    """Twelve tokens, then the same twelve again: in the second half it knows the next one, in the first half never."""
    tensors = write_target(tmp_path, model_type="llama", tied=True, h=128, v=300)
    # as much as the embedding, as in a trained model
    tensors = {n: 0.1 * t if ".mlp." in n else t.abs() if "norm" in n else t for n, t in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    draft = init_draft(tmp_path, tmp_path / "d", "target")
    random = torch.Generator().manual_seed(1)
    text = torch.randperm(300, generator=random)[:12].repeat(2)
    at, held = text[:-1], text[1:]  # of each slot: the token at its position, its own
    low = low_features(open_target(tmp_path), 0, draft.embed[at].float(), 1e-5)
    features = torch.cat([low + 0.3 * low.std() * torch.randn(low.shape, generator=random),
                          torch.randn(23, 256, generator=random)], 1)  # fmt: skip
    state, _ = draft.slots(held, features, torch.arange(23), torch.zeros(23, dtype=torch.int64))
    right = draft.logits(state).argmax(-1)[:-1] == text[2:]
    assert right[11:].float().mean() > 0.7 and right[:10].float().mean() < 0.3


def test_random_is_reproducible_by_seed_and_owes_the_target_nothing(tmp_path):
    write_target(tmp_path)
    a, b, c = (init_draft(tmp_path, tmp_path / n, "random", seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert not torch.equal(a.fc.weight, c.fc.weight) and torch.equal(a.fc.weight, b.fc.weight)
    assert a.lm_head.weight.std().item() == pytest.approx(16**-0.5, rel=0.1)


def test_a_reduced_vocabulary_keeps_the_frequent_tokens_their_head_rows_and_end_of_text(tmp_path):
    tensors = write_target(tmp_path)
    counts = torch.arange(60).flip(0) * 10
    draft = init_draft(tmp_path, tmp_path / "d", "target", draft_vocab=10, token_counts=counts)
    ids = vocab.target_ids(draft.d2t)
    assert ids.tolist() == [*range(9), 59]
    assert torch.equal(draft.lm_head.weight, tensors["lm_head.weight"][ids])
    assert torch.equal(Draft.load(tmp_path / "d", draft.embed).d2t, draft.d2t)
    with pytest.raises(ValueError, match="token_counts"):
        init_draft(tmp_path, tmp_path / "e", draft_vocab=10)


@pytest.mark.parametrize("ids", [(0, 1, 3), (1, 1, 2), (2, 1, 0), (2,)])
def test_aux_layers_that_the_server_would_not_capture_are_refused(ids, tmp_path):
    write_target(tmp_path)
    with pytest.raises(ValueError, match="aux layers"):
        init_draft(tmp_path, tmp_path / "d", aux_layer_ids=ids)


def test_default_aux_layers():
    assert default_aux_layer_ids(36) == (1, 17, 32)  # SGLang's, named as outputs
    assert default_aux_layer_ids(4) == (0, 1, 2)
    assert default_aux_layer_ids(6) == (0, 2, 4)


def test_a_directory_without_safetensors_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="safetensors"):
        open_target(tmp_path)


def nest(target, **more):
    """Rewrite a target as the language model of a larger one, as Kimi K2.5 and others are saved."""
    raw = json.loads((target / "config.json").read_text())
    eos = raw.pop("eos_token_id")
    config = {"architectures": ["Other"], "eos_token_id": eos, "text_config": raw | more, "vision_config": {"x": 1}}
    (target / "config.json").write_text(json.dumps(config))
    tensors = load_file(target / "model.safetensors")
    save_file({f"language_model.{n}": t for n, t in tensors.items()}, target / "model.safetensors")
    return tensors


def test_the_language_model_of_a_larger_model(tmp_path):
    write_target(tmp_path)
    tensors = nest(tmp_path)
    target = open_target(tmp_path)
    assert target.eos_token_ids == (59,) and torch.equal(target.head(), tensors["lm_head.weight"])
    draft = init_draft(tmp_path, tmp_path / "d", "target")
    alike = torch.nn.functional.cosine_similarity(draft.norm.weight, tensors["model.norm.weight"], 0)
    assert alike.item() == pytest.approx(1.0)


def test_latent_attention_experts_and_a_foreign_rope_scaling(tmp_path):
    """As in Kimi K2.5: what the target has none of is chosen, and its sparse layers are left out."""
    write_target(tmp_path)
    tensors = nest(
        tmp_path, kv_lora_rank=4, v_head_dim=6, n_routed_experts=8, num_key_value_heads=4, num_attention_heads=4,
        rope_scaling={"type": "yarn", "factor": 64.0}, intermediate_size=8,
    )  # fmt: skip
    draft = init_draft(tmp_path, tmp_path / "d", "random")
    config = draft.config
    assert (config.head_dim, config.num_key_value_heads, config.intermediate_size) == (6, 4, 48)
    assert config.rope_scaling is None and config.rope_theta == 5e4
    kept = {f"language_model.{n}": t for n, t in tensors.items() if "layers.3.mlp" not in n}
    save_file(kept, tmp_path / "model.safetensors")
    started = init_draft(tmp_path, tmp_path / "e", "target")
    assert torch.equal(started.lm_head.weight, tensors["lm_head.weight"])


@pytest.mark.parametrize("massive", [1.0, 300.0])
def test_started_from_the_target_it_guesses_no_worse_than_uniformly(massive, tmp_path):
    """Heads as sharp as real ones, and features of which two dimensions are hundreds of times larger than the rest."""
    tensors = write_target(tmp_path, model_type="llama")
    tensors["model.norm.weight"] = 7 + tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    draft = init_draft(tmp_path, tmp_path / "d", "target")
    features = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    features[:, [33, 46]] *= massive
    tokens = torch.arange(64) % 60
    state, kv = draft.slots(tokens, features, torch.arange(64), torch.zeros(64, dtype=torch.int64))
    own = torch.arange(64)[:, None]
    deeper, _ = draft.nodes(tokens, state, torch.arange(64) + 1, kv, None, own[:, 0] * 0, own[:, 0] + 1, own)
    for states in (state, deeper):
        # against any next tokens: the mean over them is the worst that a target could ask of this draft on average
        guess = draft.logits(states).log_softmax(-1)
        assert -guess.mean() < math.log(60) + 0.15
