"""Configs of any value, and configs, files and indices that are none: import, check, server start
and trainer say so in a sentence, without a traceback.
"""

import json

import pytest
from foreign_drafts import speculators
from typer.testing import CliRunner

from aurora_sglang_plugin.drafts.eagle3_check import check_draft
from aurora_trainer.cli import app
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.eagle3_import import explain, import_draft
from aurora_trainer.drafts.target import open_target

KEYS = (
    "architectures model_type hidden_size num_attention_heads num_key_value_heads head_dim"
    " hidden_act rms_norm_eps rope_theta rope_scaling rope_parameters max_position_embeddings"
    " vocab_size draft_vocab_size target_hidden_size num_aux_hidden_states eagle_config"
    " eagle_aux_hidden_state_layer_ids fc_norm norm_output layer_types transformer_layer_config"
    " speculators_model_type partial_rotary_factor dtype norm_before_residual text_config"
).split()
VALUES = [
    None,
    "x",
    [1],
    ["x"],
    {},
    {"full_attention": 1},
    {"rope_type": "yarn"},
    -1,
    0,
    1,
    1.5,
    True,
    False,
]


@pytest.mark.parametrize("key", KEYS)
def test_any_value_of_a_key_is_converted_or_explained(key, source, target, tmp_path):
    """Import never ends in a traceback, and what it writes is what a server takes."""
    opened = open_target(target)
    for value in VALUES:
        config = source[2] | {key: value}
        for nested in (config, speculators(source[1], config)[1] | {key: value}):
            (source[0] / "config.json").write_text(json.dumps(nested))
            explained = explain(source[0], opened)
            assert all("\n" not in p for p in explained.problems)
            if not explained.problems:
                import_draft(source[0], tmp_path / "out", str(target), force=True)
                check_draft(tmp_path / "out", opened.config)
                Draft.load(tmp_path / "out", opened.embedding())


TRUNCATED = json.dumps({"architectures": ["LlamaForCausalLMEagle3"]})[:-5]
BAD_CONFIGS = [
    "",
    "[]",
    "null",
    "3",
    TRUNCATED,
    "[" * 100_000,
    '{"architectures": NaN}',
    '"text"',
    "\ufeff{}",
]


@pytest.mark.parametrize("text", BAD_CONFIGS)
def test_a_config_that_is_none_is_one_sentence_everywhere(text, source, target):
    (source[0] / "config.json").write_text(text)
    assert_refused_everywhere(source[0], target)


def header(text, data=b"\0" * 8):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return len(text).to_bytes(8, "little") + text + data


def one(**field):
    return header({"norm.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **field}})


BAD_FILES = {
    "empty": b"",
    "short": b"\1\0",
    "header longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "no JSON": header(b"{nonsense"),
    "a list": header([1]),
    "deep": header(b"[" * 100_000),
    "a field that is a list": header({"a": [1]}),
    "no dtype": header({"a": {"shape": [2], "data_offsets": [0, 8]}}),
    "unknown dtype": one(dtype="F7"),
    "dtype no text": one(dtype=3),
    "negative shape": one(shape=[-2]),
    "shape of text": one(shape=["2"]),
    "a shape that is no list": one(shape=2),
    "a shape of the wrong size": one(shape=[3]),
    "offsets past the end": one(data_offsets=[0, 16]),
    "offsets turned round": one(data_offsets=[8, 0]),
    "three offsets": one(data_offsets=[0, 4, 8]),
    "a hole": one(data_offsets=[4, 8], shape=[1]),
    "trailing bytes": one() + b"\0",
    "metadata of numbers": header({"__metadata__": {"a": 1}}, b""),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_none_is_one_sentence_everywhere(name, source, target):
    (source[0] / "model.safetensors").write_bytes(BAD_FILES[name])
    assert_refused_everywhere(source[0], target, "model.safetensors is damaged")


@pytest.mark.parametrize(
    ("index", "said"),
    [("{", "is not JSON"), ("[]", "expected a JSON object"), ("{}", "weight_map"),
     ('{"weight_map": {"a": 1}}', "weight_map"),
     ('{"weight_map": {"a": "gone.safetensors"}}', "not there: gone.safetensors")],
)  # fmt: skip
def test_a_damaged_index_is_one_sentence_everywhere(index, said, source, target):
    (source[0] / "model.safetensors.index.json").write_text(index)
    assert_refused_everywhere(source[0], target, said)


def assert_refused_everywhere(directory, target, said="."):
    """import, check, server start and trainer, without a traceback."""
    opened = open_target(target)
    assert any(said in p for p in explain(directory, opened).problems)
    for refuse in (
        lambda: check_draft(directory, opened.config),
        lambda: Draft.load(directory, opened.embedding()),
    ):
        with pytest.raises(ValueError, match=said):
            refuse()
    result = CliRunner().invoke(app, ["import", str(directory), "--target", str(target)])
    assert result.exit_code == 2 and "Traceback" not in result.output
