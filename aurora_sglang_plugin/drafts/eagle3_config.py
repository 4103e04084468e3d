"""A draft's config.json as SGLang 0.5.23 reads it: the one home of what its keys mean and which
values are computed.

Server start, `aurora-trainer check`, `import` and the trainer all ask here. A key that SGLang never
reads is not looked at; one that transformers would refuse is refused here first, in a sentence.
`tests/plugin/drafts/test_eagle3_check.py` asks SGLang's own loader. This module imports neither
torch nor sglang.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aurora_sglang_plugin.drafts import aux_layers
from aurora_sglang_plugin.drafts.eagle3_keys import ARCHITECTURE, SHAPED, SWITCH, fits, read_keys
from aurora_sglang_plugin.drafts.eagle3_rope import read_rope
from aurora_sglang_plugin.drafts.tensor_files import read_json, shown


@dataclass(frozen=True)
class DraftConfig:
    """Shapes and switches of a draft, e.g. H = hidden_size 256, VD = draft_vocab_size 2048, F = 3 *
    256 features."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    # as eagle_config names them (aux_layers.py says what that means); None: the server's default
    # three
    aux_layer_ids: tuple[int, ...] | None = None
    # the same as vLLM and speculators name them, by what they enter; None: one more each
    entered_layer_ids: tuple[int, ...] | None = None
    num_aux: int = 3
    # 0: hidden_size
    target_hidden_size: int = 0
    num_hidden_layers: int = 1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    # rope_type and its parameters (eagle3_rope.py); None: the plain one
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 2048
    # of fc and o_proj, as SGLang reads the key `bias`
    bias: bool = False
    # of o_proj
    attention_bias: bool = False
    # an RMSNorm for each aux feature before fc
    fc_norm: bool = False
    # one RMSNorm over all aux features before fc
    norm_before_fc: bool = False
    # the state handed to the next step is post-norm
    norm_output: bool = False

    @property
    def feature_size(self) -> int:
        """F, the width of aux_hidden_states."""
        return self.num_aux * (self.target_hidden_size or self.hidden_size)

    @classmethod
    def read(cls, directory: Path) -> DraftConfig:
        """Raises ValueError naming the directory, the key, and what was expected."""
        try:
            return cls.from_json(read_json(Path(directory) / "config.json"))
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> DraftConfig:
        """Raises ValueError with everything that is wrong."""
        config, problems = read_draft_config(raw)
        if config is None or problems:
            raise ValueError(" ".join(problems))
        return config

    def to_json(self, dtype: str = "float32") -> dict[str, Any]:
        """config.json as SGLang reads it; rope is written in the old and the new spelling of
        transformers."""
        rope = self.rope_scaling or {"rope_type": "default"}
        raw: dict[str, Any] = {
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
            "rope_scaling": {**rope, "rope_theta": self.rope_theta} if self.rope_scaling else None,
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            "tie_word_embeddings": False,
            "attention_bias": self.attention_bias,
            "mlp_bias": False,
            "bias": self.bias,
            "fc_norm": self.fc_norm,
            "norm_output": self.norm_output,
            "num_aux_hidden_states": self.num_aux,
            "dtype": dtype,
            "eagle_config": {"use_aux_hidden_state": True, "norm_before_fc": self.norm_before_fc},
        }
        if self.aux_layer_ids:
            raw["eagle_config"][aux_layers.KEY] = list(self.aux_layer_ids)
        if self.entered_layer_ids:
            raw[aux_layers.KEY] = list(self.entered_layer_ids)
        if self.target_hidden_size:
            raw["target_hidden_size"] = self.target_hidden_size
        return raw


