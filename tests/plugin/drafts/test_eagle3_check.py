"""The judge of drafts, judged: SGLang's own loader is asked about each of them.

What draft_check accepts, SGLang loads, whole, and the trainer computes as SGLang was built; what
SGLang never reads is accepted. `judged_drafts.py` makes the drafts, `sglang_loader.py` is the
loader, in one process for all drafts.
"""

import pytest
import torch
from judged_drafts import ACCEPTED, AT_START, READ, REFUSED, UNREAD, VALUES, Site

from aurora_sglang_plugin.drafts.aux_layers import aux_layer_ids, ids_that_name
from aurora_trainer.drafts.eagle3 import Draft


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return Site(tmp_path_factory.mktemp("judge"))


def assert_served_as_trained(site: Site, name: str) -> None:
    """SGLang loads it, whole; the trainer's draft has its tensors, its switches and its rotary
    table.
    """
    answer = site.answers[name]
    assert "error" not in answer, (name, answer)
    assert answer["unloaded"] == [], (name, answer["unloaded"])
    short = "max_position" in name or "positions" in name or "length by default" in name
    assert short or answer["start"] is None, (name, answer["start"])
    draft = Draft.load(site.path(name), site.target.embedding())
    config, shapes = draft.config, answer["shapes"]
    assert (config.norm_output, config.norm_before_fc, config.fc_norm) == tuple(
        answer[k] for k in ("norm_output", "norm_before_fc", "fc_norm")
    ), name
    assert (
        config.rms_norm_eps == answer["eps"]
        and config.num_aux == answer["num_aux"]
        and answer["neox"]
    ), name
    assert [config.num_attention_heads, config.num_key_value_heads, config.head_dim] == answer[
        "heads"
    ], name
    own = {n: list(p.shape) for n, p in draft.named_parameters()}
    fused = {n for n in shapes if "qkv_proj" in n or "gate_up_proj" in n or "embed_tokens" in n}
    parts = {
        n
        for n in own
        if any(p in n for p in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    }
    theirs = {n.removeprefix("model."): s for n, s in shapes.items() if n not in fused}
    assert {n: s for n, s in own.items() if n not in parts and n != "lm_head.weight"} == {
        n: s for n, s in theirs.items() if n != "lm_head.weight"
    }, name
    ids = draft.d2t + torch.arange(len(draft.d2t))
    assert answer["hot_token_id"] == (ids.tolist() if draft.d2t.any() else None), name
    positions = torch.tensor([int(p) for p in answer["rope"]])
    theirs = torch.tensor(list(answer["rope"].values()))
    torch.testing.assert_close(
        draft._rope(positions), theirs, atol=2e-5, rtol=1e-6, msg=lambda m: f"{name}: {m}"
    )


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_sglang_serves_is_trained_as_it_is_served(site, name):
    assert site.problems(name) == []
    assert_served_as_trained(site, name)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_in_one_sentence(site, name):
    (problem,) = [p for p in site.problems(name) if REFUSED[name][1] in p]
    assert "\n" not in problem and problem.endswith(".")
    fails = list(REFUSED).index(name) >= list(REFUSED).index("rope nested")
    assert ("error" in site.answers[name]) == fails, site.answers[name]


@pytest.mark.parametrize("name", AT_START)
def test_what_sglang_refuses_besides_is_refused_at_start(site, name):
    assert site.problems(name) == []
    said = site.answers[name]["start"]
    assert (
        "SGLang refuses its config.json" in said and AT_START[name][1] in said and "\n" not in said
    )


def test_no_value_of_a_key_ends_in_a_traceback_or_is_served_otherwise(site):
    accepted = 0
    for key in READ:
        for n in range(len(VALUES)):
            if site.problems(f"{key} {n}") == []:
                accepted += 1
                assert_served_as_trained(site, f"{key} {n}")
    assert accepted > 60, accepted


def test_keys_that_sglang_never_reads_are_not_looked_at(site):
    for key in UNREAD:
        for n in range(len(VALUES)):
            assert site.problems(f"{key} {n}") == []
            assert_served_as_trained(site, f"{key} {n}")


@pytest.mark.parametrize(
    "name",
    ["EAGLE 3.1", "EAGLE 3.1 in eagle_config", "fc_norm", "use_aux_norm", "bias", "attention_bias",
    "d2t in int32",
     "another t2d", "leftovers", "half precision", "sharded", "a stray file"],
)  # fmt: skip
def test_tensors_that_sglang_takes(site, name):
    assert site.problems(name) == []
    assert_served_as_trained(site, name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("attention_bias lacks it", "lacks layers.0.self_attn.o_proj.bias"),
        ("a bias that counts", "skip silently: layers.0.self_attn.q_proj.bias"),
        ("head under model.", "lacks lm_head.weight"),
        ("sharded, one absent", "names files that are not there: 1.safetensors"),
    ],
)
def test_tensors_that_sglang_would_miss(site, name, said):
    assert any(said in p for p in site.problems(name))
    answer = site.answers[name]
    assert "error" in answer or answer["unloaded"] or name == "a bias that counts"


def test_every_target_of_sglang_captures_what_aux_layers_says(site):
    """For three layers named each way, and none named."""
    layers, asked = site.captured.pop("layers"), site.captured.pop("ids")
    assert (
        len(site.captured) > 30
        and {"GptOssForCausalLM", "DeepseekV3ForCausalLM"} <= site.captured.keys()
    )
    for architecture, found in site.captured.items():
        config = {"architectures": [architecture], "num_hidden_layers": layers}
        if architecture.endswith(("NextN", "Eagle")):
            # drafts of a target, not targets
            continue
        for ids, entering in zip(asked, found["taken"], strict=True):
            draft = {
                "eagle_config": {} if ids is None else {"eagle_aux_hidden_state_layer_ids": ids}
            }
            try:
                outputs = aux_layer_ids(draft, layers, config)
            except ValueError:
                assert ids is not None and (max(entering) >= layers or min(entering) < 1), (
                    architecture,
                    ids,
                )
                continue
            assert [o + 1 for o in outputs] == entering, (architecture, ids)
            again = {
                "eagle_config": {"eagle_aux_hidden_state_layer_ids": ids_that_name(outputs, config)}
            }
            assert aux_layer_ids(again, layers, config) == outputs
