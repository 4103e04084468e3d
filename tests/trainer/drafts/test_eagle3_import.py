"""Drafts made elsewhere: what is only naming is converted, what does not fit is explained, all of
it at once.
"""

import json
import shutil

import pytest
import torch
from models import make_random_draft, make_random_target
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from aurora_sglang_plugin.drafts.aux_layers import aux_layer_ids
from aurora_sglang_plugin.drafts.eagle3_check import check_draft
from aurora_sglang_plugin.drafts.eagle3_config import DraftConfig
from aurora_trainer.cli import app
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.eagle3_import import explain, import_draft
from aurora_trainer.drafts.target import open_target

V, H, AUX = 64, 32, [0, 2, 4]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_random_target(tmp_path_factory.mktemp("target"), vocab=V, hidden=H)


@pytest.fixture
def source(target, tmp_path):
    """A draft in SGLang's form, to rewrite: its directory, tensors and config."""
    directory = make_random_draft(tmp_path / "source", target, draft_vocab=40, aux_layer_ids=AUX)
    return (
        directory,
        load_file(directory / "model.safetensors"),
        json.loads((directory / "config.json").read_text()),
    )


def rewrite(directory, tensors, config):
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))


def speculators(tensors, config):
    """The nested config of speculators and its names; layers by what enters them."""
    names = {n.replace("midlayer.", "layers.0."): t for n, t in tensors.items()}
    outer = ("architectures", "draft_vocab_size", "eagle_config", "tie_word_embeddings")
    nested = {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "draft_vocab_size": 40, "norm_before_residual": False, "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
        "speculators_config": {"algorithm": "eagle3"},
        "transformer_layer_config": {k: v for k, v in config.items() if k not in outer},
    }  # fmt: skip
    return names, nested


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


def test_every_problem_is_said_at_once(source, target):
    directory, tensors, config = source
    tensors["extra.weight"] = torch.ones(2)
    del tensors["midlayer.mlp.up_proj.weight"]
    tensors["fc.weight"] = tensors["fc.weight"][:, :H].contiguous()
    tensors["norm.weight"] = torch.full((H,), torch.nan)
    tensors["t2d"] = ~tensors["t2d"]
    tensors["embed_tokens.weight"] = torch.randn(V, H)
    changes = {
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "norm_before_residual": True,
        "sliding_window": 128,
        "rms_norm_eps": None, "num_aux_hidden_states": 4, "fc_norm": "yes",
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 5]},
    }  # fmt: skip
    rewrite(directory, tensors, config | changes)
    explained = explain(directory, open_target(target))
    problems = explained.problems
    expected = (
        "extra.weight", "lacks layers.0.mlp.up_proj.weight", "fc.weight is [32, 32]",
        "norm.weight holds NaN",
        "'dynamic'", "norm_before_residual", "num_aux_hidden_states is 4", "fc_norm = 'yes'",
        "expected ids from 0 to 4",
    )  # fmt: skip
    for text in expected:
        assert sum(text in p for p in problems) == 1, (text, problems)
    assert len(problems) == len(expected), problems
    # SGLang reads neither
    for text in ("t2d and d2t disagree", "embedding differs"):
        assert sum(text in note for note in explained.notes) == 1, (text, explained.notes)

    result = CliRunner().invoke(app, ["import", str(directory), "--target", str(target)])
    assert result.exit_code == 2 and f"{len(expected)} problems" in result.output
    assert all(text in result.output for text in expected)


def test_a_draft_of_another_target(source, tmp_path):
    other = make_random_target(tmp_path / "other", vocab=128, hidden=64, layers=4)
    problems = explain(source[0], open_target(other)).problems
    said = (
        "vocab_size is 64, the target's is 128",
        "hidden_size is 32",
        "expected ids from 0 to 2",
        "fc.weight is",
    )
    for text in said:
        assert any(text in p for p in problems), (text, problems)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, c: ({"x.kv_a_proj.weight": torch.ones(2), **t}, c), "latent (MLA"),
        (lambda t, c: ({"fc.weight": torch.ones(H, 2 * H)}, c), "EAGLE or EAGLE-2"),
        (
            lambda t, c: (t, {**speculators(t, c)[1], "speculators_model_type": "eagle"}),
            "expected eagle3",
        ),
        (lambda t, c: (t, {"transformer_layer_config": [1]}), "transformer_layer_config = [1]"),
        (
            lambda t, c: (t, {**c, "architectures": ["Eagle3DeepseekV2ForCausalLM"]}),
            "not an EAGLE3 draft",
        ),
        (lambda t, c: (t, {**c, "draft_vocab_size": None}), "has no draft_vocab_size"),
        (lambda t, c: (t, {**c, "tie_word_embeddings": True}), "tie_word_embeddings"),
        (lambda t, c: ({**t, "d2t": t["d2t"] + torch.arange(40)}, c), "target ids themselves"),
        (
            lambda t, c: ({**t, "norm.weight": t["norm.weight"].to(torch.int8)}, c),
            "norm.weight is I8",
        ),
        (lambda t, c: (t, {**c, "head_dim": 16}), "self_attn.q_proj.weight is"),
    ],
)
def test_what_it_is_instead_is_named(change, said, source, target):
    rewrite(source[0], *change(source[1], source[2]))
    problems = explain(source[0], open_target(target)).problems
    assert any(said in p for p in problems), problems


