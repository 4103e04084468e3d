"""The draft's config.json: what of SGLang's EAGLE3 format this trainer can compute, and a refusal for the rest.

Defaults of absent keys are those of the Llama configuration in transformers, because SGLang reads the file with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURE = "LlamaForCausalLMEagle3"


@dataclass(frozen=True)
class DraftConfig:
    """Shapes and switches of a draft, e.g. H = hidden_size 256, VD = draft_vocab_size 2048, F = 3 * 256 features."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    aux_layer_ids: tuple[int, ...] | None = None  # layers whose OUTPUT is a feature; None: the server's default three
    num_aux: int = 3
    target_hidden_size: int = 0  # 0: hidden_size
    num_hidden_layers: int = 1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, float] | None = None  # the parameters of rope_type llama3; None: rope_type default
    max_position_embeddings: int = 2048
    bias: bool = False  # of fc and o_proj, as SGLang reads the key `bias`
    fc_norm: bool = False  # an RMSNorm for each aux feature before fc
    norm_before_fc: bool = False  # one RMSNorm over all aux features before fc
    norm_output: bool = False  # the state handed to the next step is post-norm

    @property
    def feature_size(self) -> int:
        """F, the width of aux_hidden_states."""
        return self.num_aux * (self.target_hidden_size or self.hidden_size)

    @classmethod
    def read(cls, directory: Path) -> DraftConfig:
        """Raises ValueError naming the file, the key, and what was expected."""
        path = Path(directory) / "config.json"
        try:
            return cls.from_json(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> DraftConfig:
        if refused := not_computed(raw):
            raise ValueError("; ".join(refused))
        eagle = raw.get("eagle_config") or {}
        missing = [k for k in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size") if k not in raw]
        if missing:
            raise ValueError(f"draft config lacks {missing}")
        if raw.get("draft_vocab_size") is None:
            raise ValueError(
                "draft_vocab_size is absent or null: SGLang would draft with the target's head, which cannot be "
                "trained; write draft_vocab_size = vocab_size and the head as lm_head.weight"
            )
        ids = eagle.get("eagle_aux_hidden_state_layer_ids")
        num_aux = raw.get("num_aux_hidden_states") or (len(ids) if ids else 3)
        if ids and len(ids) != num_aux:
            raise ValueError(f"num_aux_hidden_states is {num_aux}, eagle_aux_hidden_state_layer_ids names {ids}")
        theta, scaling = _rope(raw)
        config = cls(
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_attention_heads=raw["num_attention_heads"],
            num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            vocab_size=raw["vocab_size"],
            draft_vocab_size=raw["draft_vocab_size"],
            aux_layer_ids=tuple(ids) if ids else None,
            num_aux=num_aux,
            target_hidden_size=raw.get("target_hidden_size") or 0,
            num_hidden_layers=raw.get("num_hidden_layers", 32),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            bias=bool(raw.get("bias", False)),
            fc_norm=bool(raw.get("fc_norm") or raw.get("use_aux_norm", False)),
            norm_before_fc=bool(eagle.get("norm_before_fc", raw.get("norm_before_fc", False))),
            norm_output=bool(raw.get("norm_output", False)),
        )
        config._check()
        return config

    def _check(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(
                f"{self.num_attention_heads} heads, {self.num_key_value_heads} key heads, head_dim {self.head_dim}: "
                "expected heads a multiple of key heads and an even head_dim"
            )
        if not 0 < self.draft_vocab_size <= self.vocab_size:
            raise ValueError(f"draft_vocab_size {self.draft_vocab_size}, expected 1 to vocab_size {self.vocab_size}")
        if self.feature_size == self.hidden_size:
            raise ValueError(
                f"features are as wide as the draft ({self.hidden_size}), so SGLang would never apply fc; "
                "name more aux layers"
            )

    def to_json(self, dtype: str = "float32") -> dict[str, Any]:
        """config.json as SGLang reads it; rope is written in the old and the new spelling of transformers."""
        rope = {"rope_type": "llama3", **self.rope_scaling} if self.rope_scaling else {"rope_type": "default"}
        raw = {
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "draft_vocab_size": self.draft_vocab_size,
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": rope if self.rope_scaling else None,
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "bias": self.bias,
            "fc_norm": self.fc_norm,
            "norm_output": self.norm_output,
            "num_aux_hidden_states": self.num_aux,
            "dtype": dtype,
            "eagle_config": {"use_aux_hidden_state": True, "norm_before_fc": self.norm_before_fc},
        }
        if self.aux_layer_ids:
            raw["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = list(self.aux_layer_ids)
        if self.target_hidden_size:
            raw["target_hidden_size"] = self.target_hidden_size
        return raw


def not_computed(raw: dict[str, Any]) -> list[str]:
    """What a config.json asks for that this trainer does not compute as the server would; one text for each."""
    expected = {
        "model_type": ("llama",),
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "tie_word_embeddings": (False,),
        "sliding_window": (None,),
        "partial_rotary_factor": (1, None),
        "rope_is_neox_style": (True,),
        "quantization_config": (None,),
        "norm_before_residual": (False, None),  # of speculators: SGLang's draft adds the state as it came
    }
    refused = [
        f"draft config has {key} = {raw[key]!r}; this trainer computes only {allowed[0]!r}"
        for key, allowed in expected.items()
        # an absent tie_word_embeddings is false for Llama; an absent model_type would not load in the server at all
        if key in raw and raw[key] not in allowed
    ]
    if raw.get("architectures") != [ARCHITECTURE]:
        found = raw.get("architectures")
        refused.append(f"draft config has architectures {found!r}, expected [{ARCHITECTURE!r}]")
    if not (raw.get("eagle_config") or {}).get("use_aux_hidden_state", True):
        refused.append("draft config has eagle_config.use_aux_hidden_state = false; EAGLE3 drafts read aux features")
    try:
        _rope(raw)
    except ValueError as error:
        refused.append(str(error))
    return refused


def _rope(raw: dict[str, Any]) -> tuple[float, dict[str, float] | None]:
    """(theta, llama3 parameters or None). Raises ValueError for scalings that are not implemented."""
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = float(rope.pop("rope_theta", raw.get("rope_theta", 10000.0)))
    kinds = {rope.pop("rope_type", "default"), rope.pop("type", "default")} - {"default"}
    if not kinds:
        if rope.get("factor", 1.0) != 1.0 or "mrope_section" in rope:
            raise ValueError(f"draft config has rope scaling {rope} without a type that is implemented")
        return theta, None
    if kinds != {"llama3"}:
        raise ValueError(f"draft config has rope type {sorted(kinds)}; this trainer computes only default and llama3")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [n for n in names if n not in rope]:
        raise ValueError(f"draft config has llama3 rope scaling without {missing}")
    return theta, {n: rope[n] for n in names}
