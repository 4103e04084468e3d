"""A directory as another machine would see it that mounts it by NFS: names and attributes come from
the kernel's cache for a minute, opening a file asks the server, directories cannot be synced.
Unlike NFS it keeps a file's length in that cache too, when the file is opened.

    python fuse_loopback.py DIRECTORY MOUNT_POINT

Needs /dev/fuse, libfuse and mfusepy, and the right to mount.
"""

import errno
import os
import sys
from pathlib import Path

import mfusepy as fuse

CACHE_S = 60.0
NAMES = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_ino")
TIMES = ("st_atime", "st_mtime", "st_ctime")


class Loopback(fuse.Operations):
    use_ns = True

    def __init__(self, root: str):
        self.root = root

    def _at(self, path: str) -> str:
        return self.root + path

    def getattr(self, path, fh=None):
        stat = os.lstat(self._at(path)) if fh is None else os.fstat(fh)
        return {name: getattr(stat, name) for name in NAMES} | {
            name: getattr(stat, f"{name}_ns") for name in TIMES
        }

    def readdir(self, path, fh):
        return [".", "..", *os.listdir(self._at(path))]

    def open(self, path, flags):
        # the kernel knows where to append
        return os.open(self._at(path), flags & ~os.O_APPEND)

    def create(self, path, mode, fi=None):
        return os.open(self._at(path), os.O_RDWR | os.O_CREAT, mode)

    def read(self, path, size, offset, fh):
        return os.pread(fh, size, offset)

    def write(self, path, data, offset, fh):
        return os.pwrite(fh, data, offset)

    def truncate(self, path, length, fh=None):
        os.truncate(self._at(path), length)

    def release(self, path, fh):
        os.close(fh)

    def flush(self, path, fh):
        pass

    def fsync(self, path, datasync, fh):
        os.fsync(fh)

    def fsyncdir(self, path, datasync, fh):
        raise fuse.FuseOSError(errno.EINVAL)

    def mkdir(self, path, mode):
        os.mkdir(self._at(path), mode)

    def rmdir(self, path):
        os.rmdir(self._at(path))

    def unlink(self, path):
        os.unlink(self._at(path))

    def rename(self, old, new, flags=0):
        os.rename(self._at(old), self._at(new))

    def chmod(self, path, mode):
        os.chmod(self._at(path), mode)

    def utimens(self, path, times=None):
        os.utime(self._at(path), ns=times)


if __name__ == "__main__":
    cached = dict(attr_timeout=CACHE_S, entry_timeout=CACHE_S, negative_timeout=CACHE_S)
    fuse.FUSE(
        Loopback(str(Path(sys.argv[1]).absolute())), sys.argv[2],
        foreground=True, nothreads=True, use_ino=True, **cached,
    )  # fmt: skip
