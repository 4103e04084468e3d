"""Drafts made elsewhere: what is only naming is converted, to the same bits and the same
meaning.
"""

import json
import shutil

import pytest
import torch
from foreign_drafts import H, V, rewrite, speculators
from models import make_random_draft, make_random_target
from safetensors.torch import load_file, save_file

from aurora_sglang_plugin.drafts.aux_layers import aux_layer_ids
from aurora_sglang_plugin.drafts.eagle3_check import check_draft
from aurora_sglang_plugin.drafts.eagle3_config import DraftConfig
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.eagle3_files import stored_dtype
from aurora_trainer.drafts.eagle3_import import explain, import_draft
from aurora_trainer.drafts.target import open_target

LAYOUTS = {
    "sglang": lambda t, c: (t, c),
    "layers.0 under model.": lambda t, c: (
        {("model." if "head" not in n else "") + n.replace("midlayer", "layers.0"): x for n,
        x in t.items()}, c),
    "EAGLE's authors": lambda t, c: (t, {**c, "architectures": ["LlamaForCausalLM"]}),
    "speculators": speculators,
    "a wrapper's prefix, d2t in int32": lambda t, c: (
        {f"draft_model.{n}": x.int() if n == "d2t" else x for n, x in t.items()}, c),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_common_layouts_come_in_with_their_bits(layout, source, target, tmp_path):
    directory, tensors, config = source
    reference = Draft.load(directory, open_target(target).embedding())
    rewrite(directory, *LAYOUTS[layout](tensors, config))
    explained = import_draft(directory, tmp_path / "out", str(target))
    assert bool(explained.conversions) == (layout not in ("sglang", "layers.0 under model."))
    draft = Draft.load(tmp_path / "out", reference.embed)
    assert draft.config == reference.config
    for name, tensor in reference.checkpoint().items():
        assert torch.equal(draft.checkpoint()[name], tensor), name
    check_draft(tmp_path / "out", open_target(target).config)


def test_later_layers_of_speculators_name_the_states_norm_otherwise(source, target, tmp_path):
    directory, tensors, config = source
    second = {
        n.replace("midlayer", "layers.1"): t.clone() for n, t in tensors.items() if "midlayer" in n
    }
    second = {n: t[:, :H] if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) else t
              for n, t in second.items()}  # fmt: skip
    norm = torch.randn(H)
    del second["layers.1.hidden_norm.weight"]
    second["layers.1.input_layernorm.weight"] = norm
    rewrite(directory, *speculators({**tensors, **second}, {**config, "num_hidden_layers": 2}))
    import_draft(directory, tmp_path / "out", str(target))
    assert torch.equal(
        load_file(tmp_path / "out" / "model.safetensors")["layers.1.hidden_norm.weight"], norm
    )


def test_an_embedding_is_left_out_and_said(source, target, tmp_path):
    directory, tensors, config = source
    embed = open_target(target).embedding()
    owns = {
        "is the target's:": embed,
        "but for rounding": embed.bfloat16(),
        "differs": torch.randn(V, H),
    }
    for said, own in owns.items():
        rewrite(directory, {**tensors, "embed_tokens.weight": own}, config)
        assert any(
            said in note
            for note in import_draft(directory, tmp_path / "out", str(target), force=True).notes
        )
        assert "embed_tokens.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_another_dtype_and_defaults_said_aloud(tmp_path):
    target = make_random_target(tmp_path / "deep", vocab=V, hidden=H, layers=12)
    # names no layers
    directory = make_random_draft(tmp_path / "source", target)
    explained = import_draft(directory, tmp_path / "out", str(target), dtype="bfloat16")
    assert not explained.conversions
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 5, 8]
        and config["dtype"] == "bfloat16"
    )
    assert load_file(tmp_path / "out" / "model.safetensors")["fc.weight"].dtype == torch.bfloat16
    assert any(
        "--dtype float32" in note for note in explain(tmp_path / "out", open_target(target)).notes
    )


