"""A link with keys, a legitimate server's traffic on it, and handshakes that end soon."""

import pytest
from strangers import Traffic, keyed_link

from aurora_sglang_plugin.link import handshakes


@pytest.fixture(autouse=True)
def quick_handshakes(monkeypatch):
    monkeypatch.setattr(handshakes, "HANDSHAKE_S", 0.5)


@pytest.fixture
def link(tmp_path):
    return keyed_link(tmp_path)


@pytest.fixture
def traffic(link):
    traffic = Traffic(link)
    yield traffic
    traffic.close()
