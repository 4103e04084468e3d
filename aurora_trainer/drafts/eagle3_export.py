"""`aurora-trainer export`: a draft as a Hugging Face directory that SGLang (EAGLE3 and AURORA) and
others load.

    a weights directory   the version that CURRENT names, or another; its hashes are checked
    a draft directory     config.json and safetensors, a version's directory too
    a checkpoint          step-N, or the directory that holds them; config and d2t come from the
                          initial draft

The output holds config.json and model.safetensors, no tokenizer (servers take the target's) and no
embedding (they share the target's). Bits are the source's unless another dtype is asked for. A
draft of one layer is written with the names `midlayer.*`, which every reader knows: SGLang of any
version, vLLM, SpecForge.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from aurora_sglang_plugin.drafts import aux_layers
from aurora_sglang_plugin.drafts.eagle3_config import DraftConfig
from aurora_sglang_plugin.drafts.eagle3_vocab import MAPS
from aurora_sglang_plugin.drafts.kinds import UNTRAINED
from aurora_sglang_plugin.weights.atomic_files import remove_directory, write_directory
from aurora_sglang_plugin.weights.manifest import (
    CURRENT,
    Manifest,
    current_version,
    read_manifest,
    sha256_file,
    version_name,
)
from aurora_sglang_plugin.weights.writer import versions
from aurora_trainer.checkpoint import read_checkpoint, steps
from aurora_trainer.drafts import vocab
from aurora_trainer.drafts.eagle3_files import read_tensors

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Weights:
    """A draft in memory, without the embedding; `d2t` and `t2d` among the tensors where its
    vocabulary is reduced.
    """

    config: DraftConfig
    # by present-day names, layers.0.*
    tensors: dict[str, Tensor]
    # where it comes from, for config.json
    origin: dict[str, Any]
    # what servers hold, where the tensors are a checkpoint's float32 masters
    cast_to: torch.dtype | None = None
    # init-draft made it, and nobody trained it
    untrained: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """What "same" means: the head's, or what servers hold; float32 for float64, which no server
        computes in.
        """
        own = self.cast_to or self.tensors["lm_head.weight"].dtype
        return torch.float32 if own == torch.float64 else own

    @property
    def target_ids(self) -> Tensor:
        """int64 [VD]: the target id of each row of the head."""
        d2t = self.tensors.get("d2t")
        return torch.arange(self.config.vocab_size) if d2t is None else vocab.target_ids(d2t)


def read_weights(source: Path, version: int | None = None, draft: Path | None = None) -> Weights:
    """Read a draft from any of the three kinds of source.

    `draft` is the initial draft that a checkpoint needs.

    Raises ValueError where `source` is none of them, or is damaged.
    """
    source = Path(source)
    if (source / CURRENT).exists() or (version is not None and versions(source)):
        return _read_version(source, version)
    if version is not None:
        raise ValueError(
            f"--version {version}: {source} is no weights directory; expected one with {CURRENT}"
            " or v*"
        )
    if (source / "state.safetensors").exists() or steps(source):
        return _read_checkpoint(source, draft)
    if (source / "manifest.json").exists():
        return _read_version(source.parent, int(source.name.removeprefix("v")))
    if (source / "config.json").exists():
        return _read_draft(source, {"source": "draft"})
    raise ValueError(
        f"{source} is neither a weights directory ({CURRENT}), nor a checkpoint (step-*), nor a"
        " draft (config.json); expected one of them"
    )


def prune(weights: Weights, ids: Tensor) -> Weights:
    """The same draft with the head rows of the target tokens `ids` (int64, any order) only.

    Raises ValueError for ids that the draft does not have.
    """
    # ascending
    ids = ids.unique()
    own = weights.target_ids
    rows = torch.full((weights.config.vocab_size,), -1).index_put_((own,), torch.arange(len(own)))
    outside = ids[(ids < 0) | (ids >= len(rows))]
    absent = outside if len(outside) else ids[rows[ids] < 0]
    if len(absent) or not len(ids):
        raise ValueError(
            f"token ids {absent[:5].tolist()}{' and more' if len(absent) > 5 else ''} are not in"
            f" the draft's vocabulary of {len(own)} of {weights.config.vocab_size}; expected some"
            " that are: pruning only removes"
        )
    head = weights.tensors["lm_head.weight"][rows[ids]]
    d2t = ids - torch.arange(len(ids))
    tensors = weights.tensors | {
        "lm_head.weight": head,
        "d2t": d2t,
        "t2d": vocab.mask(d2t, len(rows)),
    }
    return replace(
        weights, config=replace(weights.config, draft_vocab_size=len(ids)), tensors=tensors
    )


def most_frequent(
    weights: Weights, counts: Tensor, size: int, keep: tuple[int, ...] = ()
) -> Tensor:
    """The `size` most frequent target ids of those that the draft has, `keep` among them. counts
    [V].
    """
    if counts.shape != (weights.config.vocab_size,):
        raise ValueError(
            f"counts of {len(counts)} tokens, the draft's target has {weights.config.vocab_size}"
        )
    own = weights.target_ids
    if size > len(own):
        raise ValueError(
            f"--draft-vocab {size}: the draft has {len(own)} tokens, and pruning only removes"
        )
    counted = torch.full_like(counts, -1, dtype=torch.float64)
    counted[own] = counts[own].double()
    kept = tuple(i for i in keep if counted[i] >= 0)
    return vocab.target_ids(vocab.most_frequent(counted, size, kept))


def write_draft(weights: Weights, out: Path, dtype: str = "same", force: bool = False) -> None:
    """Write config.json and model.safetensors to `out`, whole or not at all.

    dtype: of floating tensors, "same" or one of NAMES. Raises ValueError where `out` is there
        already, unless `force`.
    """
    out = Path(out).absolute()
    if dtype != "same" and dtype not in NAMES:
        raise ValueError(f"--dtype {dtype}: expected same or one of {', '.join(NAMES)}")
    if out.exists() and not force and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{out} is there already; expected a new directory, or --force to replace it"
        )
    to = weights.dtype if dtype == "same" else NAMES[dtype]
    cast = dtype != "same" or weights.cast_to is not None

    def written(t: Tensor) -> Tensor:
        if cast and t.is_floating_point():
            return t.to(to)
        return t.float() if t.dtype == torch.float64 else t

    tensors = {
        _written(n, weights.config): written(t).contiguous() for n, t in weights.tensors.items()
    }
    files = {
        "config.json": (json.dumps(_config(weights, to), indent=2) + "\n").encode(),
        "model.safetensors": save(tensors, metadata={"format": "pt"}),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    name = f"{out.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    new = write_directory(out.parent, name, files)
    try:
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        elif out.exists():
            remove_directory(out)
        os.rename(new, out)
    except OSError:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _written(name: str, config: DraftConfig) -> str:
    return name.replace("layers.0.", "midlayer.", 1) if config.num_hidden_layers == 1 else name


def _config(weights: Weights, dtype: torch.dtype) -> dict[str, Any]:
    """SGLang's config, and what others read beside it; `aurora` says where the weights come
    from.
    """
    config = weights.config.to_json(str(dtype).removeprefix("torch."))
    # its name before transformers 5
    config["torch_dtype"] = config["dtype"]
    if weights.config.aux_layer_ids:
        # vLLM and speculators name the layers that the features ENTER, at the top
        config.setdefault(aux_layers.KEY, [i + 1 for i in weights.config.aux_layer_ids])
    config["norm_before_residual"] = False
    untrained = {UNTRAINED: True} if weights.untrained else {}
    return config | untrained | {"aurora": weights.origin}


def _read_draft(directory: Path, origin: dict[str, Any]) -> Weights:
    config, tensors = DraftConfig.read(directory), read_tensors(directory)
    if "lm_head.weight" not in tensors:
        raise ValueError(
            f"{directory} has no lm_head.weight in *.safetensors; expected an EAGLE3 draft with its"
            " head"
        )
    if "d2t" in tensors:
        vocab.check(tensors["d2t"], config.draft_vocab_size, config.vocab_size)
        tensors["t2d"] = vocab.mask(tensors["d2t"], config.vocab_size)
    said = json.loads((directory / "config.json").read_text())
    return Weights(config, tensors, origin, untrained=said.get(UNTRAINED) is True)


def _read_version(directory: Path, version: int | None) -> Weights:
    """Raises ValueError for a version that is not there, or is not what its manifest says."""
    version = current_version(directory) if version is None else version
    path = directory / version_name(version)
    if not path.is_dir():
        found = ", ".join(map(str, versions(directory))) or "none"
        raise ValueError(f"{directory} has no version {version}; there are: {found}")
    manifest: Manifest = read_manifest(path)
    for name, file in manifest.files.items():
        if sha256_file(path / name) != file.sha256:
            raise ValueError(
                f"{path / name} is not the file that its manifest describes; take another version"
            )
    origin = {"source": "published", "version": version, "target": manifest.target}
    return _read_draft(path, origin | {"optimizer_step": manifest.optimizer_step})


def _read_checkpoint(source: Path, draft: Path | None) -> Weights:
    if draft is None:
        raise ValueError(
            f"{source} is a checkpoint, which holds no config: give --draft, the run's initial"
            " draft"
        )
    path = (
        source
        if (source / "state.safetensors").exists()
        else source / f"step-{steps(source)[-1]:08d}"
    )
    tensors, state = read_checkpoint(path)
    initial = _read_draft(Path(draft), {})
    own = {n.removeprefix("draft/"): t for n, t in tensors.items() if n.startswith("draft/")}
    # what the draft's own are the rounding of, where it computes in less than float32
    masters = "optimizer/master."
    own |= {n.removeprefix(masters): t for n, t in tensors.items() if n.startswith(masters)}
    # what is published in their stead, where it was switched on
    own |= {n.removeprefix("average/"): t for n, t in tensors.items() if n.startswith("average/")}
    expected = {n: tuple(t.shape) for n, t in initial.tensors.items() if n not in MAPS}
    got = {n: tuple(t.shape) for n, t in own.items()}
    if any(got.get(n) != shape for n, shape in expected.items()):
        raise ValueError(
            f"{path} was not trained from {draft}: its tensors have other shapes; expected its own"
            " draft"
        )
    maps = {n: t for n, t in initial.tensors.items() if n in MAPS}
    origin = {"source": "checkpoint", "steps": state["steps"], "target": state["target"]}
    return Weights(initial.config, own | maps, origin, cast_to=initial.dtype)
