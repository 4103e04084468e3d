"""`aurora-trainer check` on a weights directory: what it tries of the file system."""

import errno
import os
import threading

import pytest

from aurora_sglang_plugin.weights import atomic_files
from aurora_sglang_plugin.weights.atomic_files import remove_temporaries
from aurora_trainer.tools.check import _publishes


def test_check_finds_a_file_system_that_lacks_what_versions_need(tmp_path, monkeypatch):
    _publishes(tmp_path)
    for name, number in (("rename", errno.ENOSYS), ("replace", errno.EPERM)):
        with monkeypatch.context() as patched:
            patched.setattr(atomic_files.os, name, lambda *how, n=number: refuse_to(n))
            with pytest.raises(ValueError, match="expected a file system that can"):
                _publishes(tmp_path)
    assert not list(tmp_path.iterdir())


def test_check_and_a_trainer_that_clears_leftovers_do_not_meet(tmp_path):
    over = threading.Event()

    def clear():
        while not over.is_set():
            remove_temporaries(tmp_path)

    trainer = threading.Thread(target=clear)
    trainer.start()
    try:
        for _ in range(100):
            _publishes(tmp_path)
    finally:
        over.set()
        trainer.join()
    assert not list(tmp_path.iterdir())


def refuse_to(number):
    raise OSError(number, os.strerror(number))
