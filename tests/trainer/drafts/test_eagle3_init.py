"""A new draft: what it takes from its target, which layers it is given, and that it guesses no
worse than uniformly.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_target import write_target

from aurora_sglang_plugin.drafts.aux_layers import aux_layer_ids
from aurora_sglang_plugin.drafts.eagle3_check import check_draft
from aurora_sglang_plugin.drafts.eagle3_for_target import default_aux_layer_ids
from aurora_sglang_plugin.drafts.kinds import UNTRAINED
from aurora_trainer.drafts import vocab
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.eagle3_copying import low_features
from aurora_trainer.drafts.eagle3_export import read_weights, write_draft
from aurora_trainer.drafts.eagle3_init import init_draft
from aurora_trainer.drafts.target import open_target


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"sharded": True},
        {"tied": True},
        {"model_type": "llama"},
        {"model_type": "llama", "tied": True},
    ],
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
    """Twelve tokens, then the same twelve again: in the second half it knows the next one, in the
    first half never.
    """
    tensors = write_target(tmp_path, model_type="llama", tied=True, h=128, v=300)
    # as much as the embedding, as in a trained model
    tensors = {
        n: 0.1 * t if ".mlp." in n else t.abs() if "norm" in n else t for n, t in tensors.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    draft = init_draft(tmp_path, tmp_path / "d", "target")
    random = torch.Generator().manual_seed(1)
    text = torch.randperm(300, generator=random)[:12].repeat(2)
    # of each position: the token at its position, its own
    at, held = text[:-1], text[1:]
    low = low_features(open_target(tmp_path), 0, draft.embed[at].float(), 1e-5)
    features = torch.cat([low + 0.3 * low.std() * torch.randn(low.shape, generator=random),
                          torch.randn(23, 256, generator=random)], 1)  # fmt: skip
    state, _ = draft.context(held, features, torch.arange(23), torch.zeros(23, dtype=torch.int64))
    right = draft.logits(state).argmax(-1)[:-1] == text[2:]
    assert right[11:].float().mean() > 0.7 and right[:10].float().mean() < 0.3


def test_random_is_reproducible_by_seed_and_owes_the_target_nothing(tmp_path):
    write_target(tmp_path)
    a, b, c = (
        init_draft(tmp_path, tmp_path / n, "random", seed=s)
        for n, s in (("a", 0), ("b", 0), ("c", 1))
    )
    assert (tmp_path / "a/model.safetensors").read_bytes() == (
        tmp_path / "b/model.safetensors"
    ).read_bytes()
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
    # without counts: the first ids
    draft = init_draft(tmp_path, tmp_path / "e", draft_vocab=10)
    assert vocab.target_ids(draft.d2t).tolist() == [*range(9), 59]
    with pytest.raises(ValueError, match=r"of shape \(59,\); expected \(60,\)"):
        init_draft(tmp_path, tmp_path / "f", draft_vocab=10, token_counts=counts[1:])


@pytest.mark.parametrize("ids", [(0, 1, 3), (1, 1, 2), (2, 1, 0), (2,)])
def test_aux_layers_that_the_server_would_not_capture_are_refused(ids, tmp_path):
    write_target(tmp_path)
    with pytest.raises(ValueError, match="aux layers"):
        init_draft(tmp_path, tmp_path / "d", aux_layer_ids=ids)


@pytest.mark.parametrize(
    ("model", "outputs", "ids"),
    [("Qwen3ForCausalLM", (0, 2, 4), [0, 2, 4]), ("DeepseekV3ForCausalLM", (2, 3, 4), [3, 4, 5]),
     ("DeepseekV3ForCausalLM", (1, 3, 4), [1, 3, 4]), ("GptOssForCausalLM", (1, 3, 5), [1, 3, 5])],
)  # fmt: skip
def test_layers_are_named_as_the_targets_model_reads_them(model, outputs, ids, tmp_path):
    write_target(tmp_path, layers=6)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": [model]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    init_draft(tmp_path, tmp_path / "d", "random", aux_layer_ids=outputs)
    raw = json.loads((tmp_path / "d" / "config.json").read_text())
    assert raw["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == ids
    assert aux_layer_ids(raw, 6, config) == list(outputs)
    check_draft(tmp_path / "d", config)
    if "Deepseek" in model:
        with pytest.raises(ValueError, match="the first not 0"):
            init_draft(tmp_path, tmp_path / "e", "random", aux_layer_ids=(0, 2, 4))


@pytest.mark.parametrize("kind", ["random", "target"])
def test_eagle_3_1_and_fewer_key_heads(kind, tmp_path):
    write_target(tmp_path)
    draft = init_draft(tmp_path, tmp_path / "d", kind, kv_heads=1, eagle31=True)
    raw = json.loads((tmp_path / "d" / "config.json").read_text())
    assert raw["norm_output"] is True and raw["eagle_config"]["norm_before_fc"] is True
    assert raw["num_key_value_heads"] == 1 and draft.layers[0].self_attn.k_proj.weight.shape == (
        8,
        32,
    )
    assert torch.equal(draft.input_norm.weight, torch.ones(48))
    check_draft(tmp_path / "d", open_target(tmp_path).config)
    state, _ = draft.context(
        torch.tensor([1]), torch.randn(1, 48), torch.arange(1), torch.zeros(1, dtype=torch.int64)
    )
    assert draft.logits(state).isfinite().all()
    with pytest.raises(ValueError, match="--kv-heads 3"):
        init_draft(tmp_path, tmp_path / "e", kind, kv_heads=3)


def test_default_aux_layers():
    # SGLang's, named as outputs
    assert default_aux_layer_ids(36) == (1, 17, 32)
    assert default_aux_layer_ids(4) == (0, 1, 2)
    assert default_aux_layer_ids(6) == (0, 2, 4)


@pytest.mark.parametrize("massive", [1.0, 300.0])
def test_started_from_the_target_it_guesses_no_worse_than_uniformly(massive, tmp_path):
    """Heads as sharp as real ones, and features of which two dimensions are hundreds of times
    larger than the rest.
    """
    tensors = write_target(tmp_path, model_type="llama")
    tensors["model.norm.weight"] = 7 + tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    draft = init_draft(tmp_path, tmp_path / "d", "target")
    features = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    features[:, [33, 46]] *= massive
    tokens = torch.arange(64) % 60
    state, kv = draft.context(
        tokens, features, torch.arange(64), torch.zeros(64, dtype=torch.int64)
    )
    own = torch.arange(64)[:, None]
    deeper, _ = draft.nodes(
        tokens, state, torch.arange(64) + 1, kv, None, own[:, 0] * 0, own[:, 0] + 1, own
    )
    for states in (state, deeper):
        # against any next tokens: the mean over them is the worst that a target could ask of this
        # draft on average
        guess = draft.logits(states).log_softmax(-1)
        assert -guess.mean() < math.log(60) + 0.15


def test_an_untrained_draft_says_so_and_a_trained_one_does_not(tmp_path):
    write_target(tmp_path)
    draft = init_draft(tmp_path, tmp_path / "made")

    def untrained(directory: Path) -> bool:
        return json.loads((directory / "config.json").read_text()).get(UNTRAINED, False)

    assert untrained(tmp_path / "made")
    draft.save(tmp_path / "trained")
    assert not untrained(tmp_path / "trained") and UNTRAINED not in draft.config.to_json("float32")
    for name in ("made", "trained"):
        write_draft(read_weights(tmp_path / name), tmp_path / f"{name}-exported")
        assert untrained(tmp_path / f"{name}-exported") == (name == "made")
