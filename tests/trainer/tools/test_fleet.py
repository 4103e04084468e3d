"""What many servers cost together, against real publishers, a real receiver and a real watcher."""

import builtins
import math

import numpy as np
import pytest
from deadline import until
from published import FIELDS, tensors

from aurora_sglang_plugin.config import LinkConfig, PublishConfig
from aurora_sglang_plugin.link import publisher as publishing
from aurora_sglang_plugin.link.ledger import MAX_SESSIONS
from aurora_sglang_plugin.link.receiver import RECEIVE_QUEUE_MESSAGES, ReceiveConfig, Receiver
from aurora_sglang_plugin.weights.reader import Expected
from aurora_sglang_plugin.weights.watcher import Watcher
from aurora_sglang_plugin.weights.writer import WeightsWriter
from aurora_trainer.config import TrainerFile
from aurora_trainer.tools import fleet, sizes

SETTINGS = TrainerFile.model_validate(
    {
        "trainer": {"model": {"target": "t"}, "publish": {"every_s": 600}},
        "plugin": {"swap": {"poll_s": 2}, "canary": {"share": 0.1}},
    }
)


def test_figures_follow_servers_and_settings():
    found = fleet.fleet(SETTINGS, sizes.Load(servers=1250, tp=8), 1e6, 2 << 30)
    assert found["gpus"] == 10_000 and found["trainers_at_least"] == 1
    assert found["files_opened_per_s"] == 2 * 10_000 / 2
    assert found["read_bytes_per_version"] == 1250 * (2 << 30)
    assert found["read_bytes_at_once"] == pytest.approx(125 * (2 << 30))
    assert found["read_bytes_per_s"] == pytest.approx(1250 * (2 << 30) / 600)
    many = fleet.fleet(SETTINGS, sizes.Load(servers=10_000), 1e6, 1)
    assert many["trainers_at_least"] == math.ceil(10_000 / (MAX_SESSIONS / 2)) == 3


def test_a_poll_opens_so_many_files(tmp_path, monkeypatch):
    writing = WeightsWriter(tmp_path)
    writing.publish(tensors(1.0), {}, **FIELDS)
    (tmp_path / "REJECTED").touch()
    shapes = {"fc.weight": (4, 6), "norm.weight": (4,), "d2t": (5,)}
    expected = Expected(FIELDS["target"], shapes, target_vocab=10, config={})
    watcher = Watcher(tmp_path, 1.0, expected, lambda weights: True)
    watcher.poll()
    true, opened = builtins.open, []

    def counted(path, *how, **more):
        opened.append(path)
        return true(path, *how, **more)

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "open", counted)
        for _ in range(5):
            watcher.poll()
    assert watcher.seen_version == 1 and len(opened) == 5 * fleet.FILES_PER_POLL
    writing.close()


class Row:
    """A message of a megabyte."""

    nbytes = 1 << 20

    def unload(self):
        pass

    def build(self):
        none = np.zeros(1, np.int32)
        arrays = {n: ("int32", none) for n in ("positions", "extend_lens", "feature_lens")}
        arrays |= {"prompt_lens": ("int32", none), "input_ids": ("int32", none[:0])}
        features = np.zeros((1, 1 << 18), np.float32)
        arrays["extend_lens"] = arrays["feature_lens"] = "int32", none + 1
        arrays["input_ids"] = "int32", none
        return arrays | {
            "next_tokens": ("int32", none),
            "aux_hidden_states": ("float32", features),
        }


def test_a_trainer_that_does_not_keep_up_holds_so_many_messages_of_each_server(tmp_path):
    """Its sockets are bounded, and the rest stays in the servers' queues, which drop the oldest."""
    servers, offered = 4, 30
    link = LinkConfig(endpoint=f"ipc://{tmp_path}/link")
    receiver = Receiver(link, ReceiveConfig(queue_bytes=1), None)
    config = PublishConfig(heartbeat_s=0.1)
    publishers = [publishing.Publisher(link, config, "t") for _ in range(servers)]
    try:
        for _ in range(offered):
            for one in publishers:
                one.offer("prefill", Row(), requests=["r"])
        until(lambda: all(one._send_queue.blocked_s > 0.3 for one in publishers), 30.0)
        sent = [one.counters()["sent"] for one in publishers]
        (taken,) = {receiver.ledger()["queued_bytes"] >> 20}
        assert 1 <= taken <= 2
        # on this side of the kernel's buffer, on the other one, and what the kernel holds of it
        most = RECEIVE_QUEUE_MESSAGES + publishing.SEND_QUEUE_MESSAGES + 2
        assert max(sent) <= most + taken and offered > 2 * most, sent
    finally:
        for one in publishers:
            one.close(timeout_s=0.0)
        receiver.close()
