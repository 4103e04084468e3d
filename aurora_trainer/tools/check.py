"""`aurora-trainer check`: what a server and a trainer with this configuration would stumble over,
before either starts.

Each check prints one line: what, and either what was found or what is wrong and how to put it
right.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import typer

from aurora_sglang_plugin.config import ENV_CONFIG, LinkConfig
from aurora_sglang_plugin.drafts.kinds import check_draft, draft_problems, first_config
from aurora_sglang_plugin.endpoint import is_local
from aurora_sglang_plugin.link.keys import check_pair, load_server_keys, load_trainer_keys
from aurora_sglang_plugin.link.receiver import ReceiveConfig, Receiver
from aurora_sglang_plugin.weights.atomic_files import discard, replace_file, write_directory
from aurora_sglang_plugin.weights.manifest import current_version, target_fingerprint
from aurora_trainer.checkpoint import steps
from aurora_trainer.config import TrainerFile
from aurora_trainer.drafts.kinds import explain, load
from aurora_trainer.drafts.target import TargetTensors, open_target

PLUGIN_GROUP, PLUGIN_NAME = "sglang.srt.plugins", "aurora"


def check_all(config: TrainerFile) -> bool:
    """Run every check, print each result, and return whether all passed."""
    model = config.trainer.model
    checks: list[tuple[str, Callable[[], str]]] = [
        ("target", lambda: _target(model.target)),
        ("draft", lambda: _draft(model.target, model.draft)),
        ("keys", lambda: _keys(config.link)),
        ("endpoint", lambda: _endpoint(config.link)),
        ("weights directory", lambda: _weights(config.weights.directory)),
        ("checkpoint directory", lambda: _checkpoints(config.trainer.checkpoint.directory)),
        ("sglang", _sglang),
        ("plugin", _plugin),
    ]
    typer.echo(
        "ok      configuration: known settings only, values in range, for the server and the"
        " trainer"
    )
    passed = True
    for name, run in checks:
        try:
            typer.echo(f"ok      {name}: {run()}")
        except Exception as error:
            # whatever it is, it belongs in the list, and the other checks still run
            text = str(error) if isinstance(error, ValueError | OSError) else repr(error)
            typer.echo(f"FAILED  {name}: {text}")
            passed = False
    if not os.environ.get(ENV_CONFIG):
        typer.echo(f"note    {ENV_CONFIG} is not set here; the server finds its file through it")
    return passed


def _target(model: str) -> str:
    target = open_target(model)
    shape = target.embedding().shape
    return f"{target.directory}, embedding {list(shape)}, fingerprint {target_fingerprint(model)}"


def _draft(model: str, directory: Path | None) -> str:
    target = open_target(model)
    if directory is None:
        config = first_config(target.config)
        return (
            f"none: the trainer makes one of {config.draft_vocab_size} tokens of"
            f" {config.vocab_size}; start servers without --speculative-draft-model-path"
        )
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is not a directory; expected the draft that the server starts with. "
            f"`aurora-trainer init-draft {model} {directory}` makes an untrained one"
        )
    explained = explain(directory, target)
    if explained.problems:
        raise ValueError(explained.text())
    wrong = draft_problems(directory, target.config)
    if wrong and explained.conversions:
        raise ValueError(
            f"{directory} is not in the form that a server loads"
            f" ({'; '.join(explained.conversions)}); `aurora-trainer import {directory}"
            f" NEW_DIRECTORY --target {model}` writes it"
        )
    notes = check_draft(directory, target.config)
    draft = load(directory, TargetTensors(target))
    size = sum(p.numel() for p in draft.parameters())
    fits = (
        f"{directory} fits the target, {size} parameters, vocabulary"
        f" {draft.config.draft_vocab_size}"
    )
    return "; ".join([fits, *notes])


def _keys(link: LinkConfig) -> str:
    if link.trainer_keys is None or link.server_keys is None:
        here = is_local(link.endpoint) and is_local(link.bound)
        return (
            "none, the link stays on this machine"
            if here
            else "none: PLAINTEXT BEYOND LOOPBACK, as is set"
        )
    found = []
    trainer = load_trainer_keys(link.trainer_keys) if link.trainer_keys.is_dir() else None
    if trainer is not None:
        found.append(f"the trainer lets in {', '.join(sorted(trainer.servers.values()))}")
    server = load_server_keys(link.server_keys) if link.server_keys.is_dir() else None
    if server is not None:
        found.append(f"the server's public key is {server.public.decode()}")
    if trainer is not None and server is not None:
        check_pair(trainer, server)
        found.append("they fit")
    if not found:
        raise ValueError(
            f"neither {link.trainer_keys} nor {link.server_keys} is here; expected what keygen"
            " wrote"
        )
    return "; ".join(found)


def _endpoint(link: LinkConfig) -> str:
    if link.trainer_keys is not None and not link.trainer_keys.is_dir():
        return (
            f"{link.endpoint} is not bound here: link.trainer_keys {link.trainer_keys} is on"
            " another machine"
        )
    Receiver(link, ReceiveConfig(), ledger_path=None).close()
    return f"{link.bound} can be bound"


def _weights(directory: Path) -> str:
    _writable(directory)
    _publishes(directory)
    version = current_version(directory)
    return (
        f"{directory.absolute()} is writable, current version"
        f" {'none yet' if version is None else version}"
    )


def _checkpoints(directory: Path) -> str:
    _writable(directory)
    found = steps(directory)
    return (
        f"{directory.absolute()} is writable, newest checkpoint"
        f" {f'step {found[-1]}' if found else 'none yet'}"
    )


def _writable(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


def _publishes(directory: Path) -> None:
    """What versions need of a file system, beyond a disk's: a mounted object store often lacks it.

    Raises ValueError.
    """
    # A trainer that runs removes what has a temporary name beside its versions: not what is below.
    own = Path(tempfile.mkdtemp(prefix="check-", dir=directory))
    try:
        path = write_directory(own, "version", {"file": b"one"})
        replace_file(path / "file", b"two")
        with open(path / "file", "ab", buffering=0) as file:
            file.write(b"three")
        found = (path / "file").read_bytes()
    except OSError as error:
        found = str(error).encode()
    finally:
        discard(own)
    if found != b"twothree":
        raise ValueError(
            f"{directory}: a directory was made and renamed, a file in it replaced by rename and"
            f" appended to, and what came of it is {found.decode(errors='replace')!r}; expected a"
            " file system that can (docs/deploy/README.md)"
        )


def _sglang() -> str:
    try:
        version = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        raise ValueError(
            "not installed in this environment; run the check with the server's Python too"
        ) from None
    return f"version {version} (the server itself refuses a version that it was not written for)"


def _plugin() -> str:
    points = metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN_NAME)
    if not points:
        raise ValueError(
            f"no entry point {PLUGIN_NAME} in {PLUGIN_GROUP}; install this project with pip in the"
            " server's environment"
        )
    return f"entry point {next(iter(points)).value}"
