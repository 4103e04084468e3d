"""Endpoints of the link: which ones stay on this machine, and whether an ipc path is safe from
other users.

Imports nothing heavy: the configuration is checked with it. An endpoint is tcp://HOST:PORT or
ipc://PATH.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import stat
from pathlib import Path

log = logging.getLogger(__name__)

EXPECTED = "expected ipc:///PATH or tcp://HOST:PORT"
# Strict, because libzmq takes more: "tcp://127.0.0.1:0;10.0.0.7:5590" looks like loopback and
# connects elsewhere.
_TCP = re.compile(r"tcp://(\*|\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[A-Za-z0-9_.-]+):([0-9]{1,5})")
_WILDCARDS = ("*", "0.0.0.0", "[::]")


def check_endpoint(setting: str, endpoint: str, *, wildcard: bool) -> str:
    """`endpoint` itself.

    Raises ValueError if it means nothing, or is a wildcard and may not be one.
    """
    if endpoint.startswith("ipc://") and endpoint not in ("ipc://", "ipc://*", "ipc://@"):
        return endpoint
    match = _TCP.fullmatch(endpoint)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ValueError(f"{setting} {endpoint!r} is no endpoint; {EXPECTED}, PORT a number")
    if match[1] in _WILDCARDS and not wildcard:
        raise ValueError(
            f"{setting} {endpoint!r} is a wildcard, and servers connect to it; expected the"
            " trainer's address there, and the wildcard in link.bind"
        )
    return endpoint


def is_local(endpoint: str) -> bool:
    """Whether nothing that is sent to a checked endpoint leaves this machine."""
    match = _TCP.fullmatch(endpoint)
    if match is None:
        return endpoint.startswith("ipc://")
    try:
        return match[1] == "localhost" or ipaddress.ip_address(match[1].strip("[]")).is_loopback
    except ValueError:
        # a name
        return False


def check_ipc_directory(endpoint: str, *, keys: bool) -> None:
    """Refuse an ipc path that every user can take away, warn if every user could take it first.

    Raises ValueError. A directory that does not exist is left to whoever binds.
    """
    path = endpoint.removeprefix("ipc://")
    if path == endpoint:
        return
    if path.startswith("@"):
        if not keys:
            log.warning(
                "aurora link: every user of this machine can take or join the abstract name %s",
                endpoint,
            )
        return
    parent = Path(path).absolute().parent.resolve()
    if not parent.is_dir():
        return
    for directory in (parent, *parent.parents):
        mode = os.stat(directory).st_mode
        if not mode & stat.S_IWOTH:
            continue
        if not mode & stat.S_ISVTX:
            raise ValueError(
                f"{endpoint!r}: every user can replace what is in {directory} (mode"
                f" {stat.S_IMODE(mode):04o}), the link's socket too; expected a directory of your"
                f" own: mkdir -m 700 DIRECTORY, or chmod o-w {directory}"
            )
        if directory == parent and not keys:
            log.warning(
                "aurora link: every user can take %s while no trainer is bound there, and would be"
                " sent prompts; better: a directory of mode 0700, or keys (aurora-trainer keygen)",
                endpoint,
            )
