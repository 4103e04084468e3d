"""Drafts started from targets that are saved otherwise: quantized, packed, inside a larger model,
with latent attention.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_target import write_target

from aurora_trainer.drafts.eagle3_copying import low_features
from aurora_trainer.drafts.eagle3_init import init_draft
from aurora_trainer.drafts.target import open_target


def quantize(directory, how):
    """Rewrite a target as a quantizer would: codes with scales for the linear layers of every
    layer.
    """
    tensors, config = (
        load_file(directory / "model.safetensors"),
        json.loads((directory / "config.json").read_text()),
    )
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        if how == "blocks of 8":
            rows, columns = -(-weight.shape[0] // 8), -(-weight.shape[1] // 8)
            scale = torch.rand(rows, columns) + 0.5
            whole = scale.repeat_interleave(8, 0).repeat_interleave(8, 1)[
                : weight.shape[0], : weight.shape[1]
            ]
            tensors[f"{name}_scale_inv"] = scale
            config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
        elif how in ("one scale", "int8, a scale for each row"):
            whole = (
                torch.tensor(0.01)
                if how == "one scale"
                else torch.rand(len(weight), 1) * 0.01 + 0.03
            )
            tensors[f"{name}_scale"] = whole
        elif how == "a scale for each row":
            whole = torch.rand(len(weight), 1) * 0.1
            tensors[f"{name}_scale"] = whole[:, 0]
        elif how == "without a scale":
            whole = torch.tensor(1.0)
        else:
            # packed
            tensors[name.replace("weight", how)] = torch.zeros(2, 2, dtype=torch.int32)
            continue
        codes = weight / whole
        codes = (
            codes.round().clamp(-127, 127).to(torch.int8)
            if "int8" in how
            else codes.to(torch.float8_e4m3fn)
        )
        tensors[name] = codes
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "how", ["blocks of 8", "one scale", "a scale for each row", "int8, a scale for each row"]
)
def test_codes_of_a_quantized_target_are_multiplied_by_their_scales(how, tmp_path):
    # of the scales: one near 0 would leave a row to rounding
    torch.manual_seed(0)
    write_target(tmp_path)
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    meant = low_features(open_target(tmp_path), 2, x, 1e-6) - x
    quantize(tmp_path, how)
    own = low_features(open_target(tmp_path), 2, x, 1e-6) - x
    assert torch.corrcoef(torch.stack([own.flatten(), meant.flatten()]))[0, 1] > 0.95
    assert float(own.norm() / meant.norm()) == pytest.approx(1, abs=0.1)
    init_draft(tmp_path, tmp_path / "d", "target")


def test_codes_without_a_scale_are_refused_and_packed_ones_left_out(tmp_path):
    write_target(tmp_path)
    quantize(tmp_path, "without a scale")
    with pytest.raises(ValueError, match="float8_e4m3fn without scales") as error:
        init_draft(tmp_path, tmp_path / "d", "target")
    assert "--kind random" in str(error.value)
    init_draft(tmp_path, tmp_path / "e", "random")
    write_target(tmp_path)
    quantize(tmp_path, "weight_packed")
    x = torch.randn(40, 16)
    assert torch.equal(low_features(open_target(tmp_path), 2, x, 1e-6), x)
    init_draft(tmp_path, tmp_path / "f", "target")


@pytest.mark.parametrize("part", ["qweight", "weight_packed"])
def test_a_packed_head_is_not_taken_for_a_tied_one(part, tmp_path):
    tensors = write_target(tmp_path)
    head = tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    # tie_word_embeddings is false
    with pytest.raises(ValueError, match="no tensor lm_head.weight"):
        open_target(tmp_path).head()
    save_file({**tensors, f"lm_head.{part}": head.int()}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    for tied in (False, None):
        (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
        with pytest.raises(ValueError, match="a quantized target"):
            open_target(tmp_path).head()
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert torch.equal(open_target(tmp_path).head(), tensors["model.embed_tokens.weight"])


def test_a_directory_without_safetensors_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="safetensors"):
        open_target(tmp_path)


def nest(target, **more):
    """Rewrite a target as the language model of a larger one, as Kimi K2.5 and others are saved."""
    raw = json.loads((target / "config.json").read_text())
    eos = raw.pop("eos_token_id")
    config = {
        "architectures": ["Other"],
        "eos_token_id": eos,
        "text_config": raw | more,
        "vision_config": {"x": 1},
    }
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
    alike = torch.nn.functional.cosine_similarity(
        draft.norm.weight, tensors["model.norm.weight"], 0
    )
    assert alike.item() == pytest.approx(1.0)


def test_latent_attention_experts_and_a_foreign_rope_scaling(tmp_path):
    """As in Kimi K2.5: what the target has none of is chosen, and its sparse layers are left
    out.
    """
    write_target(tmp_path)
    tensors = nest(
        tmp_path, kv_lora_rank=4, v_head_dim=6, n_routed_experts=8, num_key_value_heads=4,
        num_attention_heads=4,
        rope_scaling={"type": "yarn", "factor": 64.0}, intermediate_size=8,
    )  # fmt: skip
    draft = init_draft(tmp_path, tmp_path / "d", "random")
    config = draft.config
    assert (config.head_dim, config.num_key_value_heads, config.intermediate_size) == (6, 4, 48)
    assert config.rope_scaling["rope_type"] == "yarn" and config.rope_theta == 5e4
    kept = {f"language_model.{n}": t for n, t in tensors.items() if "layers.3.mlp" not in n}
    save_file(kept, tmp_path / "model.safetensors")
    started = init_draft(tmp_path, tmp_path / "e", "target")
    assert torch.equal(started.lm_head.weight, tensors["lm_head.weight"])


def test_exponents_of_two_as_scales(tmp_path):
    """MXFP8: codes, and a byte for each 8 of a row, whose 127 means 1."""
    tensors = write_target(tmp_path)
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    meant = low_features(open_target(tmp_path), 2, x, 1e-6) - x
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name]
        blocks = weight.unflatten(1, (-1, 8))
        power = blocks.abs().amax(-1).log2().floor() - 7
        tensors[f"{name}_scale_inv"] = (power + 127).to(torch.uint8)
        codes = blocks / torch.exp2(power)[..., None]
        tensors[name] = codes.flatten(1).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    for said in ({}, {"quant_method": "mxfp8", "weight_block_size": [1, 8]}):
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
        own = low_features(open_target(tmp_path), 2, x, 1e-6) - x
        assert float(own.norm() / meant.norm()) == pytest.approx(1, abs=0.1)


def test_blocks_are_of_the_size_that_the_config_says(tmp_path):
    """compressed-tensors: 3 blocks of 10 in 24 rows are not 3 of 8."""
    tensors = write_target(tmp_path)
    name = "model.layers.0.mlp.gate_proj.weight"
    scale = torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]])
    tensors[name] = torch.ones(24, 16).to(torch.float8_e4m3fn)
    save_file({**tensors, f"{name}_scale": scale}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    weights = {"num_bits": 8, "strategy": "block", "block_structure": [10, 10]}
    config["quantization_config"] = {"config_groups": {"group_0": {"weights": weights}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = open_target(tmp_path).tensor(name)
    assert found[[0, 9, 10, 20], 9].tolist() == [1, 1, 4, 16] and found[23, 10] == 32
    # 5 rows of scales, which neither the config explains nor an even share
    scale = torch.ones(5, 2)
    save_file({**tensors, f"{name}_scale": scale}, tmp_path / "model.safetensors")
    for said in (config, config | {"quantization_config": {}}):
        (tmp_path / "config.json").write_text(json.dumps(said))
        with pytest.raises(ValueError, match="one scale for each block"):
            open_target(tmp_path).tensor(name)


def test_layers_of_four_bits_under_their_own_name_are_left_out(tmp_path):
    """NVFP4: two codes a byte, a scale for each 16 and one of all; the head is float."""
    tensors = write_target(tmp_path)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        tensors[name] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
        tensors[f"{name}_scale"] = torch.ones(rows, 1).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_2"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "model.safetensors")
    x = torch.randn(40, 16)
    assert torch.equal(low_features(open_target(tmp_path), 2, x, 1e-6), x)
    init_draft(tmp_path, tmp_path / "d", "target")
    with pytest.raises(ValueError, match="gate_proj.weight packed"):
        open_target(tmp_path).tensor("model.layers.0.mlp.gate_proj.weight")
