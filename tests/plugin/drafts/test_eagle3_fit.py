"""A draft fits its target, or is refused before any model is loaded, with a sentence that says why
and names the command that makes one.
"""

import json
import subprocess
import sys

import pytest
from models import make_random_draft, make_random_target

from aurora_sglang_plugin.drafts.eagle3_check import aux_layer_ids, check_draft

TARGET = {"hidden_size": 64, "vocab_size": 512, "num_hidden_layers": 6}
AUX = [0, 2, 4]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_random_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def draft(tmp_path, target):
    def make(**options):
        return make_random_draft(tmp_path / "draft", target, **{"aux_layer_ids": AUX, **options})

    return make


def refusal(draft, target=TARGET):
    with pytest.raises(ValueError) as error:
        check_draft(draft, target)
    assert str(draft) in str(error.value) and "init-draft" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("options", [{}, {"draft_vocab": 300}, {"aux_layer_ids": [1, 3]}])
def test_accepts_drafts_that_fit(draft, options):
    check_draft(draft(**options), TARGET)


def test_accepts_sglang_default_layers_where_they_are_three(draft):
    # L = 8: the default is [1, 3, 4]
    check_draft(draft(aux_layer_ids=None), {**TARGET, "num_hidden_layers": 8})
    assert aux_layer_ids({}, 36) == [1, 17, 32]


def test_what_a_draft_leaves_to_sglang_is_said(draft):
    (note,) = check_draft(draft(aux_layer_ids=None), {**TARGET, "num_hidden_layers": 8})
    assert "the outputs of layers [1, 3, 4]" in note
    (note,) = check_draft(
        draft(changes={"max_position_embeddings": 64}), {**TARGET, "max_position_embeddings": 128}
    )
    assert "--context-length 64" in note
    assert check_draft(draft(), TARGET) == []


@pytest.mark.parametrize("layers", [4, 5, 6])
def test_refuses_default_layers_that_collapse(draft, layers):
    message = refusal(draft(aux_layer_ids=None), {**TARGET, "num_hidden_layers": layers})
    assert str(sorted({0, (layers - 2) // 2, layers - 2})) in message


@pytest.mark.parametrize("ids", [[0, 2, 5], [-1, 2, 4], [0, 2, 2], [4, 2, 0], []])
def test_refuses_layers_that_sglang_would_not_capture(draft, ids):
    changes = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": ids}}
    assert "eagle_aux_hidden_state_layer_ids" in refusal(draft(changes=changes))


def test_refuses_a_directory_that_is_no_draft(tmp_path, target):
    assert "config.json" in refusal(tmp_path / "nowhere")
    assert "Qwen3ForCausalLM" in refusal(target)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"hidden_size": 128}, "hidden_size is 128"),
        ({"hidden_size": None}, "hidden_size = None"),
        ({"model_type": "glm4"}, "model_type = 'glm4'"),
        ({"target_hidden_size": 128}, "target_hidden_size is 128"),
        ({"vocab_size": 1000}, "vocab_size is 1000"),
        ({"num_attention_heads": 8}, "o_proj.weight is [64, 64]"),
        ({"num_key_value_heads": 4}, "k_proj"),
        ({"intermediate_size": 100}, "_proj"),
        ({"draft_vocab_size": 500}, "lacks d2t"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"fc_norm": True}, "lacks fc_norm.0.weight"),
        ({"norm_before_fc": True}, "lacks input_norm.weight"),
        ({"num_hidden_layers": 2}, "lacks layers.1."),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3]}}, "fc.weight is [64, 192]"),
        ({"num_aux_hidden_states": 2}, "num_aux_hidden_states is 2"),
        (
            {
                "eagle_config": {
                    "eagle_aux_hidden_state_layer_ids": AUX,
                    "use_aux_hidden_state": False,
                }
            },
            "use_aux",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, "not an EAGLE3 draft"),
    ],
)
def test_refuses_a_config_that_does_not_fit(draft, changes, says):
    assert says in refusal(draft(changes=changes))


def test_absent_sizes_are_those_of_the_family(draft):
    path = draft()
    config = json.loads((path / "config.json").read_text())
    for key in ("hidden_size", "num_attention_heads", "vocab_size"):
        del config[key]
    (path / "config.json").write_text(json.dumps(config))
    message = refusal(path)
    assert (
        "hidden_size is 4096, the target's hidden_size is 64" in message
        and "vocab_size is 32000" in message
    )


def test_refuses_a_null_draft_vocabulary(draft):
    assert "has no draft_vocab_size" in refusal(draft(changes={"draft_vocab_size": None}))


def test_refuses_an_absent_draft_vocabulary(draft):
    path = draft()
    config = json.loads((path / "config.json").read_text())
    del config["draft_vocab_size"]
    (path / "config.json").write_text(json.dumps(config))
    assert "has no draft_vocab_size" in refusal(path)


def test_refuses_tensors_that_would_be_skipped_and_damaged_files(draft):
    from safetensors.numpy import load_file, save_file

    path = draft(draft_vocab=300)
    file = path / "model.safetensors"
    whole = file.read_bytes()
    tensors = {k: v for k, v in load_file(file).items()}
    save_file({**tensors, "midlayer.self_attn.q_norm.weight": tensors["norm.weight"]}, file)
    assert "layers.0.self_attn.q_norm.weight" in refusal(path)
    d2t = tensors["d2t"].copy()
    d2t[-1] = 512
    save_file({**tensors, "d2t": d2t}, file)
    assert "d2t" in refusal(path)
    file.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refusal(path)
    file.unlink()
    assert "safetensors" in refusal(path)


def test_draft_check_imports_neither_torch_nor_sglang():
    code = (
        "import sys, aurora_sglang_plugin.drafts.eagle3_check; assert not {'torch', 'sglang'} &"
        " {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
