"""A target's config.json with wrong, odd or absent values: one clear sentence, or a draft that a
server loads.
"""

import json

import pytest
from small_target import write_target

from aurora_sglang_plugin.drafts.eagle3_check import draft_problems
from aurora_trainer.drafts.eagle3_init import init_draft
from aurora_trainer.drafts.target import open_target, read_config


def say(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_parameters", [1]),
        ("rope_parameters", "yarn"),
        ("rope_parameters", {"rope_theta": "10000"}),
        ("rope_parameters", {"full_attention": {"rope_theta": -1}}),
        ("rope_scaling", "linear"),
        ("rope_theta", "10000"),
        ("intermediate_size", [24]),
        ("intermediate_size", "24"),
        ("num_key_value_heads", "2"),
        ("num_attention_heads", "4"),
        ("vocab_size", True),
        ("hidden_size", -16),
        ("head_dim", 8.0),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", 0),
        ("max_position_embeddings", "512"),
        ("quantization_config", "fp8"),
        ("tie_word_embeddings", "false"),
        ("model_type", ["qwen3"]),
        ("architectures", "Qwen3ForCausalLM"),
        ("hidden_act", {}),
    ],
)
def test_a_value_of_another_type_is_refused_in_a_sentence(key, value, tmp_path):
    write_target(tmp_path)
    say(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=f"config.json has {key}.* expected (a|true)") as error:
        init_draft(tmp_path, tmp_path / "d", "target")
    assert "Correct it" in str(error.value) and not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"rms_norm_eps": None},
        {"rms_norm_eps": 1},
        {"max_position_embeddings": None},
        {"head_dim": None, "kv_lora_rank": None, "rope_theta": None},
        {"intermediate_size": None, "num_key_value_heads": None},
    ],
    ids=str,
)
def test_a_draft_of_null_and_whole_numbers_is_one_that_check_takes(values, tmp_path):
    write_target(tmp_path)
    # of the size that a head has where none is said
    if "head_dim" not in values:
        say(tmp_path, head_dim=8)
    say(tmp_path, **values)
    init_draft(tmp_path, tmp_path / "d", "random")
    assert draft_problems(tmp_path / "d", open_target(tmp_path).config) == []


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"head_dim": 7}, "head_dim is 7, expected an even number"),
        ({"num_attention_heads": 6}, "hidden_size 16 is not a multiple"),
    ],
)
@pytest.mark.parametrize("kind", ["random", "target"])
def test_a_draft_that_check_would_refuse_is_not_written(kind, values, match, tmp_path):
    write_target(tmp_path)
    say(tmp_path, **values)
    with pytest.raises(ValueError, match=f"no server loads: {match}"):
        init_draft(tmp_path, tmp_path / "d", kind)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("eos", [-1, 60, [59, 60, -1], [[59]], {"a": 1}, "59", None, True])
def test_ends_of_text_that_are_no_tokens_are_dropped(eos, tmp_path):
    write_target(tmp_path)
    say(tmp_path, eos_token_id=eos)
    kept = (59,) if eos == [59, 60, -1] else ()
    assert open_target(tmp_path).eos_token_ids == kept
    draft = init_draft(tmp_path, tmp_path / "d", "random", draft_vocab=10)
    ids = draft.d2t + draft.d2t.new_tensor(range(10))
    assert ids.tolist() == ([*range(9), 59] if kept else list(range(10)))


def test_what_a_config_inside_another_leaves_out_is_its_familys(tmp_path):
    text = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
        "num_hidden_layers": 34, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }  # fmt: skip
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106]}
    (tmp_path / "config.json").write_text(json.dumps(whole | {"text_config": text}))
    target = read_config(tmp_path)
    found = [target.config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim")]
    assert (found, target.config["vocab_size"]) == ([8, 4, 256], 262208)
    rope = target.config["rope_parameters"]["full_attention"]
    assert (rope["rope_theta"], rope["factor"]) == (1e6, 8.0)
    assert target.eos_token_ids == (1, 106) and "rope_scaling" not in target.config
    # of a family that nobody knows, what is absent is said
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text | {"model_type": "x"}}))
    with pytest.raises(ValueError, match="lacks num_attention_heads, vocab_size"):
        read_config(tmp_path)


def test_other_names_of_a_size(tmp_path):
    write_target(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_layers"] = config.pop("num_hidden_layers")
    config["ffn_hidden_size"] = config.pop("intermediate_size")
    (tmp_path / "config.json").write_text(json.dumps(config))
    draft = init_draft(tmp_path, tmp_path / "d", "target")
    assert draft.config.intermediate_size == 24 and draft.config.aux_layer_ids == (0, 1, 2)