def read_draft_config(raw: Mapping[str, Any]) -> tuple[DraftConfig | None, list[str]]:
    """(what the config says, everything about it that cannot be served and trained on, a sentence
    or two each).

    None where the keys that shapes follow from are missing or of another type.
    """
    values, problems = read_keys(raw)
    theta, scaling, rope_problems = read_rope({**raw, **values})
    problems += rope_problems
    ids, count, eagle = _read_eagle(raw, values.get("num_aux_hidden_states"), problems)
    if not all(key in values for key in (*SHAPED, "vocab_size")):
        return None, problems
    h, heads = values["hidden_size"], values["num_attention_heads"]
    config = DraftConfig(
        hidden_size=h,
        intermediate_size=values["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_key_value_heads", heads),
        head_dim=values.get("head_dim", h // heads),
        vocab_size=values["vocab_size"],
        draft_vocab_size=_draft_vocab(raw, values["vocab_size"], problems),
        aux_layer_ids=ids,
        entered_layer_ids=_entered(raw, ids),
        num_aux=count,
        target_hidden_size=values.get("target_hidden_size", 0),
        num_hidden_layers=values["num_hidden_layers"],
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=values.get("max_position_embeddings", 2048),
        bias=bool(values.get("bias")),
        attention_bias=bool(values.get("attention_bias")),
        fc_norm=bool(values.get("fc_norm") or values.get("use_aux_norm")),
        norm_before_fc=bool(eagle.get("norm_before_fc", values.get("norm_before_fc"))),
        norm_output=bool(values.get("norm_output")),
    )
    problems += _shape_problems(config)
    return config, problems


def _read_eagle(
    raw: Mapping[str, Any], count: int | None, problems: list[str]
) -> tuple[tuple[int, ...] | None, int, dict[str, Any]]:
    """(ids, number of aux features, eagle_config), and what is wrong with them, or said where
    SGLang does not read."""
    eagle = raw.get("eagle_config") or {}
    if not isinstance(eagle, dict):
        problems.append(f"config.json has eagle_config = {shown(eagle)}, expected an object.")
        eagle = {}
    if eagle.get("use_aux_hidden_state", True) is not True:
        problems.append(
            f"eagle_config.use_aux_hidden_state is {shown(eagle['use_aux_hidden_state'])}: AURORA "
            f"drafts from aux "
            "hidden states only."
        )
    if "norm_before_fc" in eagle and not fits(SWITCH, eagle["norm_before_fc"]):
        problems.append(
            f"eagle_config has norm_before_fc = {shown(eagle['norm_before_fc'])}, expected "
            f"{SWITCH}."
        )
    problems += [
        f"eagle_config.{key} is true, and SGLang reads it at the top of config.json only; "
        f"`aurora-trainer import` "
        "writes it there."
        for key in ("norm_output", "fc_norm")
        if eagle.get(key) and not raw.get(key)
    ]
    ids = eagle.get(aux_layers.KEY)
    listed = isinstance(ids, list) and bool(ids) and all(type(i) is int for i in ids)
    number = len(ids) if listed else 3
    if count is not None and count != number:
        named = (
            f"{number} layers are captured: {ids}"
            if listed
            else "SGLang's default captures three layers"
        )
        problems.append(f"num_aux_hidden_states is {count}, but {named}.")
    return (tuple(ids) if listed else None), count or number, eagle


def _entered(raw: Mapping[str, Any], ids: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The ids at the top of the config, for other readers; None where they follow from SGLang's."""
    entered = raw.get(aux_layers.KEY)
    if ids is None or not isinstance(entered, list) or len(entered) != len(ids):
        return None
    return None if entered == [i + 1 for i in ids] else tuple(entered)


def _draft_vocab(raw: Mapping[str, Any], vocab: int, problems: list[str]) -> int:
    size = raw.get("draft_vocab_size")
    if size is None:
        problems.append(
            "config.json has no draft_vocab_size; where draft_vocab_size is absent or null, SGLang "
            "drafts with the "
            "target's own head, which a swap must never write. Expected the size, and the draft's "
            "own lm_head.weight."
        )
    elif type(size) is not int or not 0 < size <= vocab:
        problems.append(f"draft_vocab_size is {shown(size)}, expected 1 to {vocab}.")
    else:
        return size
    return vocab


def _shape_problems(config: DraftConfig) -> list[str]:
    problems = []
    h, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        problems.append(f"{heads} attention heads, {kv_heads} key-value heads: expected a divisor.")
    if h % heads:
        problems.append(
            f"hidden_size {h} is not a multiple of num_attention_heads {heads}, as transformers "
            f"demands."
        )
    if config.head_dim % 2:
        problems.append(f"head_dim is {config.head_dim}, expected an even number.")
    if config.feature_size == h:
        problems.append(
            f"one aux layer of the draft's own width {h} never passes through fc (SGLang would "
            f"never apply fc); name "
            "two or more."
        )
    return problems
