"""The judge of drafts, judged: SGLang's own loader is asked about each of them.

What draft_check accepts, SGLang loads, whole, and the trainer computes as SGLang was built; what
SGLang never reads is accepted. `sglang_loader.py` is the loader, in one process for all drafts.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import make_random_draft, make_random_target
from safetensors.torch import load_file, save_file

from aurora_sglang_plugin.drafts import eagle3_check
from aurora_sglang_plugin.drafts.aux_layers import CONVENTIONS, aux_layer_ids, ids_that_name
from aurora_sglang_plugin.drafts.eagle3_config import read_draft_config
from aurora_sglang_plugin.drafts.eagle3_keys import FAMILIES
from aurora_trainer.drafts.eagle3 import Draft
from aurora_trainer.drafts.target import open_target

AUX, H = [0, 2, 4], 64
IDS = {"eagle_aux_hidden_state_layer_ids": AUX}
ABSENT = object()
VALUES = [ABSENT, None, "x", [1], {}, -1, 0, 1, 1.5, True, False, math.nan]
READ = (
    "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads"
    " num_key_value_heads head_dim hidden_act rms_norm_eps rope_theta rope_scaling rope_parameters"
    " max_position_embeddings vocab_size draft_vocab_size tie_word_embeddings dtype"
    " target_hidden_size num_aux_hidden_states eagle_config fc_norm norm_before_fc norm_output bias"
    " attention_bias mlp_bias partial_rotary_factor rope_is_neox_style layer_types"
    " quantization_config text_config final_logit_softcapping auto_map use_cache pad_token_id"
    " eos_token_id initializer_range attention_dropout architectures"
).split()
UNREAD = (
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "transformers_version",
    "logit_scale",
    "aurora",
)


def yarn(**more):
    return {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **more}


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Changes to config.json that leave a draft as it is, or another one that is computed.
ACCEPTED = {
    "yarn": {"rope_scaling": yarn()},
    "yarn, both mscales": {"rope_scaling": yarn(mscale=0.7, mscale_all_dim=1.3)},
    "yarn, one mscale": {"rope_scaling": yarn(mscale=0.7)},
    "yarn of Kimi": {"rope_scaling": yarn(factor=64.0, beta_fast=32, beta_slow=1, mscale=1,
    mscale_all_dim=1)},
    "yarn, not truncated": {"rope_scaling": yarn(truncate=False, beta_fast=16.0, beta_slow=2)},
    "yarn, other factors": {"rope_scaling": yarn(attn_factor=1.5, extrapolation_factor=0.5,
    attention_factor=9.0)},
    "yarn of an integer": {"rope_parameters": yarn(factor=8, rope_theta=500.0),
    "rope_scaling": None},
    "yarn, theta beside it": {"rope_scaling": yarn(), "rope_theta": 1e6},
    "yarn, length at the top": {"rope_scaling": yarn(), "original_max_position_embeddings": 128},
    "yarn, length by default": {"rope_scaling": {"type": "yarn", "factor": 2.0},
    "max_position_embeddings": 256},
    "llama3": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 512}},
    "llama3, length by default": {"rope_scaling": LLAMA3},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear of an integer": {"rope_scaling": {"type": "linear", "factor": 4}},
    "scaling goes before parameters": {"rope_scaling": {"rope_type": "default"},
    "rope_parameters": yarn()},
    "a factor without a type": {"rope_scaling": {"factor": 4.0}},
    "partial among the parameters": {"rope_parameters": {"rope_theta": 1e4,
    "partial_rotary_factor": 0.5}},
    "qwen2": {"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": False},
    "qwen3": {"model_type": "qwen3", "rope_theta": 1e6},
    "qwen3_moe": {"model_type": "qwen3_moe"},
    "qwen2_moe": {"model_type": "qwen2_moe"},
    "mistral": {"model_type": "mistral"},
    "mixtral": {"model_type": "mixtral", "rope_theta": ABSENT, "rms_norm_eps": ABSENT},
    "phi3": {"model_type": "phi3", "rms_norm_eps": ABSENT},
    "qwen2, head_dim by default": {"model_type": "qwen2", "head_dim": ABSENT},
    "mistral, theta by default": {"model_type": "mistral", "rope_theta": ABSENT,
    "rms_norm_eps": ABSENT},
    "a second architecture": {"architectures": ["LlamaForCausalLMEagle3", "Other"]},
    "layers named twice": {"eagle_config": IDS, "eagle_aux_hidden_state_layer_ids": [1, 3, 5]},
    "mlp_bias without tensors": {"mlp_bias": True},
    "layer types": {"layer_types": ["sliding_attention"], "sliding_window": 64},
    "numbers of features": {"num_aux_hidden_states": 3,
    "eagle_config": {**IDS, "use_aux_hidden_state": True}},
    "a softcap of zero": {"final_logit_softcapping": 0.0},
}  # fmt: skip
ACCEPTED |= {
    f"{f}, yarn": {"model_type": f, "rope_scaling": yarn()} for f in FAMILIES if f != "phi3"
}
# Changes that are refused: what the sentence names. SGLang fails on those after the line, and
# serves the others.
REFUSED = {
    "rope dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    "half of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "softcap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "not neox": ({"rope_is_neox_style": False}, "rope_is_neox_style"),
    "aux off": ({"eagle_config": {**IDS, "use_aux_hidden_state": False}}, "use_aux_hidden_state"),
    "norm_output elsewhere": ({"eagle_config": {**IDS, "norm_output": True}},
    "eagle_config.norm_output"),
    "fc_norm elsewhere": ({"eagle_config": {**IDS, "fc_norm": True}}, "eagle_config.fc_norm"),
    "layers at the top alone": ({"eagle_config": ABSENT,
    "eagle_aux_hidden_state_layer_ids": [1, 3, 5]}, "at its top"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    "speculators' residual": ({"norm_before_residual": True}, "norm_before_residual"),
    "another family": ({"model_type": "glm4"}, "model_type"),
    # ---- SGLang fails
    "rope nested": ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
    "nested by layer type"),
    "rope longrope": ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope'"),
    "rope nested, with layer types": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}},
        "layer_types": ["full_attention"]}, "nested"),
    "phi3 stretched": ({"model_type": "phi3", "rope_scaling": yarn()}, "longrope"),
    "yarn without a factor": ({"rope_scaling": {"type": "yarn"}}, "lacks factor"),
    "yarn with a null": ({"rope_scaling": yarn(beta_fast=None)}, "beta_fast = None"),
    "yarn with a text": ({"rope_scaling": yarn(factor="4")}, "factor = '4'"),
    "an unknown rope": ({"rope_scaling": {"type": "new", "factor": 2.0}}, "'new'"),
    "layer types of the target": ({"layer_types": ["full_attention"] * 6}, "layer_types"),
    "a model inside": ({"text_config": {"hidden_size": 8}}, "text_config"),
    "an unknown family": ({"model_type": "new_model"}, "model_type"),
    "heads that do not divide": ({"num_attention_heads": 5, "head_dim": 16}, "not a multiple"),
    "a width of its own, null": ({"target_hidden_size": None}, "target_hidden_size"),
    "an empty quantization": ({"quantization_config": {}}, "quantization_config"),
}  # fmt: skip

# Changes that only transformers or the server's own length refuses: keys that nobody reads, too
# many to list.
AT_START = {
    "fewer positions": ({"max_position_embeddings": 64}, "context_length"),
    "an unknown layer type": ({"layer_types": ["no such type"]}, "layer_types"),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return Site(tmp_path_factory.mktemp("judge"))


class Site:
    """A target and changed copies of one draft; SGLang's answers for all of them, asked once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.target = open_target(make_random_target(folder / "target"))
        self.base = make_random_draft(
            folder / "base", folder / "target", draft_vocab=300, aux_layer_ids=AUX
        )
        self.config = json.loads((self.base / "config.json").read_text())
        self.tensors = load_file(self.base / "model.safetensors")
        self.names: dict[str, str] = {}
        for name, change in ACCEPTED.items():
            self.add(name, change)
        for name, (change, _) in REFUSED.items():
            self.add(name, change)
        for key in (*READ, *UNREAD):
            for n, value in enumerate(VALUES):
                self.add(f"{key} {n}", {key: value})
        for name, (change, _) in AT_START.items():
            self.add(name, change)
        ones, bias = torch.ones, torch.randn(H)
        self.add(
            "EAGLE 3.1",
            {"norm_output": True, "norm_before_fc": True},
            {"input_norm.weight": torch.rand(3 * H)},
        )
        self.add("EAGLE 3.1 in eagle_config",
        {"eagle_config": {**IDS, "norm_before_fc": True}, "norm_output": True},
                 {"input_norm.weight": torch.rand(3 * H)})  # fmt: skip
        norms = {f"fc_norm.{i}.weight": torch.rand(H) for i in range(3)}
        self.add("fc_norm", {"fc_norm": True}, norms)
        low = dict(
            zip(("aux_norm_low", "aux_norm_mid", "aux_norm_high"), norms.values(), strict=True)
        )
        self.add("use_aux_norm", {"use_aux_norm": True}, {f"{n}.weight": t for n, t in low.items()})
        biases = {"fc.bias": bias, "midlayer.self_attn.o_proj.bias": bias.clone()}
        self.add("bias", {"bias": True}, biases)
        self.add(
            "attention_bias",
            {"attention_bias": True},
            {"midlayer.self_attn.o_proj.bias": bias.clone()},
        )
        self.add("attention_bias lacks it", {"attention_bias": True})
        self.add("d2t in int32", {}, {"d2t": self.tensors["d2t"].int()})
        self.add("another t2d", {}, {"t2d": ~self.tensors["t2d"]})
        self.add("leftovers", {}, {
            "midlayer.self_attn.rotary_emb.inv_freq": ones(8), "verifier_norm.weight": ones(H),
            "midlayer.self_attn.q_proj.bias": torch.zeros(H),
            "embed_tokens.weight": torch.randn(512, H),
        })  # fmt: skip
        self.add("a bias that counts", {}, {"midlayer.self_attn.q_proj.bias": torch.ones(H)})
        self.add(
            "head under model.",
            {},
            {"model.lm_head.weight": self.tensors["lm_head.weight"]},
            ["lm_head.weight"],
        )
        self.add(
            "half precision",
            {},
            {n: t.half() for n, t in self.tensors.items() if t.is_floating_point()},
        )
        self.add("sharded", {}, shards=2)
        self.add("sharded, one absent", {}, shards=2)
        (self.path("sharded, one absent") / "1.safetensors").unlink()
        self.add("a stray file", {}, shards=2)
        save_file({"norm.weight": ones(H)}, self.path("a stray file") / "stray.safetensors")
        self.answers, self.captured = self.ask()

    def path(self, name: str) -> Path:
        return self.folder / self.names[name]

    def add(self, name, change, tensors=None, without=(), shards=0):
        self.names[name] = str(len(self.names))
        path = self.path(name)
        path.mkdir()
        config = {k: v for k, v in {**self.config, **change}.items() if v is not ABSENT}
        (path / "config.json").write_text(json.dumps(config))
        if not (tensors or without or shards):
            (path / "model.safetensors").symlink_to(self.base / "model.safetensors")
            return
        kept = {n: t for n, t in {**self.tensors, **(tensors or {})}.items() if n not in without}
        if not shards:
            save_file(kept, path / "model.safetensors")
            return
        files = {n: f"{i % shards}.safetensors" for i, n in enumerate(kept)}
        for file in set(files.values()):
            save_file({n: t for n, t in kept.items() if files[n] == file}, path / file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    def ask(self):
        result = subprocess.run(
            [sys.executable, Path(__file__).parents[2] / "support" / "sglang_loader.py",
            str(self.target.directory)],
            input="\n".join(str(self.path(n)) for n in self.names),
            env={**os.environ, "TMPDIR": str(self.folder)},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        *lines, captured = map(json.loads, result.stdout.splitlines())
        return dict(zip(self.names, lines, strict=True)), captured

    def problems(self, name: str) -> list[str]:
        return eagle3_check.draft_problems(self.path(name), self.target.config)


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


def test_the_last_output_is_captured_by_the_models_that_are_said_to():
    import re

    import sglang

    said = {name for names, how in CONVENTIONS.items() if how.last_output for name in names}
    pattern = (
        r"(end_layer|num_layers|num_hidden_layers|len\(self\.layers\)) in"
        r" self\.(model\.)?layers_to_capture"
    )
    for path in sorted((Path(sglang.__file__).parent / "srt" / "models").glob("*.py")):
        text = path.read_text()
        classes = re.findall(r"^class (\w+For(?:CausalLM|ConditionalGeneration))\b", text, re.M)
        if "def set_eagle3_layers_to_capture" in text and classes and re.search(pattern, text):
            assert set(classes) & said, path.name


def test_absent_keys_are_what_transformers_takes_for_them():
    """Speculators writes only what differs from its family's defaults."""
    from transformers import AutoConfig

    for family, defaults in FAMILIES.items():
        # an alias that SGLang registers
        if family == "kimi_k2":
            continue
        theirs = AutoConfig.for_model(family)
        named = {**theirs.rope_parameters, **vars(theirs)}
        for key, value in {
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e4,
            "hidden_act": "silu",
            **defaults,
        }.items():
            assert named[key] == value, (family, key)
        config = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": family,
            "draft_vocab_size": 10,
        }
        draft, problems = read_draft_config(config)
        assert problems == [] and draft.hidden_size == theirs.hidden_size, (family, problems)
        assert draft.num_key_value_heads == theirs.num_key_value_heads
        assert draft.head_dim == (
            getattr(theirs, "head_dim", None) or theirs.hidden_size // draft.num_attention_heads
        )
        assert not theirs.tie_word_embeddings and not getattr(theirs, "attention_bias", False)
