"""Resume checkpoints: whole or not at all, and a damaged one is passed over."""

import os

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
    return tensors, {"step": i, "schedule": {"warmup": 0.1 * i}, "text": "é\u0000", "cursor": 2**60 + i}


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
    save_checkpoint(tmp_path, 2, *content(2), keep=3)  # training comes to that step again
    assert_content(load_newest(tmp_path), 2)


def test_all_damaged_is_an_error_not_a_silent_start(tmp_path):
    save_checkpoint(tmp_path, 1, *content(1), keep=2)
    flip(tmp_path / "step-00000001")
    with pytest.raises(ValueError, match="none can be read"):
        load_newest(tmp_path)


def test_killed_at_any_step(tmp_path):
    found = []
    for i in range(1000):
        directory = tmp_path / str(i)
        directory.mkdir()
        for step in (1, 2):
            save_checkpoint(directory, step, *content(step), keep=2)
        pid = os.fork()
        if pid == 0:
            count = iter(range(1000))

            def kill_at(name, count=count, i=i):
                if next(count) == i:
                    os.kill(os.getpid(), 9)

            save_checkpoint(directory, 3, *content(3), keep=2, on_step=kill_at)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        newest = load_newest(directory)
        assert newest.damaged == 0 and not list(directory.glob("*.tmp-*"))
        assert_content(newest, newest.step)
        found.append(newest.step)
        if status == 0:
            break
    assert i > 10 and set(found) == {2, 3} and found == sorted(found)
