"""What does not fit about a draft made elsewhere is explained, all of it at once, and what it is
instead is named.
"""

import pytest
import torch
from foreign_drafts import H, V, rewrite, speculators
from models import make_random_target
from typer.testing import CliRunner

from aurora_sglang_plugin.drafts.eagle3_check import check_draft
from aurora_trainer.cli import app
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.eagle3_import import explain
from aurora_trainer.drafts.target import open_target


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


def test_nested_rope_that_differs_by_layer_is_refused(source, target):
    rope = {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1.5}}
    rewrite(source[0], source[1], source[2] | {"rope_parameters": rope, "rope_scaling": None})
    (problem,) = explain(source[0], open_target(target)).problems
    assert "nested by layer type" in problem


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
