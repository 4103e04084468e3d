"""TensorBoard is off unless asked for, and asked for without its package it says so."""

import importlib.util

import pytest

from aurora_trainer.metrics import Metrics, MetricsConfig
from aurora_trainer.tensorboard import TensorBoard, scalars

STATUS = {
    "time_unix_s": 1.0, "pid": 2, "steps": 7, "loss": 0.5, "accept_length_served": None,
    "published": {"published": 3},
    "buffer": {"bytes": 10, "deeper": {"x": 1}}, "ledger": {"session": {"sent": 1}}, "name": "text",
}  # fmt: skip
INSTALLED = importlib.util.find_spec("tensorboard") is not None


def test_what_is_a_number():
    assert dict(scalars(STATUS)) == {
        "steps": 7, "loss": 0.5, "published/published": 3, "buffer/bytes": 10, "buffer/deeper/x": 1
    }  # fmt: skip


def test_off_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Metrics(MetricsConfig()).report(STATUS, ("steps",))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(INSTALLED, reason="tensorboard is installed")
def test_without_its_package_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="pip install tensorboard"):
        Metrics(MetricsConfig(tensorboard=tmp_path))


@pytest.mark.skipif(not INSTALLED, reason="tensorboard is not installed")
def test_events_are_read_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(MetricsConfig(tensorboard=tmp_path))
    metrics.report(STATUS, ("steps",))
    metrics.report(STATUS | {"steps": 9, "loss": 0.25}, ("steps",))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(7, 0.5), (9, 0.25)]
    assert set(events.Tags()["scalars"]) == {name for name, _ in scalars(STATUS)}


def test_a_full_disk_does_not_end_training(monkeypatch, caplog):
    board = object.__new__(TensorBoard)
    board._writer = None
    monkeypatch.setattr(
        "aurora_trainer.tensorboard.scalars", lambda status: (_ for _ in ()).throw(OSError("full"))
    )
    board.write({"steps": 1})
    assert "tensorboard not written" in caplog.text
