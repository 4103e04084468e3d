import json
import math
from dataclasses import replace

import pytest
import torch
from naive_draft import CONFIG, VARIANTS, Naive, make
from safetensors.torch import load_file, save_file

from aurora_sglang_plugin.drafts.eagle3_config import DraftConfig
from aurora_sglang_plugin.drafts.tensor_files import canonical_name
from aurora_trainer.drafts.eagle3 import Draft

# the rotary frequencies are float32, as SGLang's
NEAR = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("name", VARIANTS)
def test_positions_and_nodes_equal_one_token_at_a_time(name):
    """Two packed sequences that start at different positions; from position 3 of each a tree of two
    branches.
    """
    draft = make(VARIANTS[name])
    naive, g = Naive(draft), torch.Generator().manual_seed(2)
    lengths, starts, hang = (5, 7), (0, 40), 3
    first = (0, 5)
    tokens = torch.randint(50, (12,), generator=g)
    features = torch.randn(12, draft.config.feature_size, generator=g, dtype=torch.float64)
    positions = torch.cat([torch.arange(n) + s for n, s in zip(lengths, starts, strict=True)])
    context_start = torch.tensor([0] * 5 + [5] * 7)
    rows = torch.tensor([3, 8, 11])
    all_states, _ = draft.context(tokens, features, positions, context_start)
    states, context_kv = draft.context(tokens, features, positions, context_start, rows)
    torch.testing.assert_close(states, all_states[rows])

    # level 1: two children of each position 3; level 2: a child of the second of them
    level_1, level_2 = torch.tensor([7, 9, 11, 13]), torch.tensor([21, 22])
    hangs = torch.tensor([3, 3, 8, 8])
    ancestors = torch.arange(4)[:, None]
    state_1, node_kv = draft.nodes(
        level_1,
        all_states[hangs],
        positions[hangs] + 1,
        context_kv,
        None,
        context_start[hangs],
        hangs + 1,
        ancestors,
    )
    ancestors = torch.tensor([[1, 4], [3, 5]])
    hangs = torch.tensor([3, 8])
    state_2, _ = draft.nodes(
        level_2,
        state_1[[1, 3]],
        positions[hangs] + 2,
        context_kv,
        node_kv,
        context_start[hangs],
        hangs + 1,
        ancestors,
    )

    for s in range(2):
        cache, caches = [[] for _ in range(draft.config.num_hidden_layers)], []
        for i in range(lengths[s]):
            t = first[s] + i
            state, logits, cache = naive.step(
                tokens[t], naive.project(features[t]), starts[s] + i, cache
            )
            caches.append((state, cache))
            torch.testing.assert_close(all_states[t], state, **NEAR)
            torch.testing.assert_close(draft.logits(all_states[t : t + 1])[0], logits, **NEAR)
        root, root_cache = caches[hang]
        for child in range(2):
            at = naive.carried(root), starts[s] + hang + 1, root_cache
            state, _, cache = naive.step(level_1[2 * s + child], *at)
            torch.testing.assert_close(state_1[2 * s + child], state, **NEAR)
        state, _, _ = naive.step(level_2[s], naive.carried(state), starts[s] + hang + 2, cache)
        torch.testing.assert_close(state_2[s], state, **NEAR)


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
    assert (
        read.rope_parameters["rope_theta"] == 5000.0
        and read.rope_parameters["rope_type"] == "llama3"
    )
    assert (read.head_dim, read.tie_word_embeddings, read.draft_vocab_size) == (6, False, 50)
    assert DraftConfig.from_json(json.loads(read.to_json_string(use_diff=False))) == config


def test_names_of_other_trainers_load(tmp_path):
    draft = make(VARIANTS["fc_norm"], torch.float32)
    draft.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    low_mid_high = {
        "fc_norm.0": "aux_norm_low",
        "fc_norm.1": "aux_norm_mid",
        "fc_norm.2": "aux_norm_high",
    }
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in {"layers.0": "midlayer", **low_mid_high}.items():
            name = name.replace(new, old)
        renamed[name if name.startswith("lm_head") else "model." + name] = tensor
    assert {canonical_name(n) for n in renamed} == set(tensors)
    save_file(
        {**renamed, "embed_tokens.weight": torch.zeros(50, 16)}, tmp_path / "model.safetensors"
    )
    loaded = Draft.load(tmp_path, draft.embed).checkpoint()
    assert all(torch.equal(loaded[n], tensors[n]) for n in tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "missing.*norm.weight"),
        (lambda t: t.update({"surprise.weight": torch.zeros(1)}), "not known.*surprise"),
        (lambda t: t.update({"fc.weight": torch.zeros(2, 2)}), r"fc.weight is \(2, 2\)"),
        (lambda t: t.update({"norm.weight": torch.full((16,), math.nan)}), "not finite"),
        (
            lambda t: t.update({"d2t": torch.zeros(20, dtype=torch.int64) + 40}),
            "d2t maps draft ids",
        ),
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
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"draft_vocab_size": None}, "draft_vocab_size is absent or null"),
        ({"draft_vocab_size": 51}, "draft_vocab_size is 51"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
        ({"num_aux_hidden_states": 1, "eagle_config": None}, "never apply fc"),
        ({"num_aux_hidden_states": 2}, "num_aux_hidden_states is 2, but 3 layers"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
        ({"num_key_value_heads": 3}, "expected a divisor"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
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
