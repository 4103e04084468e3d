"""Resume checkpoints: everything that training goes on from, written whole or not at all.

    DIRECTORY/step-00000123/state.safetensors    weights, fp32 masters, moments, random states,
                                                 whatever is a tensor
    DIRECTORY/step-00000123/state.json           schedule, counters, versions, cursor, whatever is
                                                 not
    DIRECTORY/step-00000123/manifest.json        size and sha256 of the two

`load_newest` takes the newest that checks, and counts the damaged ones that it passed over.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from aurora_sglang_plugin.config import Section
from aurora_sglang_plugin.weights.atomic_files import (
    Step,
    no_fault,
    remove_directory,
    remove_temporaries,
    write_directory,
)
from aurora_sglang_plugin.weights.tensor_bytes import safetensors_buffers, sha256

log = logging.getLogger(__name__)

FORMAT = 2


class CheckpointConfig(Section):
    """Where the trainer keeps what it resumes from."""

    # one for each target; also holds the receiver's ledger
    directory: Path = Path("aurora-checkpoints")
    # 0: not by time
    every_s: Annotated[float, Field(ge=0)] = 60.0
    # optimizer steps; 0: not by steps
    every_steps: Annotated[int, Field(ge=0)] = 0
    # checkpoints that stay on disk
    keep: Annotated[int, Field(ge=2)] = 3


class Checkpoint:
    """What `load_newest` found: tensors and values as they were saved, the step, and how many newer
    were damaged.
    """

    def __init__(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], damaged: int):
        self.step, self.tensors, self.state, self.damaged = step, tensors, state, damaged


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
    on_step: Step = no_fault,
) -> Path:
    """Write step-N and remove the oldest beyond `keep`. One of the same step is replaced.

    `state` must be JSON. Call it from the one trainer of `directory` only. Raises OSError if the
    disk refuses; what was there is there still.
    """
    directory = Path(directory)
    tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    parts = {
        "state.safetensors": safetensors_buffers(tensors),
        "state.json": [memoryview(json.dumps(state, sort_keys=True).encode())],
    }
    described = {
        n: {"nbytes": sum(p.nbytes for p in ps), "sha256": sha256(ps)} for n, ps in parts.items()
    }
    about = {"format": FORMAT, "step": step, "files": described}
    files = parts | {"manifest.json": json.dumps(about).encode()}
    name = f"step-{step:08d}"
    path = write_directory(directory, name, files, on_step)
    try:
        # what could not be removed before
        remove_temporaries(directory)
        for old in steps(directory)[:-keep]:
            remove_directory(directory / f"step-{old:08d}", on_step)
    except OSError as error:
        # the next checkpoint tries again
        log.warning("old checkpoints not removed error=%s", error)
    return path


def load_newest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None if there is none.

    Also removes what a killed writer left.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name in remove_temporaries(directory):
        log.warning("stale temporary removed name=%s", name)
    damaged = 0
    for step in reversed(steps(directory)):
        try:
            tensors, state = _read(directory / f"step-{step:08d}", step)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            damaged += 1
            log.error("checkpoint damaged, trying the one before step=%d error=%s", step, error)
            continue
        return Checkpoint(step, tensors, state, damaged)
    if damaged:
        raise ValueError(
            f"{directory} holds {damaged} checkpoints and none can be read; move them away to start"
            " from the initial draft, or restore one"
        )
    return None


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of one checkpoint, e.g. DIRECTORY/step-00000123.

    Raises ValueError if it is damaged.
    """
    try:
        return _read(Path(path), int(Path(path).name[5:]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}; take another one") from None


def steps(directory: Path) -> list[int]:
    """Steps of the checkpoints on disk, ascending, damaged ones included."""
    return sorted(int(p.name[5:]) for p in Path(directory).glob("step-*") if p.name[5:].isdigit())


def _read(path: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    manifest = json.loads((path / "manifest.json").read_text())
    if manifest["format"] != FORMAT or manifest["step"] != step:
        raise ValueError(
            f"format {manifest['format']}, step {manifest['step']}; expected {FORMAT}, {step}:"
            " another version of Aurora wrote it"
        )
    data = {}
    for name, file in manifest["files"].items():
        data[name] = (path / name).read_bytes()
        if (
            len(data[name]) != file["nbytes"]
            or hashlib.sha256(data[name]).hexdigest() != file["sha256"]
        ):
            raise ValueError(f"{name} is not the file that the manifest describes")
    return load(data["state.safetensors"]), json.loads(data["state.json"])


def check_replay(found: Checkpoint, path: Path, cursor: int, buffer: dict[str, Any]) -> None:
    """Whether a recording led to where the checkpoint was taken.

    Raises ValueError where the buffer does not stand as it stood: it is another one.
    """
    state = found.state
    if state["cursor"] != cursor or state["buffer"] != json.loads(json.dumps(buffer)):
        raise ValueError(
            f"recording {path} does not lead to the checkpoint of step {found.step} (message"
            f" {cursor}, the checkpoint was at {state['cursor']}); expected the same recording and"
            " settings as before"
        )
    log.info("resumed step=%d cursor=%d damaged=%d", found.step, cursor, found.damaged)
