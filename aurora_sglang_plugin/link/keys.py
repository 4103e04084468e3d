"""The link's CURVE keys: one directory of small text files for each side, as `aurora-trainer
keygen` writes them.

    link.trainer_keys               link.server_keys, one for each server
        trainer.secret                  server.secret
        trainer.public                  trainer.public
        servers/NAME.public             server.public

`servers/` is the allow-list. A file holds one Z85 key of 40 characters, beside lines that begin
with "# ". Secrets are in no setting, no log line and no error; a secret that others can read, or a
list that others can write, is refused.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

TRAINER, SERVER, SERVERS = "trainer", "server", "servers"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_Z85 = frozenset(z85.Z85CHARS)
_MAX_FILE_BYTES = 4096


@dataclass(frozen=True)
class TrainerKeys:
    """The trainer's own secret, and the servers that may connect: {public key: name}.

    Keys are Z85 bytes [40].
    """

    secret: bytes = field(repr=False)
    servers: dict[bytes, str]


@dataclass(frozen=True)
class ServerKeys:
    """A server's own pair, and the one trainer that it speaks to. Z85 bytes [40]."""

    secret: bytes = field(repr=False)
    public: bytes
    trainer: bytes

    def encrypt(self, socket: zmq.Socket) -> None:
        """Before it connects: nothing is sent to a peer that does not have the trainer's secret."""
        socket.curve_serverkey = self.trainer
        socket.curve_publickey, socket.curve_secretkey = self.public, self.secret


def load_trainer_keys(directory: Path) -> TrainerKeys:
    """Raises ValueError if a key is missing, damaged, or not private enough."""
    _check_directory(directory, "link.trainer_keys")
    _check_directory(directory / SERVERS, "the allow-list")
    servers = {
        _read(path, secret=False): path.stem
        for path in sorted((directory / SERVERS).glob("*.public"))
    }
    if not servers:
        raise ValueError(
            f"{directory / SERVERS} holds no *.public: no server may connect; expected one file for"
            f" each server, as `aurora-trainer keygen {directory.parent} --server NAME` writes it"
        )
    return TrainerKeys(_read(directory / f"{TRAINER}.secret", secret=True), servers)


def load_server_keys(directory: Path) -> ServerKeys:
    """Raises ValueError if a key is missing, damaged, or not private enough."""
    _check_directory(directory, "link.server_keys")
    secret = _read(directory / f"{SERVER}.secret", secret=True)
    return ServerKeys(
        secret, zmq.curve_public(secret), _read(directory / f"{TRAINER}.public", secret=False)
    )


def check_pair(trainer: TrainerKeys, server: ServerKeys) -> None:
    """Raises ValueError if these two would not speak to each other."""
    if zmq.curve_public(trainer.secret) != server.trainer:
        raise ValueError(
            "the server's trainer.public is not the public key of this trainer; expected a copy of"
            " trainer.public from link.trainer_keys in link.server_keys"
        )
    if server.public not in trainer.servers:
        raise ValueError(
            f"the trainer does not list the server's key {server.public.decode()}; expected a copy"
            " of its server.public in servers/ of link.trainer_keys"
        )


def make_keys(directory: Path, servers: Sequence[str]) -> bool:
    """Make the trainer's pair, unless it is there, and a pair for each named server.

    True if the trainer's is new.

    Directories get mode 0700, files 0600; nothing is ever overwritten. Raises ValueError, before
    anything is written, for a name that is taken or no name; OSError.
    """
    trainer = directory / TRAINER
    for name in servers:
        if not _NAME.fullmatch(name) or name == TRAINER:
            raise ValueError(
                f"--server {name!r}: expected letters, digits, '.', '_', '-', and not {TRAINER!r}"
            )
        for taken in (directory / name, trainer / SERVERS / f"{name}.public"):
            if os.path.lexists(taken):
                raise ValueError(
                    f"{taken} exists, and keys are never overwritten; expected another --server"
                    f" NAME, or remove {directory / name} and {trainer / SERVERS / name}.public"
                    " first"
                )
    if len(set(servers)) != len(servers):
        raise ValueError("--server: a name twice; expected each server once")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_directory(directory, "the directory of the keys")
    new = not os.path.lexists(trainer)
    if new:
        trainer.mkdir(mode=0o700)
        (trainer / SERVERS).mkdir(mode=0o700)
        _write_pair(trainer, TRAINER)
    public = _read(trainer / f"{TRAINER}.public", secret=False)
    for name in servers:
        (directory / name).mkdir(mode=0o700)
        own = _write_pair(directory / name, SERVER)
        _write(directory / name / f"{TRAINER}.public", public, "public key of the trainer")
        _write(trainer / SERVERS / f"{name}.public", own, f"public key of the server {name}")
    return new


def _write_pair(directory: Path, role: str) -> bytes:
    public, secret = zmq.curve_keypair()
    _write(
        directory / f"{role}.secret", secret, f"SECRET key of the {role}: for this user's eyes only"
    )
    _write(directory / f"{role}.public", public, f"public key of the {role}")
    return public


def _write(path: Path, key: bytes, what: str) -> None:
    descriptor = os.open(
        path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    with os.fdopen(descriptor, "wb") as file:
        file.write(b"# Aurora, %s\n%s\n" % (what.encode(), key))
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, *, secret: bool) -> bytes:
    try:
        # a pipe must not hold a start up
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError(
            f"key {path}: {error.strerror}; expected a file of `aurora-trainer keygen`"
        ) from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"key {path} is not a regular file")
        _check_private(path, status, 0o077 if secret else 0o022)
        lines = file.read(_MAX_FILE_BYTES).splitlines()
    keys = [line.strip() for line in lines if line.strip() and not line.startswith(b"# ")]
    if len(keys) != 1 or len(keys[0]) != 40 or not _Z85.issuperset(keys[0]):
        # What was read is not shown: it may be most of a secret.
        raise ValueError(
            f"key {path} is damaged; expected one line of 40 Z85 characters, as keygen wrote it"
        )
    return keys[0]


def _check_directory(directory: Path, what: str) -> None:
    try:
        status = os.stat(directory)
    except OSError as error:
        raise ValueError(
            f"{what} {directory}: {error.strerror}; expected a directory that `aurora-trainer"
            " keygen` wrote"
        ) from None
    if not stat.S_ISDIR(status.st_mode):
        raise ValueError(
            f"{what} {directory} is not a directory; expected one that `aurora-trainer keygen`"
            " wrote"
        )
    _check_private(directory, status, 0o022)


def _check_private(path: Path, status: os.stat_result, forbidden: int) -> None:
    """Who can read a secret is the server; who can write a list decides who is let in."""
    if status.st_mode & forbidden:
        deed = "read" if forbidden & 0o044 else "changed"
        mode = 0o700 if stat.S_ISDIR(status.st_mode) else 0o600
        raise ValueError(
            f"{path} can be {deed} by other users (mode {stat.S_IMODE(status.st_mode):04o});"
            f" expected chmod {mode:o} {path}, and new keys if others were on this machine"
        )
    if status.st_uid not in (0, os.geteuid()):
        raise ValueError(
            f"{path} belongs to user {status.st_uid}, this process runs as {os.geteuid()}; expected"
            f" chown {os.geteuid()} {path}"
        )
