"""Files that survive a kill at any instant: a directory appears whole under its name, or not at
all.

Readers see the old name or the new one. What could not be written whole is removed again, so that a
full disk does not fill up further. `step` is called with a name before every system call that
changes the disk; the tests end the process there.

A network file system lacks some of it: what it cannot do (sync a directory, lock) is left out, what
fails is an error as on any disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

# what a file system answers that has no such operation
LACKS = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
Step = Callable[[str], None]
# A file's content, as one object or as parts that follow each other.
Content = bytes | Sequence[bytes | memoryview]


def no_fault(name: str) -> None:
    """The default `step`: nothing happens between two system calls."""


def write_directory(
    parent: Path,
    name: str,
    files: Mapping[str, Content],
    step: Step = no_fault,
    *,
    replace: bool = True,
) -> Path:
    """Write parent/name/{files}: under a temporary name first, every file and directory synced,
    then renamed.

    A directory of that name is replaced, or with `replace` false an error. Raises OSError, and
    leaves what was there.
    """
    path, temporary = parent / name, parent / _temporary(name)
    try:
        step("mkdir")
        temporary.mkdir()
        for file_name, data in files.items():
            _write_file(temporary / file_name, data, step)
        _sync_directory(temporary, step)
        if replace and path.exists():
            remove_directory(path, step)
        step("rename")
        os.rename(temporary, path)
    except BaseException:
        discard(temporary)
        raise
    _sync_directory(parent, step)
    return path


def replace_file(path: Path, data: bytes, step: Step = no_fault) -> None:
    """Replace a file by rename, so that a reader finds the old content or the new.

    Raises OSError.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        _write_file(temporary, data, step)
        step("replace")
        os.replace(temporary, path)
    except BaseException:
        discard(temporary)
        raise
    _sync_directory(path.parent, step)


def discard(path: Path) -> None:
    """Remove what nobody needs, as far as the disk lets."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def remove_temporaries(directory: Path) -> list[str]:
    """Remove what dead writers left, as far as the disk lets: on NFS what a reader of this machine
    has open stays until it is closed. Only for the one writer of `directory`.

    Returns the names removed.
    """
    names = sorted(p.name for p in directory.glob("*.tmp-*"))
    for name in names:
        discard(directory / name)
    return [name for name in names if not os.path.lexists(directory / name)]


def remove_directory(path: Path, step: Step = no_fault) -> None:
    """Remove a directory or file; a half-removed directory has a temporary name, so that nobody
    takes it for whole.
    """
    if path.is_dir() and ".tmp-" not in path.name:
        tombstone = path.with_name(_temporary(path.name))
        step("rename tombstone")
        os.rename(path, tombstone)
        path = tombstone
    step("remove")
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def lock(descriptor: int) -> None:
    """Hold an open file, or directory, against other processes of this machine.

    What another machine holds is refused by some file systems and not by others, and some have no
    locks. Raises BlockingIOError where another process holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        # NFS locks no directory
        if error.errno not in LACKS | {errno.EBADF}:
            raise
        log.warning("no locks on this file system, going on without error=%s", error)


def _temporary(name: str) -> str:
    return f"{name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _write_file(path: Path, content: Content, step: Step) -> None:
    step(f"open {path.name}")
    if isinstance(content, bytes):
        # in two parts, so that a test can end the process in the middle of a file
        content = [content[: len(content) // 2], content[len(content) // 2 :]]
    with open(path, "wb") as file:
        for number, part in enumerate(content):
            file.write(part)
            if number == 0:
                file.flush()
                step(f"write {path.name}")
        file.flush()
        step(f"fsync {path.name}")
        os.fsync(file.fileno())


def _sync_directory(path: Path, step: Step) -> None:
    step(f"fsync {path.name}")
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in LACKS:
            raise
    finally:
        os.close(descriptor)