def changed_target(target, directory, **config):
    shutil.copytree(target, directory)
    raw = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


@pytest.mark.parametrize(
    ("model", "ids", "outputs"),
    [
        # as they are, if the first is not 1
        ("DeepseekV3ForCausalLM", [2, 3, 5], [1, 2, 4]),
        ("DeepseekV3ForCausalLM", [1, 3, 4], [1, 3, 4]),
        # as they are, if the last is the number of layers
        ("GptOssForCausalLM", [2, 4, 6], [1, 3, 5]),
        ("GptOssForCausalLM", [0, 2, 4], [0, 2, 4]),
    ],
)
def test_models_with_their_own_way_of_naming_layers(model, ids, outputs, source, target, tmp_path):
    """What eagle_config names is kept as SGLang reads it; for others the import says what the
    features enter.
    """
    opened = open_target(changed_target(target, tmp_path / "own", architectures=[model]))
    rewrite(
        source[0],
        source[1],
        source[2] | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": ids}},
    )
    explained = import_draft(source[0], tmp_path / "out", str(opened.directory))
    assert any("ENTERS" in note and str(outputs) in note for note in explained.notes) == (
        ids != outputs
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == ids
    assert config["eagle_aux_hidden_state_layer_ids"] == [i + 1 for i in outputs]
    check_draft(tmp_path / "out", opened.config)
    # ... and from there it is read as what enters, and named as SGLang names it again.
    del config["eagle_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="at its top"):
        check_draft(tmp_path / "out", opened.config)
    import_draft(tmp_path / "out", tmp_path / "again", str(opened.directory))
    again = json.loads((tmp_path / "again" / "config.json").read_text())["eagle_config"]
    assert aux_layer_ids({"eagle_config": again}, 6, opened.config) == outputs


def eagle31(tensors, config):
    """The switches of EAGLE 3.1 at the top of speculators' nested config."""
    names, nested = speculators(tensors, config)
    return {**names, "input_norm.weight": torch.rand(3 * H)}, {
        **nested,
        "norm_output": True,
        "norm_before_fc": True,
    }


def lifted(tensors, config):
    """The same in eagle_config, of which SGLang reads one."""
    eagle = config["eagle_config"] | {"norm_output": True, "norm_before_fc": True}
    return {**tensors, "input_norm.weight": torch.rand(3 * H)}, {**config, "eagle_config": eagle}


def inside(tensors, config):
    """... and in the layer's own config."""
    names, nested = eagle31(tensors, config)
    switches = {k: nested.pop(k) for k in ("norm_output", "norm_before_fc")}
    return names, {
        **nested,
        "transformer_layer_config": nested["transformer_layer_config"] | switches,
    }


@pytest.mark.parametrize("where", [eagle31, lifted, inside])
def test_eagle_3_1_is_not_lost(where, source, target, tmp_path):
    tensors, config = where(source[1], source[2])
    rewrite(source[0], tensors, config)
    with pytest.raises(ValueError, match="aurora-trainer import|not an EAGLE3 draft"):
        check_draft(source[0], open_target(target).config)
    import_draft(source[0], tmp_path / "out", str(target))
    draft = Draft.load(tmp_path / "out", open_target(target).embedding())
    assert draft.config.norm_output and draft.config.norm_before_fc
    assert torch.equal(draft.input_norm.weight, tensors["input_norm.weight"])
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["norm_output"] is True and raw["eagle_config"]["norm_before_fc"] is True
    check_draft(tmp_path / "out", open_target(target).config)


CONVERTED = {
    "nested rope": (
        {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}, "rope_scaling": None,
        "rope_theta": None},
        lambda c: c.rope_theta == 5e5),
    "nested rope of two layer types, one of them used": (
        {"rope_parameters": {"full_attention": {"rope_theta": 5e5},
        "sliding_attention": {"rope_theta": 1.5}},
         "layer_types": ["full_attention"], "rope_scaling": None},
        lambda c: c.rope_theta == 5e5),
    "nested yarn": (
        {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0,
        "rope_theta": 9e4}}},
        lambda c: c.rope_scaling["rope_type"] == "yarn" and c.rope_theta == 9e4),
    "layer types of the target": ({"layer_types": ["full_attention"] * 6}, lambda c: True),
    "a null where SGLang computes": ({"target_hidden_size": None, "partial_rotary_factor": None},
    lambda c: True),
    "no family": ({"model_type": None}, lambda c: True),
    "defaults left out": ({"rms_norm_eps": None, "hidden_act": None},
    lambda c: c.rms_norm_eps == 1e-6),
    "the target's family": ({"model_type": "qwen2", "sliding_window": 64}, lambda c: True),
    "fewer positions than the target": (
        {"max_position_embeddings": 128}, lambda c: c.max_position_embeddings == 4096),
    "layers at the top": (
        {"eagle_config": None, "eagle_aux_hidden_state_layer_ids": [2, 3, 5]},
        lambda c: c.aux_layer_ids == (1, 2, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_what_sglang_would_read_otherwise_is_written_as_meant(name, source, target, tmp_path):
    change, meant = CONVERTED[name]
    rewrite(source[0], source[1], source[2] | change)
    import_draft(source[0], tmp_path / "out", str(target))
    assert meant(DraftConfig.read(tmp_path / "out"))
    check_draft(tmp_path / "out", open_target(target).config)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["model_type"] == "llama" and "layer_types" not in raw


def test_fused_tensors_are_taken_apart(source, target, tmp_path):
    directory, tensors, config = source
    reference = Draft.load(directory, open_target(target).embedding()).checkpoint()
    fused = {
        n: t
        for n, t in tensors.items()
        if not any(f".{p}_proj" in n for p in "q k v gate up".split())
    }
    attention, mlp = "midlayer.self_attn.", "midlayer.mlp."
    fused[attention + "qkv_proj.weight"] = torch.cat(
        [tensors[f"{attention}{p}_proj.weight"] for p in "qkv"]
    )
    fused[mlp + "gate_up_proj.weight"] = torch.cat(
        [tensors[f"{mlp}{p}_proj.weight"] for p in ("gate", "up")]
    )
    rewrite(directory, fused, config)
    with pytest.raises(ValueError, match="aurora-trainer import"):
        check_draft(directory, open_target(target).config)
    import_draft(directory, tmp_path / "out", str(target))
    own = Draft.load(tmp_path / "out", open_target(target).embedding()).checkpoint()
    assert own.keys() == reference.keys() and all(torch.equal(own[n], reference[n]) for n in own)


@pytest.mark.parametrize("some", [False, True])
def test_float64_is_written_as_float32(some, source, target, tmp_path):
    directory, tensors, config = source
    wide = {
        n: t.double() if t.is_floating_point() and (not some or "fc" in n) else t
        for n, t in tensors.items()
    }
    rewrite(directory, wide, config)
    explained = import_draft(directory, tmp_path / "out", str(target))
    assert any("F64: written as F32" in c for c in explained.conversions)
    check_draft(tmp_path / "out", open_target(target).config)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert not [n for n, t in written.items() if t.dtype == torch.float64]
    assert torch.equal(written["fc.weight"], tensors["fc.weight"].float())
    # finite in float64 alone
    wide["fc.weight"] = torch.full_like(tensors["fc.weight"].double(), 1e300)
    rewrite(directory, wide, config)
    problems = explain(directory, open_target(target)).problems
    assert "fc.weight holds NaN or infinite values." in problems


def test_a_file_beside_the_index_does_not_decide_the_dtype(source, tmp_path):
    directory, tensors, _ = source
    halves = {n: t.half() for n, t in tensors.items() if "lm_head" in n}
    save_file(halves, directory / "backup.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert stored_dtype(directory) == tensors["lm_head.weight"].dtype
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{directory}: .* names files that are not there"):
        stored_dtype(directory)
