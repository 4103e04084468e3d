"""Crowds of strangers on the trainer's port, on real sockets: more keys, messages and connections
than it can look at one by one. They get nothing, stall nothing and leave nothing behind.

Every test runs beside a legitimate server whose messages must all arrive, in order and without
delay.
"""

import os
import subprocess
import sys
import time

import zmq
from deadline import until
from strangers import (
    CURVE_GREETING,
    NULL_GREETING,
    NULL_READY,
    Traffic,
    client,
    connect,
)

from aurora_sglang_plugin.link import handshakes, peer_limits
from aurora_sglang_plugin.link.keys import load_server_keys


def test_a_crowd_with_unlisted_keys(link, traffic, tmp_path):
    """More at once than are answered in a turn; each costs the trainer a key exchange."""
    crowd = 3 * peer_limits.ANSWERS_PER_TURN
    context, push = client(link, load_server_keys(tmp_path / "keys/unlisted"))
    for _ in range(crowd - 1):
        push.connect(link.endpoint)
    until(lambda: sum(traffic.refused().values()) >= crowd or str(traffic.refused()))
    assert not push.poll(0, zmq.POLLOUT) and traffic.refused()["key"] > peer_limits.ANSWERS_PER_TURN
    context.destroy(linger=0)
    traffic.check()


FLOOD = """
import socket, sys, time
port, seconds, data = int(sys.argv[1]), float(sys.argv[2]), bytes.fromhex(sys.argv[3])
end, sent, connections = time.monotonic() + seconds, 0, 0
while time.monotonic() < end:
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        connections += 1
        try:
            while time.monotonic() < end:
                sent += stranger.send(data)
        except OSError:
            pass
print(connections, sent)
"""


def test_a_flood_of_plaintext_messages(link, traffic):
    data = NULL_GREETING + NULL_READY + b"\x00\xf0" + bytes(240) + (b"\x00\xf0" + bytes(240)) * 200
    port = link.endpoint.rpartition(":")[2]
    flood = [
        subprocess.Popen(
            [sys.executable, "-c", FLOOD, port, "2", data.hex()], stdout=subprocess.PIPE
        )
    ]
    connections, sent = map(int, flood[0].communicate(timeout=20)[0].split())
    assert connections > 100 and sent > 1 << 20
    until(
        lambda: (
            sum(traffic.refused().values()) >= 0.9 * connections
            or str((connections, traffic.refused()))
        )
    )
    assert traffic.publisher.counters()["refused"] == {}
    traffic.check()


WAVES = """
import resource, socket, sys, time
port, total, wave, hold_s = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
greeting = bytes.fromhex(sys.argv[5])
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
for begun in range(0, total, wave):
    strangers = []
    for i in range(wave):
        stranger = socket.create_connection(("127.0.0.1", port))
        strangers.append(stranger)
        if i % 2:
            stranger.sendall(greeting)
    time.sleep(hold_s)
    for stranger in strangers:
        stranger.close()
print("done")
"""


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_ten_thousand_connections(link, traffic):
    files, resident = open_files(), resident_bytes()
    arguments = [link.endpoint.rpartition(":")[2], "10000", "500", "0.05", CURVE_GREETING.hex()]
    waves = subprocess.Popen([sys.executable, "-c", WAVES, *arguments], stdout=subprocess.PIPE)
    most = 0
    while waves.poll() is None:
        most = max(most, open_files())
        time.sleep(0.01)
    assert waves.communicate()[0] == b"done\n" and waves.returncode == 0
    # they were really there
    assert most > files + 100
    until(lambda: open_files() <= files + 2 or f"{open_files()} files, {files} before")
    until(lambda: sum(traffic.refused().values()) == 10_000 or str(traffic.refused()))
    assert resident_bytes() - resident < 100 << 20
    traffic.check()


def test_too_many_to_count_are_not_counted_and_nothing_stalls(link, monkeypatch):
    monkeypatch.setattr(handshakes, "EVENTS_PER_TURN", 20)
    monkeypatch.setattr(handshakes, "PAUSE_S", 0.1)
    traffic = Traffic(link)
    try:
        for _ in range(10):
            strangers = [connect(link) for _ in range(50)]
            for stranger in strangers:
                stranger.sendall(NULL_GREETING)
                stranger.close()
        until(lambda: traffic.refused().get("unwatched"))
        traffic.check()
    finally:
        traffic.close()


def test_half_open_connections_do_not_use_up_the_files(link, traffic):
    """Cut off after the handshake's time, also if they stay: what a stranger holds is bounded by
    its rate.
    """
    files = open_files()
    strangers = [connect(link) for _ in range(200)]
    # both ends are in this process
    until(lambda: open_files() >= files + 400)
    until(lambda: open_files() <= files + 202, 3.0)
    for stranger in strangers:
        stranger.close()
    traffic.check()
