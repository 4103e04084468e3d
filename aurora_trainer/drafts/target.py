"""The frozen target's files: its config and single tensors, read from safetensors without loading
the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aurora_sglang_plugin.drafts.tensor_files import INDEX, read_header, read_json, weight_map
from aurora_sglang_plugin.weights.manifest import EMBEDDING, spellings
from aurora_trainer.drafts.target_config import (
    block_sizes,
    is_zero_centred,
    language_model_config,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
# what stands in the place of `weight`: GPTQ and AWQ, compressed-tensors
PACKED = ("qweight", "weight_packed")
# several codes in one number: NVFP4, MXFP4 and bitsandbytes' 4 bits, under the weight's own name
PACKED_DTYPES = ("U8", "I32", "U32", "I16", "U16", "F4", "F6_E2M3", "F6_E3M2")


@dataclass(frozen=True)
class Target:
    """config.json of a Llama-like target (of its language model, where it has others) and where its
    tensors lie.
    """

    directory: Path
    config: dict[str, Any]
    # tensor name -> file name
    files: dict[str, str]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Those of config.json and of generation_config.json, where there is one, that are tokens
        of the vocabulary (-1 says there is none).
        """
        path = self.directory / "generation_config.json"
        try:
            generation = read_json(path) if path.exists() else {}
        except ValueError as error:
            raise ValueError(f"{self.directory}: {error}") from None
        named = (config.get("eos_token_id") for config in (self.config, generation))
        ids = [i for e in named for i in (e if isinstance(e, list) else [e])]
        v = self.config.get("vocab_size", 0)
        return tuple(sorted({i for i in ids if type(i) is int and 0 <= i < v}))

    def tensor(self, name: str) -> Tensor:
        """In the checkpoint's dtype; float32 where it is stored as codes with scales.

        Raises ValueError where the target has no such tensor here, or none that can be read without
        its quantization.
        """
        stored = self.stored(name)
        if stored is None:
            packed = self.packed(name)
            if packed:
                raise ValueError(
                    f"{self.directory} holds {name} packed, as {packed}: a quantized target."
                    " Expected its float weights: give the unquantized model, or for init-draft"
                    " --kind random"
                )
            raise ValueError(
                f"{self.directory} has no tensor {name}; expected a Llama-like model in safetensors"
            )
        found = self._read(stored)
        return found if found.dtype in FLOATS else self._dequantized(stored, found)

    def stored(self, name: str) -> str | None:
        """What a language model's tensor is called in the files, e.g.
        language_model.model.norm.weight; None where it is not there, or packed.
        """
        found = next((n for n in spellings(name) if n in self.files), None)
        return None if found is None or self._is_packed(found) else found

    def norm(self, name: str) -> Tensor:
        """[H] float32: what an RMS norm multiplies by, e.g. that of model.norm.weight; one more
        than what is stored where the target's norms are zero-centred.
        """
        weight = self.tensor(name).float()
        return weight + 1 if is_zero_centred(self.config, name) else weight

    def embedding(self) -> Tensor:
        """[V, H], in the checkpoint's dtype."""
        return self.tensor(EMBEDDING)

    def head(self) -> Tensor:
        """[V, H]; the embedding where the two are tied.

        Raises ValueError where there is no head that can be read, and the config does not say that
        they are tied.
        """
        tied = self.config.get("tie_word_embeddings")
        # left to the model's default: a checkpoint without a head is one of a tied model
        if tied is None:
            tied = self.stored("lm_head.weight") is None and self.packed("lm_head.weight") is None
        return self.embedding() if tied else self.tensor("lm_head.weight")

    def _read(self, stored: str) -> Tensor:
        path = self.directory / self.files[stored]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(stored)
        except FileNotFoundError:
            raise ValueError(
                f"{path} is not here; expected the file of the target that holds {stored} (the"
                " trainer needs those of its embedding and head, init-draft also that of the last"
                " layer)"
            ) from None
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged: {error}; expected a whole safetensors file"
            ) from None

    def packed(self, name: str) -> str | None:
        """Under which name a quantized tensor is stored in its stead, e.g. lm_head.qweight."""
        names = (s.replace(".weight", f".{part}") for s in spellings(name) for part in PACKED)
        own = (n for n in spellings(name) if n in self.files and self._is_packed(n))
        return next((n for n in names if n in self.files), None) or next(own, None)

    def _is_packed(self, stored: str) -> bool:
        path = self.directory / self.files[stored]
        # absent or damaged: who reads the tensor says so
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_slice(stored).get_dtype() in PACKED_DTYPES
        except (OSError, SafetensorError):
            return False

    def _dequantized(self, stored: str, codes: Tensor) -> Tensor:
        """float32 from codes and the scales beside them: one, one for each row, or one for each
        block.

        A scale multiplies, under either name.
        """
        names = [
            f"{stored}_{end}" for end in ("scale", "scale_inv") if f"{stored}_{end}" in self.files
        ]
        if codes.dtype not in CODES or not names:
            raise ValueError(
                f"{self.directory}: {stored} is {codes.dtype} without scales that are understood;"
                " expected float weights: give the unquantized model, or for init-draft --kind"
                " random"
            )
        scale, size = self._read(names[0]), codes.shape
        # an exponent of two, as microscaling formats store it
        scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
        if scale.dim() == 1 and scale.numel() == size[0] > 1:
            scale = scale[:, None]
        if scale.numel() > 1:
            block = self._block(names[0], size, scale.shape)
            scale = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[
                : size[0], : size[1]
            ]
        return codes.float() * scale

    def _block(self, name: str, size: torch.Size, scales: torch.Size) -> list[int]:
        """Rows and columns that share a scale: as the config says, a whole row, or, where it says
        nothing, as many as go into them evenly.
        """
        said = block_sizes(self.config.get("quantization_config") or {})
        if len(size) == len(scales) == 2 and 0 not in scales:
            even = [s // n for s, n in zip(size, scales)]
            blocks = [*said, [1, size[1]]] if said else [even]
            for block in blocks:
                if [-(-s // min(b, s)) for s, b in zip(size, block)] == list(scales):
                    return block
        raise ValueError(
            f"{self.directory}: {name} is {list(scales)}, expected one scale for each block of"
            f" {said or 'equal size'} of {list(size)}; give the unquantized model"
        )


class TargetTensors:
    """What drafts read of the target and nobody trains: each tensor once for all drafts.

    On `device` and in `dtype`; None: as it is stored.
    """

    def __init__(
        self, target: Target, device: str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        self.target, self.device, self.dtype = target, device, dtype
        self._held: dict[Callable[[Target], Tensor], Tensor] = {}

    def get(self, read: Callable[[Target], Tensor]) -> Tensor:
        """E.g. get(Target.embedding)."""
        if read not in self._held:
            self._held[read] = read(self.target).to(self.device, self.dtype)
        return self._held[read]


def read_config(model: str | Path) -> Target:
    """The target without its tensors: a directory, a config.json, or the name of a model in the
    local HF cache.

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
                f"target {model}: neither a directory nor a model in the local Hugging Face cache"
                f" ({type(error).__name__}); expected one of them: give a directory, or `hf"
                f" download {model}`"
            ) from None
    file = path if path.is_file() else path / "config.json"
    if not file.exists():
        raise ValueError(f"{path} has no config.json; expected a Hugging Face model directory")
    try:
        raw = read_json(file)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    config = language_model_config(file, raw)
    return Target(path if path.is_dir() else path.parent, config, {})


def open_target(model: str | Path) -> Target:
    """`model` is a directory or the name of a Hugging Face model in the local cache.

    Raises ValueError.
    """
    target = read_config(model)
    directory, config = target.directory, target.config
    try:
        if (directory / INDEX).exists():
            files = weight_map(directory)
        else:
            paths = sorted(directory.glob("*.safetensors"))
            files = {name: path.name for path in paths for name, _ in read_header(path)}
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    if not files:
        raise ValueError(f"{directory} has no *.safetensors; other weight formats are not read")
    return Target(directory, config, files)