def test_a_file_that_can_run_code_is_not_read(source, target):
    directory = source[0]
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    (problem,) = explain(directory, open_target(target)).problems
    assert "pytorch_model.bin" in problem and "can run code" in problem and "safetensors" in problem


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
        # as they are, where the first is not 1
        ("DeepseekV3ForCausalLM", [2, 3, 5], [1, 2, 4]),
        ("DeepseekV3ForCausalLM", [1, 3, 4], [1, 3, 4]),
        # as they are, where the last is the number of layers
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


def test_nested_rope_that_differs_by_layer_is_refused(source, target):
    rope = {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1.5}}
    rewrite(source[0], source[1], source[2] | {"rope_parameters": rope, "rope_scaling": None})
    (problem,) = explain(source[0], open_target(target)).problems
    assert "nested by layer type" in problem


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


def test_a_narrower_draft_is_refused_in_one_sentence(source, target, tmp_path):
    directory, _, config = source
    h = H // 2
    narrow = {"hidden_size": h, "target_hidden_size": H, "head_dim": 4, "intermediate_size": 2 * h}
    config["draft_vocab_size"] = V
    shapes = {
        "fc": (h, 3 * H), "norm": (h,), "lm_head": (V, h), "embed_tokens": (V, h),
        "midlayer.self_attn.q_proj": (h, 2 * h),
        "midlayer.self_attn.k_proj": (h // 2, 2 * h), "midlayer.self_attn.v_proj": (h // 2, 2 * h),
        "midlayer.self_attn.o_proj": (h, h), "midlayer.mlp.gate_proj": (2 * h, h),
        "midlayer.mlp.up_proj": (2 * h, h),
        "midlayer.mlp.down_proj": (h, 2 * h), "midlayer.hidden_norm": (h,),
        "midlayer.input_layernorm": (h,),
        "midlayer.post_attention_layernorm": (h,),
    }  # fmt: skip
    rewrite(directory, {f"{n}.weight": torch.ones(s) for n, s in shapes.items()}, config | narrow)
    (problem,) = explain(directory, open_target(target)).problems
    assert "an embedding of its own" in problem
    with pytest.raises(ValueError, match="an embedding of its own"):
        check_draft(directory, open_target(target).config)
    with pytest.raises(ValueError, match="embedding"):
        Draft.load(directory, open_target(target).embedding())


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


def test_check_gives_the_same_explanation(source, target, tmp_path):
    config = (
        f'[weights]\ndirectory = "{tmp_path}/w"\n[trainer.model]\ntarget = "{target}"\ndraft ='
        f' "{source[0]}"\n'
    )
    (tmp_path / "aurora.toml").write_text(
        config + f'[trainer.checkpoint]\ndirectory = "{tmp_path}/c"\n'
    )
    check = [
        "check",
        "--config",
        str(tmp_path / "aurora.toml"),
        "--set",
        f"link.endpoint=ipc://{tmp_path}/l",
    ]
    assert "FAILED  draft" not in CliRunner().invoke(app, check).output
    rewrite(source[0], *speculators(source[1], source[2]))
    said = CliRunner().invoke(app, check).output
    assert "FAILED  draft" in said and "aurora-trainer import" in said
    rewrite(
        source[0],
        {n: t for n, t in source[1].items() if n != "norm.weight"},
        source[2] | {"hidden_act": "gelu"},
    )
    said = CliRunner().invoke(app, check).output
    assert "2 problems" in said and "lacks norm.weight" in said and "hidden_act" in said
    rewrite(source[0], source[1], source[2] | {"max_position_embeddings": 64, "sliding_window": 4})
    said = CliRunner().invoke(app, check).output
    assert "ok      draft" in said and "--context-length 64" in said
