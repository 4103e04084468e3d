import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from aurora_trainer.draft import Draft, canonical
from aurora_trainer.draft_config import DraftConfig
from aurora_trainer.init_draft import randomise

CONFIG = DraftConfig(
    hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6, vocab_size=50,
    draft_vocab_size=50, aux_layer_ids=(0, 1, 2),
)  # fmt: skip
VARIANTS = {
    "plain": CONFIG,
    "fc_norm": replace(CONFIG, fc_norm=True),
    "norm_before_fc": replace(CONFIG, norm_before_fc=True),
    "norm_output": replace(CONFIG, norm_output=True),
    "bias": replace(CONFIG, bias=True),
    "two layers": replace(CONFIG, num_hidden_layers=2),
    "two aux of another width": replace(CONFIG, aux_layer_ids=(0, 2), num_aux=2, target_hidden_size=12),
    "reduced vocabulary": replace(CONFIG, draft_vocab_size=20),
    "llama3 rope": replace(CONFIG, rope_scaling={
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    }),
}  # fmt: skip


def make(config: DraftConfig, dtype=torch.float64) -> Draft:
    g = torch.Generator().manual_seed(0)
    embed = torch.randn(config.vocab_size, config.hidden_size, generator=g)
    d2t = None
    if config.draft_vocab_size < config.vocab_size:
        d2t = torch.randperm(config.vocab_size, generator=g)[: config.draft_vocab_size].sort().values
        d2t = d2t - torch.arange(config.draft_vocab_size)
    draft = Draft(config, embed, d2t)
    randomise(draft, 1)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.1)
    return draft.to(dtype)


