"""keygen writes what its words say: its output, put into a file, is a link that works between two
addresses.
"""

import re
import socket
import stat
import time
import tomllib

import numpy as np
import pytest
from typer.testing import CliRunner

from aurora_sglang_plugin.config import PublishConfig, ServerConfig, load
from aurora_sglang_plugin.link.publisher import Publisher
from aurora_sglang_plugin.link.receiver import ReceiveConfig, Receiver
from aurora_trainer.cli import app
from aurora_trainer.tools.check import _endpoint, _keys


def run(*arguments):
    return CliRunner().invoke(app, ["keygen", *map(str, arguments)])


def own_address():
    """An address of this machine that is not loopback, or None. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return probe.getsockname()[0]


def toml_of(output):
    """The part of keygen's output that goes into the configuration."""
    return output[output.index("[link]") : output.rindex("\n\n")]


class End:
    nbytes = 64

    def unload(self):
        pass

    def build(self):
        return {"committed_lens": ("int32", np.full(1, 7, np.int32))}


def test_what_it_prints_is_a_link_that_works(tmp_path):
    result = run(tmp_path / "keys")
    assert result.exit_code == 0
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    address = own_address() or "127.0.0.1"
    text = (
        toml_of(result.output)
        .replace("TRAINER:5590", f"{address}:{port}")
        .replace("# bind", "bind")
    )
    path = tmp_path / "aurora.toml"
    path.write_text(text.replace("0.0.0.0:5590", f"0.0.0.0:{port}"))
    link = load(ServerConfig, path).link
    assert link.bound == f"tcp://0.0.0.0:{port}" and link.endpoint == f"tcp://{address}:{port}"
    assert "the trainer lets in server" in _keys(link) and "they fit" in _keys(link)
    assert _endpoint(link) == f"tcp://0.0.0.0:{port} can be bound"
    receiver, publisher = (
        Receiver(link, ReceiveConfig(), None),
        Publisher(link, PublishConfig(), "target"),
    )
    publisher.offer("end", End(), requests=["r"], reasons=["stop"])
    assert receiver.get(10.0).arrays["committed_lens"][0] == 7
    publisher.close()
    receiver.close()
    assert receiver.balanced(publisher.session) is True


def test_no_secret_is_printed(tmp_path):
    output = run(tmp_path / "keys").output + run(tmp_path / "keys", "--server", "b").output
    secrets = [path.read_text().splitlines()[-1] for path in (tmp_path / "keys").rglob("*.secret")]
    assert len(secrets) == 3 and not any(secret in output for secret in secrets)


def test_further_servers_and_a_second_run(tmp_path):
    first = run(tmp_path / "keys", "--server", "a", "--server", "b")
    assert first.exit_code == 0 and tomllib.loads(toml_of(first.output))["link"][
        "server_keys"
    ].endswith("/keys/a")
    assert re.search(r'# server_keys = ".*/keys/b"   # instead, for b', first.output)
    again = run(tmp_path / "keys", "--server", "a")
    assert (
        again.exit_code == 2
        and "never overwritten" in again.output
        and "Traceback" not in again.output
    )
    further = run(tmp_path / "keys", "--server", "c")
    assert (
        further.exit_code == 0
        and "trainer=kept" in further.output
        and "Restart the trainer" in further.output
    )
    assert {p.name for p in (tmp_path / "keys").iterdir()} == {"trainer", "a", "b", "c"}
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700


def test_a_directory_that_others_can_write(tmp_path):
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys").chmod(0o777)
    result = run(tmp_path / "keys")
    assert (
        result.exit_code == 2
        and "chmod 700" in result.output
        and not list((tmp_path / "keys").iterdir())
    )


def test_check_says_what_is_wrong_with_keys(tmp_path):
    run(tmp_path / "keys")
    keys = {"trainer_keys": tmp_path / "keys/trainer", "server_keys": tmp_path / "keys/server"}
    link = load(ServerConfig, None, [f'link.{name}="{path}"' for name, path in keys.items()]).link
    assert "they fit" in _keys(link)
    # as on the trainer's machine
    (tmp_path / "keys/server").rename(tmp_path / "moved")
    assert "lets in server" in _keys(link) and "fit" not in _keys(link)
    (tmp_path / "moved").rename(tmp_path / "keys/server")
    # as on the server's machine
    (tmp_path / "keys/trainer").rename(tmp_path / "moved")
    assert "public key" in _keys(link) and "another machine" in _endpoint(link)
    (tmp_path / "keys/server/server.secret").chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        _keys(link)
    (tmp_path / "keys/server").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="neither"):
        _keys(link)
    assert "none, the link stays" in _keys(load(ServerConfig, None).link)
    words = ["link.bind=tcp://0.0.0.0:5590", "link.insecure_plaintext_beyond_loopback=true"]
    assert "PLAINTEXT" in _keys(load(ServerConfig, None, words).link)


def test_the_trainer_refuses_to_start_with_a_readable_secret(tmp_path):
    run(tmp_path / "keys")
    keys = [f'link.{side}_keys="{tmp_path}/keys/{side}"' for side in ("trainer", "server")]
    link = load(ServerConfig, None, keys).link
    (tmp_path / "keys/trainer/trainer.secret").chmod(0o640)
    started = time.monotonic()
    with pytest.raises(ValueError, match="trainer.secret can be read by other users"):
        Receiver(link, ReceiveConfig(), None)
    assert time.monotonic() - started < 1
