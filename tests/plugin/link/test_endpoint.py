"""What stays on the machine, what needs keys, and which ipc paths every user could take."""

import logging

import pytest
from pydantic import ValidationError

from aurora_sglang_plugin.config import ConfigError, LinkConfig, PublishConfig, ServerConfig, load
from aurora_sglang_plugin.endpoint import check_ipc_directory, is_local
from aurora_sglang_plugin.link.publisher import Publisher
from aurora_sglang_plugin.link.receiver import ReceiveConfig, Receiver

KEYS = {"trainer_keys": "/keys/trainer", "server_keys": "/keys/server"}
HERE = [
    "ipc:///run/aurora/link",
    "ipc://@aurora",
    "tcp://127.0.0.1:5590",
    "tcp://127.8.9.1:1",
    "tcp://localhost:5590",
]
HERE += ["tcp://[::1]:5590"]
AWAY = [
    "tcp://10.0.0.7:5590",
    "tcp://trainer.example:5590",
    "tcp://[fd00::7]:5590",
    "tcp://127.0.0.1.example:5590",
]
AWAY += ["tcp://localhost.example:5590", "tcp://127.1:5590", "tcp://trainer_1:65535"]
NONSENSE = [
    "", "tcp://", "tcp://:5590", "tcp://127.0.0.1", "tcp://127.0.0.1:", "tcp://127.0.0.1:0",
    "tcp://127.0.0.1:65536",
    "tcp://127.0.0.1:*", "tcp://127.0.0.1:port", "udp://127.0.0.1:1", "inproc://x", "ipc://",
    "ipc://*", "ipc://@",
    "tcp://127.0.0.1:5590/x", "http://127.0.0.1:80", "pgm://127.0.0.1;239.1.1.1:80",
    " tcp://127.0.0.1:5590",
    # libzmq: from loopback, to 10.0.0.7
    "tcp://127.0.0.1:0;10.0.0.7:5590",
    "tcp://127.0.0.1:5590;10.0.0.7:5590",
    "tcp://127.0.0.1:5590\n",
]  # fmt: skip
WILD = ["tcp://*:5590", "tcp://0.0.0.0:5590", "tcp://[::]:5590"]


@pytest.mark.parametrize("endpoint", HERE)
def test_what_stays_here_needs_no_keys(endpoint):
    link = LinkConfig(endpoint=endpoint)
    assert is_local(endpoint) and link.bound == endpoint
    LinkConfig(endpoint=endpoint, **KEYS)


@pytest.mark.parametrize("endpoint", AWAY)
def test_what_leaves_needs_keys_or_the_words(endpoint):
    assert not is_local(endpoint)
    with pytest.raises(
        ValidationError, match="link.endpoint .* leaves this machine.*insecure_plaintext"
    ):
        LinkConfig(endpoint=endpoint)
    LinkConfig(endpoint=endpoint, **KEYS)
    LinkConfig(endpoint=endpoint, insecure_plaintext_beyond_loopback=True)


@pytest.mark.parametrize("bind", AWAY + WILD)
def test_binding_beyond_loopback_needs_keys_as_well(bind):
    with pytest.raises(ValidationError, match="link.bind .* leaves this machine"):
        LinkConfig(bind=bind)
    assert LinkConfig(bind=bind, **KEYS).bound == bind
    assert LinkConfig(bind=bind, insecure_plaintext_beyond_loopback=True).bound == bind


@pytest.mark.parametrize("endpoint", NONSENSE)
def test_nonsense_is_refused_whatever_else_is_set(endpoint):
    for setting in ("endpoint", "bind"):
        with pytest.raises(ValidationError, match="is no endpoint"):
            LinkConfig(**{setting: endpoint}, **KEYS, insecure_plaintext_beyond_loopback=True)


@pytest.mark.parametrize("endpoint", WILD)
def test_servers_do_not_connect_to_a_wildcard(endpoint):
    with pytest.raises(ValidationError, match="wildcard.*link.bind"):
        LinkConfig(endpoint=endpoint, **KEYS)


@pytest.mark.parametrize("given", KEYS)
def test_keys_for_one_side_only(given):
    with pytest.raises(ValidationError, match="both or neither"):
        LinkConfig(**{given: KEYS[given]})


def test_the_refusal_names_the_file(tmp_path):
    path = tmp_path / "aurora.toml"
    path.write_text('[link]\nendpoint = "tcp://10.0.0.7:5590"\n')
    with pytest.raises(
        ConfigError, match="aurora.toml(.|\n)*link.endpoint 'tcp://10.0.0.7:5590' leaves"
    ):
        load(ServerConfig, path)


def test_an_ipc_path_that_every_user_can_replace_is_refused_by_both_sides(tmp_path):
    open_to_all = tmp_path / "open"
    (open_to_all / "mine").mkdir(parents=True)
    # the directory itself, or one above it
    for directory in (open_to_all, open_to_all / "mine"):
        open_to_all.chmod(0o777)
        link = LinkConfig(endpoint=f"ipc://{directory}/link")
        with pytest.raises(ValueError, match=f"{open_to_all} .mode 0777.*mkdir -m 700"):
            Receiver(link, ReceiveConfig(), None)
        with pytest.raises(ValueError, match="mkdir -m 700"):
            Publisher(link, PublishConfig(), "target")
    open_to_all.chmod(0o700)
    Receiver(LinkConfig(endpoint=f"ipc://{open_to_all}/link"), ReceiveConfig(), None).close()


def test_an_ipc_path_that_every_user_can_take_first_is_warned_about_without_keys(tmp_path, caplog):
    tmp_path.chmod(0o1777)
    for endpoint in (f"ipc://{tmp_path}/link", "ipc://@abstract"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_ipc_directory(endpoint, keys=True)
            assert not caplog.records
            check_ipc_directory(endpoint, keys=False)
            assert len(caplog.records) == 1 and "every user" in caplog.text
    tmp_path.chmod(0o700)


def test_private_and_absent_ipc_directories_are_quiet(tmp_path, caplog):
    tmp_path.chmod(0o700)
    for endpoint in (f"ipc://{tmp_path}/link", "ipc:///not/there/link", "tcp://127.0.0.1:5590"):
        check_ipc_directory(endpoint, keys=False)
    assert not caplog.records