class Naive:
    """EAGLE3 one token at a time, with a growing KV cache; a node sees a copy of the cache of its parent."""

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
            if s := self.c.rope_scaling:
                n = s["original_max_position_embeddings"] * f / (2 * math.pi)  # turns within the original length
                smooth = min(max((n - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"]), 0), 1)
                f = f * smooth + f / s["factor"] * (1 - smooth)
            angle = torch.tensor(position * f, dtype=torch.float64)
            a, b = x[:, i], x[:, i + half]
            out[:, i], out[:, i + half] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return out

    def project(self, feature):
        if self.c.norm_before_fc:
            feature = self.norm(feature, "input_norm")
        if self.c.fc_norm:
            feature = torch.cat([self.norm(f, f"fc_norm.{i}") for i, f in enumerate(feature.chunk(self.c.num_aux))])
        return self.linear(feature, "fc")

    def step(self, token, state, position, cache):
        """(pre-norm state, logits, cache of every layer after this token)."""
        cache, hidden = [list(layer) for layer in cache], state
        for n in range(self.c.num_hidden_layers):
            at = f"layers.{n}."
            x = self.norm(hidden, at + "hidden_norm")
            if n == 0:
                x = torch.cat([self.norm(self.embed[token], at + "input_layernorm"), x])
            q, k, v = (self.linear(x, f"{at}self_attn.{p}_proj").view(-1, self.c.head_dim) for p in "qkv")
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


@pytest.mark.parametrize("name", VARIANTS)
def test_slots_and_nodes_equal_one_token_at_a_time(name):
    """Two packed sequences that start at different positions; from slot 3 of each a tree of two branches."""
    draft = make(VARIANTS[name])
    naive, g = Naive(draft), torch.Generator().manual_seed(2)
    lengths, starts, hang = (5, 7), (0, 40), 3
    first = (0, 5)
    tokens = torch.randint(50, (12,), generator=g)
    features = torch.randn(12, draft.config.feature_size, generator=g, dtype=torch.float64)
    positions = torch.cat([torch.arange(n) + s for n, s in zip(lengths, starts, strict=True)])
    slot_start = torch.tensor([0] * 5 + [5] * 7)
    rows = torch.tensor([3, 8, 11])
    all_states, _ = draft.slots(tokens, features, positions, slot_start)
    states, slot_kv = draft.slots(tokens, features, positions, slot_start, rows)
    torch.testing.assert_close(states, all_states[rows])

    # level 1: two children of each slot 3; level 2: a child of the second of them
    level_1, level_2 = torch.tensor([7, 9, 11, 13]), torch.tensor([21, 22])
    hangs = torch.tensor([3, 3, 8, 8])
    ancestors = torch.arange(4)[:, None]
    state_1, node_kv = draft.nodes(
        level_1, all_states[hangs], positions[hangs] + 1, slot_kv, None, slot_start[hangs], hangs + 1, ancestors
    )
    ancestors = torch.tensor([[1, 4], [3, 5]])
    hangs = torch.tensor([3, 8])
    state_2, _ = draft.nodes(
        level_2, state_1[[1, 3]], positions[hangs] + 2, slot_kv, node_kv, slot_start[hangs], hangs + 1, ancestors
    )

    for s in range(2):
        cache, caches = [[] for _ in range(draft.config.num_hidden_layers)], []
        for i in range(lengths[s]):
            t = first[s] + i
            state, logits, cache = naive.step(tokens[t], naive.project(features[t]), starts[s] + i, cache)
            caches.append((state, cache))
            torch.testing.assert_close(all_states[t], state)
            torch.testing.assert_close(draft.logits(all_states[t : t + 1])[0], logits)
        root, root_cache = caches[hang]
        for child in range(2):
            at = naive.carried(root), starts[s] + hang + 1, root_cache
            state, _, cache = naive.step(level_1[2 * s + child], *at)
            torch.testing.assert_close(state_1[2 * s + child], state)
        state, _, _ = naive.step(level_2[s], naive.carried(state), starts[s] + hang + 2, cache)
        torch.testing.assert_close(state_2[s], state)


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_and_loaded_is_bit_exact(name, tmp_path):
    draft = make(VARIANTS[name], torch.float32)
    draft.save(tmp_path)
    loaded = Draft.load(tmp_path, draft.embed)
    assert loaded.config == draft.config and torch.equal(loaded.d2t, draft.d2t)
    own, other = draft.checkpoint(), loaded.checkpoint()
    assert own.keys() == other.keys() and all(torch.equal(own[n], other[n]) for n in own)
    assert ("d2t" in own) == ("t2d" in own) == (name == "reduced vocabulary")
    assert not any("embed" in n for n in load_file(tmp_path / "model.safetensors"))


def test_the_saved_config_means_the_same_to_transformers(tmp_path):
    """SGLang reads config.json with transformers."""
    transformers = pytest.importorskip("transformers")
    config = replace(VARIANTS["llama3 rope"], rope_theta=5000.0)
    make(config, torch.float32).save(tmp_path)
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert read.rope_parameters["rope_theta"] == 5000.0 and read.rope_parameters["rope_type"] == "llama3"
    assert (read.head_dim, read.tie_word_embeddings, read.draft_vocab_size) == (6, False, 50)
    assert DraftConfig.from_json(json.loads(read.to_json_string(use_diff=False))) == config


def test_names_of_other_trainers_load(tmp_path):
    draft = make(VARIANTS["fc_norm"], torch.float32)
    draft.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    low_mid_high = {"fc_norm.0": "aux_norm_low", "fc_norm.1": "aux_norm_mid", "fc_norm.2": "aux_norm_high"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in {"layers.0": "midlayer", **low_mid_high}.items():
            name = name.replace(new, old)
        renamed[name if name.startswith("lm_head") else "model." + name] = tensor
    assert {canonical(n) for n in renamed} == set(tensors)
    save_file({**renamed, "embed_tokens.weight": torch.zeros(50, 16)}, tmp_path / "model.safetensors")
    loaded = Draft.load(tmp_path, draft.embed).checkpoint()
    assert all(torch.equal(loaded[n], tensors[n]) for n in tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "missing.*norm.weight"),
        (lambda t: t.update({"surprise.weight": torch.zeros(1)}), "not known.*surprise"),
        (lambda t: t.update({"fc.weight": torch.zeros(2, 2)}), r"fc.weight is \(2, 2\)"),
        (lambda t: t.update({"norm.weight": torch.full((16,), math.nan)}), "not finite"),
        (lambda t: t.update({"d2t": torch.zeros(20, dtype=torch.int64) + 40}), "d2t does not name"),
        (lambda t: t.update({"t2d": ~t["t2d"]}), "t2d and d2t disagree"),
        (lambda t: t.pop("d2t"), "needs d2t"),
    ],
)
def test_an_unexpected_checkpoint_is_refused(change, message, tmp_path):
    draft = make(VARIANTS["reduced vocabulary"], torch.float32)
    draft.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        Draft.load(tmp_path, draft.embed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"draft_vocab_size": None}, "draft_vocab_size is absent or null"),
        ({"draft_vocab_size": 51}, "draft_vocab_size 51"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ({"num_aux_hidden_states": 1, "eagle_config": None}, "never apply fc"),
        ({"num_aux_hidden_states": 2}, "names"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
        ({"num_key_value_heads": 3}, "multiple"),
    ],
)
def test_a_config_that_cannot_be_computed_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DraftConfig.from_json({**CONFIG.to_json(), **change})


def test_the_embedding_is_read_but_neither_trained_nor_saved():
    draft = make(CONFIG, torch.float32)
    assert not draft.embed.requires_grad and "embed" not in draft.state_dict()
    with pytest.raises(ValueError, match="embedding"):
        Draft(CONFIG, torch.zeros(49, 16))
