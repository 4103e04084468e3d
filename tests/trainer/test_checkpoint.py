"""Resume checkpoints: whole or not at all, and a damaged one is passed over."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aurora_trainer.checkpoint import load_newest, save_checkpoint, steps


def content(i: int):
    generator = torch.Generator().manual_seed(i)
    tensors = {
        "master/fc.weight": torch.randn(3, 5, generator=generator),
        "draft/fc.weight": torch.randn(3, 5, generator=generator).bfloat16(),
        "rng/torch": generator.get_state(),
        "moment/empty": torch.zeros(0, 4),
    }
    return tensors, {
        "step": i,
        "schedule": {"warmup": 0.1 * i},
        "text": "é\u0000",
        "cursor": 2**60 + i,
    }


def assert_content(found, i):
    tensors, state = content(i)
    assert found.step == i and found.state == state and found.tensors.keys() == tensors.keys()
    for name, t in tensors.items():
        assert found.tensors[name].dtype == t.dtype and torch.equal(found.tensors[name], t)


def test_round_trip_to_the_bit_and_clean_up(tmp_path):
    assert load_newest(tmp_path / "new") is None
    for i in range(5):
        save_checkpoint(tmp_path, i, *content(i), keep=2)
    assert steps(tmp_path) == [3, 4]
    assert_content(load_newest(tmp_path), 4)
    assert load_newest(tmp_path).damaged == 0


def truncate(path):
    (path / "state.safetensors").write_bytes((path / "state.safetensors").read_bytes()[:-1])


def flip(path):
    data = bytearray((path / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "state.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip,
        lambda p: (p / "manifest.json").unlink(),
        lambda p: (p / "manifest.json").write_text("{}"),
        lambda p: (p / "manifest.json").write_text("[1"),
        lambda p: (p / "state.json").write_text("{}"),
        lambda p: (p / "state.json").unlink(),
    ],
)
def test_a_damaged_newest_falls_back(tmp_path, damage, caplog):
    for i in (1, 2):
        save_checkpoint(tmp_path, i, *content(i), keep=3)
    damage(tmp_path / "step-00000002")
    found = load_newest(tmp_path)
    assert_content(found, 1)
    assert found.damaged == 1 and "damaged" in caplog.text
    # training comes to that step again
    save_checkpoint(tmp_path, 2, *content(2), keep=3)
    assert_content(load_newest(tmp_path), 2)


def test_all_damaged_is_an_error_not_a_silent_start(tmp_path):
    save_checkpoint(tmp_path, 1, *content(1), keep=2)
    flip(tmp_path / "step-00000001")
    with pytest.raises(ValueError, match="none can be read"):
        load_newest(tmp_path)


# It forks, so it runs in a process of its own that has no threads yet.
KILLED_SAVER = """
import os, sys
sys.path[:0] = {path!r}
from pathlib import Path
from test_checkpoint import content, save_checkpoint

for i in range(1000):
    directory = Path({directory!r}) / str(i)
    directory.mkdir()
    for step in (1, 2):
        save_checkpoint(directory, step, *content(step), keep=2)
    pid = os.fork()
    if pid == 0:
        count = iter(range(1000))

        def kill_at(name):
            if next(count) == i:
                os.kill(os.getpid(), 9)

        save_checkpoint(directory, 3, *content(3), keep=2, on_step=kill_at)
        os._exit(0)
    if os.waitpid(pid, 0)[1] == 0:
        break
print(i + 1)
"""


def test_killed_at_any_step(tmp_path):
    code = KILLED_SAVER.format(path=[str(Path(__file__).parent)], directory=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = []
    for i in range(int(run.stdout)):
        newest = load_newest(tmp_path / str(i))
        assert newest.damaged == 0 and not list((tmp_path / str(i)).glob("*.tmp-*"))
        assert_content(newest, newest.step)
        found.append(newest.step)
    assert len(found) > 11 and set(found) == {2, 3} and found == sorted(found)
