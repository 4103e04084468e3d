"""A trainer that moves, behind the one address that servers know: not a message is unaccounted for,
whether it was stopped or died, and servers need no restart.
"""

import shutil
import socket
import threading

import pytest
from deadline import until, values
from test_receiver import both_sides, offer

from aurora_sglang_plugin.config import LinkConfig, PublishConfig
from aurora_sglang_plugin.link.keys import make_keys
from aurora_sglang_plugin.link.publisher import Publisher
from aurora_sglang_plugin.link.receiver import ReceiveConfig, Receiver


class Service:
    """One address in front of whoever is the trainer now, as a cluster's Service is: it forwards
    bytes, and cuts connections when it is pointed elsewhere.
    """

    def __init__(self):
        self.backend: int | None = None
        self._sockets: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def point(self, port: int | None) -> None:
        self.backend = port
        while self._sockets:
            cut(self._sockets.pop())

    def close(self) -> None:
        self.point(None)
        cut(self._server)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            try:
                trainer = socket.create_connection(("127.0.0.1", self.backend or 1), 5)
            except OSError:
                # nobody is behind it
                cut(client)
                continue
            self._sockets += [client, trainer]
            for pair in ((client, trainer), (trainer, client)):
                threading.Thread(target=self._forward, args=pair, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
        except OSError:
            pass
        cut(source)
        cut(sink)


def cut(one: socket.socket) -> None:
    try:
        one.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    one.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def site(tmp_path, started):
    """(the Service, how a server starts, how a trainer starts on a machine of its own)."""
    service = Service()
    make_keys(tmp_path / "keys", ["server"])
    keys = dict(trainer_keys=tmp_path / "keys/trainer", server_keys=tmp_path / "keys/server")

    def serve() -> Publisher:
        link = LinkConfig(endpoint=f"tcp://127.0.0.1:{service.port}", **keys)
        started.append(Publisher(link, PublishConfig(heartbeat_s=0.05), "target"))
        return started[-1]

    def train(machine: str) -> Receiver:
        (tmp_path / machine).mkdir(exist_ok=True)
        port = free_port()
        link = LinkConfig(
            endpoint=f"tcp://127.0.0.1:{service.port}", bind=f"tcp://127.0.0.1:{port}", **keys
        )
        started.append(Receiver(link, ReceiveConfig(), tmp_path / machine / "ledger.json"))
        service.point(port)
        return started[-1]

    yield service, serve, train
    service.close()


def test_a_trainer_that_is_moved_with_its_checkpoints_counts_on(site, tmp_path):
    service, serve, train = site
    first, server = train("a"), serve()
    for value in range(20):
        offer(server, value)
    assert values(first, 20) == list(range(20))
    until(lambda: both_sides(server, first))
    service.point(None)
    first.close()
    # the server knows that nobody is there: what is captured waits
    until(lambda: server._send_queue.blocked_s > 0.2)
    for value in range(20, 30):
        offer(server, value)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    second = train("b")
    assert values(second, 10) == list(range(20, 30))
    # a server is added meanwhile, with the keys of the others
    added = serve()
    offer(added, 7)
    assert values(second, 1) == [7]
    for one in (server, added):
        until(lambda one=one: both_sides(one, second))
    entry = second.ledger()["sessions"][server.session]
    # the message count is whole: heartbeats that were cut off are what is lost
    assert entry["captured"] == 30 and entry["lost"] <= entry["heartbeats"]
    assert second.ledger()["refused_peers"] == {}


def test_a_trainer_that_died_with_its_disk_is_replaced_by_one_that_knows_nobody(site):
    service, serve, train = site
    first, server = train("a"), serve()
    offer(server, 1)
    assert values(first, 1) == [1]
    service.point(None)
    until(lambda: server._send_queue.blocked_s > 0.2)
    for value in (2, 3):
        offer(server, value)
    second = train("b")
    assert values(second, 2) == [2, 3]
    until(lambda: second.balanced(server.session))
    entry = second.ledger()["sessions"][server.session]
    # what came before is another trainer's to know
    assert entry["before"] >= 1 and entry["received"] >= 2
