"""Drafts made elsewhere: what is only naming is converted, what does not fit is explained, all of it at once."""

import json
import shutil

import pytest
import torch
from models import make_random_draft, make_random_target
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from aurora_sglang_plugin.draft_check import check_draft
from aurora_trainer.cli import app
from aurora_trainer.commands.import_draft import explain, import_draft
from aurora_trainer.draft import Draft
from aurora_trainer.target import open_target

V, H, AUX = 64, 32, [0, 2, 4]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_random_target(tmp_path_factory.mktemp("target"), vocab=V, hidden=H)


@pytest.fixture
def source(target, tmp_path):
    """A draft in SGLang's form, to rewrite: its directory, tensors and config."""
    directory = make_random_draft(tmp_path / "source", target, draft_vocab=40, aux_layer_ids=AUX)
    return directory, load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())


def rewrite(directory, tensors, config):
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))


def speculators(tensors, config):
    """The nested config of speculators and its names; layers by what enters them."""
    names = {n.replace("midlayer.", "layers.0."): t for n, t in tensors.items()}
    outer = ("architectures", "draft_vocab_size", "eagle_config", "tie_word_embeddings")
    nested = {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "speculators_version": "0.3.0",
        "draft_vocab_size": 40, "norm_before_residual": False, "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": [1, 3, 5], "speculators_config": {"algorithm": "eagle3"},
        "transformer_layer_config": {k: v for k, v in config.items() if k not in outer},
    }  # fmt: skip
    return names, nested


LAYOUTS = {
    "sglang": lambda t, c: (t, c),
    "layers.0 under model.": lambda t, c: (
        {("model." if "head" not in n else "") + n.replace("midlayer", "layers.0"): x for n, x in t.items()}, c),
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
    second = {n.replace("midlayer", "layers.1"): t.clone() for n, t in tensors.items() if "midlayer" in n}
    second = {n: t[:, :H] if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) else t
              for n, t in second.items()}  # fmt: skip
    norm = torch.randn(H)
    del second["layers.1.hidden_norm.weight"]
    second["layers.1.input_layernorm.weight"] = norm
    rewrite(directory, *speculators({**tensors, **second}, {**config, "num_hidden_layers": 2}))
    import_draft(directory, tmp_path / "out", str(target))
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["layers.1.hidden_norm.weight"], norm)


def test_every_problem_is_said_at_once(source, target):
    directory, tensors, config = source
    tensors["extra.weight"] = torch.ones(2)
    del tensors["midlayer.mlp.up_proj.weight"]
    tensors["fc.weight"] = tensors["fc.weight"][:, :H].contiguous()
    tensors["norm.weight"] = torch.full((H,), torch.nan)
    tensors["t2d"] = ~tensors["t2d"]
    tensors["embed_tokens.weight"] = torch.randn(V, H)
    changes = {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "norm_before_residual": True, "sliding_window": 128,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 5]},
    }  # fmt: skip
    rewrite(directory, tensors, config | changes)
    problems = explain(directory, open_target(target)).problems
    expected = (
        "extra.weight", "lacks layers.0.mlp.up_proj.weight", "fc.weight is [32, 32]", "norm.weight holds NaN",
        "t2d and d2t disagree", "embedding differs", "yarn", "norm_before_residual", "sliding_window",
        "expected ids from 0 to 4",
    )  # fmt: skip
    for text in expected:
        assert sum(text in p for p in problems) == 1, (text, problems)
    assert len(problems) == len(expected)

    result = CliRunner().invoke(app, ["import", str(directory), "--target", str(target)])
    assert result.exit_code == 2 and f"{len(expected)} problems" in result.output
    assert all(text in result.output for text in expected)


def test_a_draft_of_another_target(source, tmp_path):
    other = make_random_target(tmp_path / "other", vocab=128, hidden=64, layers=4)
    problems = explain(source[0], open_target(other)).problems
    for text in ("vocab_size is 64, the target's is 128", "hidden_size is 32", "expected ids from 0 to 2", "t2d is"):
        assert any(text in p for p in problems), (text, problems)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, c: ({"x.kv_a_proj.weight": torch.ones(2), **t}, c), "latent (MLA"),
        (lambda t, c: ({"fc.weight": torch.ones(H, 2 * H)}, c), "EAGLE or EAGLE-2"),
        (lambda t, c: (t, {**c, "architectures": ["Eagle3DeepseekV2ForCausalLM"]}), "not an EAGLE3 draft"),
        (lambda t, c: (t, {**c, "draft_vocab_size": None}), "has no draft_vocab_size"),
        (lambda t, c: (t, {**c, "tie_word_embeddings": True}), "tie_word_embeddings"),
        (lambda t, c: ({**t, "d2t": t["d2t"] + torch.arange(40)}, c), "target ids themselves"),
        (lambda t, c: ({**t, "norm.weight": t["norm.weight"].to(torch.int8)}, c), "norm.weight is I8"),
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


def test_an_embedding_that_is_the_targets_is_left_out(source, target, tmp_path):
    directory, tensors, config = source
    embed = open_target(target).embedding()
    for own, said in ((embed, "is the target's:"), (embed.bfloat16(), "but for rounding")):
        rewrite(directory, {**tensors, "embed_tokens.weight": own}, config)
        assert any(said in note for note in import_draft(directory, tmp_path / "out", str(target), force=True).notes)
        assert "embed_tokens.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_another_dtype_and_defaults_said_aloud(tmp_path):
    target = make_random_target(tmp_path / "deep", vocab=V, hidden=H, layers=12)
    directory = make_random_draft(tmp_path / "source", target)  # names no layers
    explained = import_draft(directory, tmp_path / "out", str(target), dtype="bfloat16")
    assert not explained.conversions
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 5, 8] and config["dtype"] == "bfloat16"
    assert load_file(tmp_path / "out" / "model.safetensors")["fc.weight"].dtype == torch.bfloat16
    assert any("--dtype float32" in note for note in explain(tmp_path / "out", open_target(target)).notes)


def test_layers_of_a_deepseek_model_are_ambiguous(source, target, tmp_path):
    """SGLang 0.5.23, models/deepseek_v2.py: ids are outputs only where the first is 1."""
    latent = tmp_path / "latent"
    shutil.copytree(target, latent)
    config = json.loads((latent / "config.json").read_text()) | {"kv_lora_rank": 4}
    (latent / "config.json").write_text(json.dumps(config))
    assert any("ENTERS" in note for note in explain(source[0], open_target(latent)).notes)
    assert not any("ENTERS" in note for note in explain(source[0], open_target(target)).notes)


def test_check_gives_the_same_explanation(source, target, tmp_path):
    config = f'[weights]\ndirectory = "{tmp_path}/w"\n[trainer.model]\ntarget = "{target}"\ndraft = "{source[0]}"\n'
    (tmp_path / "aurora.toml").write_text(config + f'[trainer.checkpoint]\ndirectory = "{tmp_path}/c"\n')
    check = ["check", "--config", str(tmp_path / "aurora.toml"), "--set", f"link.endpoint=ipc://{tmp_path}/l"]
    assert "FAILED  draft" not in CliRunner().invoke(app, check).output
    rewrite(source[0], *speculators(source[1], source[2]))
    said = CliRunner().invoke(app, check).output
    assert "FAILED  draft" in said and "aurora-trainer import" in said
    rewrite(source[0], {n: t for n, t in source[1].items() if n != "norm.weight"}, source[2] | {"sliding_window": 4})
    said = CliRunner().invoke(app, check).output
    assert "2 problems" in said and "lacks norm.weight" in said and "sliding_window" in said
