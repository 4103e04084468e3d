"""The frozen target's files: its config and single tensors, read from safetensors without loading the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """config.json of a Llama-like target (of its language model, where it has others) and where its tensors lie."""

    directory: Path
    config: dict[str, Any]
    files: dict[str, str]  # tensor name -> file name

    @property
    def head_dim(self) -> int:
        """Of a draft's attention; a latent (MLA) target has one for its values only."""
        own = self.config.get("v_head_dim") if "kv_lora_rank" in self.config else self.config.get("head_dim")
        return own or self.config["hidden_size"] // self.config["num_attention_heads"]

    @property
    def is_mixture(self) -> bool:
        """Of experts: its layers have no dense MLP, and its intermediate_size may be an expert's."""
        return any(self.config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Those of config.json and of generation_config.json, where there is one."""
        path = self.directory / "generation_config.json"
        generation = json.loads(path.read_text()) if path.exists() else {}
        ids = (config.get("eos_token_id") for config in (self.config, generation))
        return tuple(sorted({i for e in ids if e is not None for i in (e if isinstance(e, list) else [e])}))

    def tensor(self, name: str) -> Tensor:
        """Raises ValueError where the target has no such tensor."""
        stored = self.stored(name)
        if stored is None:
            raise ValueError(f"{self.directory} has no tensor {name}; expected a Llama-like model in safetensors")
        with safe_open(self.directory / self.files[stored], framework="pt") as file:
            return file.get_tensor(stored)

    def stored(self, name: str) -> str | None:
        """What a language model's tensor is called in the files, e.g. language_model.model.norm.weight, or None."""
        names = (name, f"language_model.{name}", name.replace("model.", "model.language_model.", 1))
        return next((n for n in names if n in self.files), None)

    def embedding(self) -> Tensor:
        """[V, H], in the checkpoint's dtype."""
        return self.tensor("model.embed_tokens.weight")

    def head(self) -> Tensor:
        """[V, H]; the embedding where the two are tied."""
        tied = self.config.get("tie_word_embeddings", False) or self.stored("lm_head.weight") is None
        return self.embedding() if tied else self.tensor("lm_head.weight")


def read_config(model: str | Path) -> Target:
    """The target without its tensors: a directory, a config.json, or the name of a model in the local HF cache.

    Raises ValueError.
    """
    path = Path(model)
    if path.is_file():
        path = path.parent if path.name == "config.json" else path
    elif not path.is_dir():
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(str(model), local_files_only=True))
        except Exception as error:
            raise ValueError(
                f"target {model}: neither a directory nor a model in the local Hugging Face cache "
                f"({type(error).__name__}); expected one of them: give a directory, or `hf download {model}`"
            ) from None
    file = path if path.is_file() else path / "config.json"
    if not file.exists():
        raise ValueError(f"{path} has no config.json; expected a Hugging Face model directory")
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    config = raw.get("text_config", raw) if "hidden_size" not in raw else raw
    missing = [k for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size") if k not in config]
    if missing and config:
        raise ValueError(f"{file} lacks {', '.join(missing)}; expected the config of a language model")
    if config is not raw:  # what the whole says of the language model
        config = {k: raw[k] for k in ("eos_token_id", "dtype", "torch_dtype") if raw.get(k) is not None} | config
    return Target(path if path.is_dir() else path.parent, config, {})


def open_target(model: str | Path) -> Target:
    """`model` is a directory or the name of a Hugging Face model in the local cache. Raises ValueError."""
    target = read_config(model)
    directory, config = target.directory, target.config
    index = directory / "model.safetensors.index.json"
    if index.exists():
        files = json.loads(index.read_text())["weight_map"]
    else:
        files = {}
        for path in sorted(directory.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                files.update(dict.fromkeys(file.keys(), path.name))
    if not files:
        raise ValueError(f"{directory} has no *.safetensors; other weight formats are not read")
    return Target(directory, config, files)
