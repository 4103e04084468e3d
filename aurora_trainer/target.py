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
    """config.json of a Llama-like target and where each of its tensors lies."""

    directory: Path
    config: dict[str, Any]
    files: dict[str, str]  # tensor name -> file name

    @property
    def head_dim(self) -> int:
        return self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Those of config.json and of generation_config.json, where there is one."""
        path = self.directory / "generation_config.json"
        generation = json.loads(path.read_text()) if path.exists() else {}
        ids = (config.get("eos_token_id") for config in (self.config, generation))
        return tuple(sorted({i for e in ids if e is not None for i in (e if isinstance(e, list) else [e])}))

    def tensor(self, name: str) -> Tensor:
        """Raises ValueError where the target has no such tensor."""
        if name not in self.files:
            raise ValueError(f"{self.directory} has no tensor {name}; expected a Llama-like model in safetensors")
        with safe_open(self.directory / self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def embedding(self) -> Tensor:
        """[V, H], in the checkpoint's dtype."""
        return self.tensor("model.embed_tokens.weight")

    def head(self) -> Tensor:
        """[V, H]; the embedding where the two are tied."""
        tied = self.config.get("tie_word_embeddings", False) or "lm_head.weight" not in self.files
        return self.embedding() if tied else self.tensor("lm_head.weight")


def open_target(model: str | Path) -> Target:
    """`model` is a directory or the name of a Hugging Face model in the local cache. Raises ValueError, OSError."""
    directory = Path(model)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(str(model), local_files_only=True))
    if not (directory / "config.json").exists():
        raise ValueError(f"{directory} has no config.json; expected a Hugging Face model directory")
    config = json.loads((directory / "config.json").read_text())
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
