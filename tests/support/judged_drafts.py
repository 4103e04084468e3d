"""A target and some 600 changed copies of one draft, and what SGLang's own loader says of each."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch
from models import make_random_draft, make_random_target
from safetensors.torch import load_file, save_file

from aurora_sglang_plugin.drafts import eagle3_check
from aurora_sglang_plugin.drafts.eagle3_keys import FAMILIES
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
            [sys.executable, Path(__file__).with_name("sglang_loader.py"),
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
