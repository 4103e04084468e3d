"""What tests of the receiver start, on TCP and on a path.

Other files have a `link` of their own.
"""

import socket

import pytest

from aurora_sglang_plugin.config import LinkConfig
from aurora_sglang_plugin.link.receiver import ReceiveConfig, Receiver


@pytest.fixture(params=["tcp", "ipc"])
def link(request, tmp_path):
    if request.param == "ipc":
        return LinkConfig(endpoint=f"ipc://{tmp_path}/link", max_message_bytes=1 << 20)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    return LinkConfig(endpoint=endpoint, max_message_bytes=1 << 20)


@pytest.fixture
def started():
    """Everything in it is closed after the test."""
    started = []
    yield started
    for one in started:
        one.close()


@pytest.fixture
def receive(link, started, tmp_path):
    def start(config=None, **more):
        started.append(Receiver(link, config or ReceiveConfig(), tmp_path / "ledger.json", **more))
        return started[-1]

    return start
