"""Keys: never overwritten, never readable by others, never shown; what is wrong with them is said
with its remedy.
"""

import os
import stat

import pytest
import zmq

from aurora_sglang_plugin.link.keys import (
    check_pair,
    load_server_keys,
    load_trainer_keys,
    make_keys,
)


@pytest.fixture
def keys(tmp_path):
    assert make_keys(tmp_path / "keys", ["gpu-1", "gpu-2"]) is True
    return tmp_path / "keys"


def everything(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_what_was_made_fits_and_is_private(keys):
    trainer = load_trainer_keys(keys / "trainer")
    servers = [load_server_keys(keys / name) for name in ("gpu-1", "gpu-2")]
    assert {server.public for server in servers} == set(trainer.servers) and len(
        trainer.servers
    ) == 2
    assert sorted(trainer.servers.values()) == ["gpu-1", "gpu-2"]
    for server in servers:
        check_pair(trainer, server)
    for path in [keys, *keys.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    secrets = [path for path in keys.rglob("*.secret")]
    assert len(secrets) == 3 and len({path.read_bytes() for path in secrets}) == 3


def test_modes_do_not_depend_on_the_umask(tmp_path):
    before = os.umask(0)
    try:
        make_keys(tmp_path / "keys", ["server"])
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "keys").rglob("*")} == {
        0o700,
        0o600,
    }


def test_a_further_server_joins_and_nothing_else_changes(keys):
    before = everything(keys)
    assert make_keys(keys, ["gpu-3"]) is False
    after = everything(keys)
    assert before.items() <= after.items() and len(after) == len(before) + 4
    check_pair(load_trainer_keys(keys / "trainer"), load_server_keys(keys / "gpu-3"))


def test_nothing_is_overwritten_and_nothing_half_done(keys):
    before = everything(keys)
    with pytest.raises(ValueError, match="never overwritten"):
        make_keys(keys, ["gpu-3", "gpu-1"])
    (keys / "gpu-2").rename(keys.parent / "moved-to-its-machine")
    with pytest.raises(ValueError, match="gpu-2.public exists"):
        make_keys(keys, ["gpu-2"])
    assert len(everything(keys)) == len(before) - 3 and not (keys / "gpu-3").exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "trainer", ".hidden", "x" * 65, "a b", "a\n"]
)
def test_names_that_are_none(tmp_path, name):
    with pytest.raises(ValueError, match="--server"):
        make_keys(tmp_path / "keys", [name])
    assert not (tmp_path / "keys").exists()


def test_a_name_twice(tmp_path):
    with pytest.raises(ValueError, match="twice"):
        make_keys(tmp_path / "keys", ["a", "a"])


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
@pytest.mark.parametrize("who", ["trainer", "gpu-1"])
def test_a_secret_that_others_can_read_is_refused(keys, who, mode):
    path = keys / who / f"{'trainer' if who == 'trainer' else 'server'}.secret"
    path.chmod(mode)
    with pytest.raises(
        ValueError, match=f"{path} can be read by other users .mode {mode:04o}.*chmod 600"
    ) as error:
        (load_trainer_keys if who == "trainer" else load_server_keys)(keys / who)
    assert path.read_bytes().splitlines()[-1].decode() not in str(error.value)


@pytest.mark.parametrize("path", ["trainer", "trainer/servers", "trainer/servers/gpu-1.public"])
@pytest.mark.parametrize("bit", [0o020, 0o002])
def test_a_list_that_others_can_write_is_refused(keys, path, bit):
    (keys / path).chmod((keys / path).stat().st_mode | bit)
    with pytest.raises(ValueError, match="can be changed by other users"):
        load_trainer_keys(keys / "trainer")


def test_public_keys_may_be_readable(keys):
    for path in keys.rglob("*.public"):
        path.chmod(0o644)
    load_trainer_keys(keys / "trainer"), load_server_keys(keys / "gpu-1")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_key_of_another_user_is_refused(keys, monkeypatch):
    os.chown(keys / "gpu-1" / "server.secret", 12345, 12345)
    with pytest.raises(ValueError, match="belongs to user 12345.*chown"):
        load_server_keys(keys / "gpu-1")


DAMAGES = {
    "empty": lambda text: b"",
    "short": lambda text: text[:-3],
    "long": lambda text: text.rstrip() + b"x\n",
    "two keys": lambda text: text + text,
    "not Z85": lambda text: text[:-2] + b'"\n',
    "binary": lambda text: bytes(range(256)),
    "huge": lambda text: text.rstrip() * 1000,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["server.secret", "trainer.public"])
def test_a_damaged_key_is_named_and_not_shown(keys, name, damage):
    path = keys / "gpu-1" / name
    key = path.read_bytes().splitlines()[-1].decode()
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=f"{name} is damaged") as error:
        load_server_keys(keys / "gpu-1")
    assert key[:20] not in str(error.value) and error.value.__cause__ is None


def test_what_is_missing_is_named(keys, tmp_path):
    for missing, load in (
        (tmp_path / "none", load_trainer_keys),
        (tmp_path / "none", load_server_keys),
    ):
        with pytest.raises(ValueError, match="No such file.*aurora-trainer keygen"):
            load(missing)
    (keys / "gpu-1" / "trainer.public").unlink()
    with pytest.raises(ValueError, match="trainer.public: No such file"):
        load_server_keys(keys / "gpu-1")
    for path in (keys / "trainer" / "servers").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no server may connect.*--server NAME"):
        load_trainer_keys(keys / "trainer")


def test_a_pipe_does_not_hold_a_start_up(keys):
    path = keys / "gpu-1" / "server.secret"
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(ValueError, match="not a regular file"):
        load_server_keys(keys / "gpu-1")


def test_keys_that_do_not_fit(keys, tmp_path):
    make_keys(tmp_path / "other", ["gpu-1"])
    trainer, other = (
        load_trainer_keys(keys / "trainer"),
        load_server_keys(tmp_path / "other" / "gpu-1"),
    )
    with pytest.raises(ValueError, match="not the public key of this trainer"):
        check_pair(trainer, other)
    (keys / "trainer" / "servers" / "gpu-1.public").unlink()
    with pytest.raises(ValueError, match="does not list"):
        check_pair(load_trainer_keys(keys / "trainer"), load_server_keys(keys / "gpu-1"))


def test_keys_are_never_printed(keys):
    trainer, server = load_trainer_keys(keys / "trainer"), load_server_keys(keys / "gpu-1")
    for text in (repr(trainer), str(server), f"{server}"):
        assert trainer.secret.decode() not in text and server.secret.decode() not in text
    assert server.public == zmq.curve_public(server.secret)
