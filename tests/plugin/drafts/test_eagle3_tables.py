"""The tables that drafts are judged by, against the sources that they repeat: SGLang's models and
transformers' configs.
"""

from pathlib import Path

from aurora_sglang_plugin.drafts.aux_layers import CONVENTIONS
from aurora_sglang_plugin.drafts.eagle3_config import read_draft_config
from aurora_sglang_plugin.drafts.eagle3_keys import FAMILIES


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
