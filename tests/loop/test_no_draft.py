"""Nobody trained a draft: the server starts without one, or with what init-draft made, decodes
plainly and teaches a real trainer. The server tries its versions in the same process, and output
stays what it is; also if either side is killed in any mode.
"""

from __future__ import annotations

import subprocess
from contextlib import contextmanager

import pytest
from bench_control import decode_rounds
from children import TRAINER, die_with_parent
from rig import by_label, generate, metrics, wait_until
from serve import Server, free_port
from test_control import outputs, prompts

CONFIG = """\
[link]
endpoint = "tcp://127.0.0.1:{port}"
[weights]
directory = "{home}/weights"
[trainer.model]
target = "{target}"
{draft}
[trainer.pace]
nice = 0
new_positions_per_step = 128
[trainer.publish]
every_s = 1.0
[trainer.checkpoint]
directory = "{home}/checkpoints"
[trainer.metrics]
status_file = "{home}/status.json"
every_s = 0.5
"""
PARAMS = {"max_new_tokens": 48}


@contextmanager
def trainer(config, log):
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [*TRAINER, "run", "--config", config], stdout=file, stderr=file,
            preexec_fn=die_with_parent,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize("made", [False, True], ids=["no draft", "an untrained one"])
def test_it_learns_from_plain_decoding_and_drafts_in_the_same_process(
    target, plain, stream, tmp_path, made
):
    config, draft = tmp_path / "aurora.toml", tmp_path / "draft" if made else None
    if draft:
        subprocess.run([*TRAINER, "init-draft", target, draft], check=True)
    said = f'draft = "{draft}"' if draft else ""
    config.write_text(CONFIG.format(port=free_port(), home=tmp_path, target=target, draft=said))
    batch = prompts(stream, 64000)
    expected = outputs(generate(plain, batch, PARAMS, None))
    places = iter(range(1000, 60000, 97))
    serve = dict(
        draft=draft, algorithm="AURORA", num_steps=3, args=["--enable-metrics"],
        env={"AURORA_CONFIG": str(config), "AURORA_SET": "plugin.audit.share=1"},
        log=tmp_path / "server.log",
    )  # fmt: skip

    def check(server: Server) -> None:
        assert outputs(generate(server, batch, PARAMS, None)) == expected

    def traffic(server: Server) -> None:
        more = [stream[at : at + 32] for at in (next(places) for _ in range(8))]
        generate(server, more, PARAMS, None)

    def drafted(server: Server) -> bool:
        traffic(server)
        return any(steps in decode_rounds(server) for steps in "123")

    def at_version(server: Server, version: float) -> bool:
        traffic(server)
        return metrics(server)["aurora_draft_version"] >= version

    def audited(server: Server) -> float:
        """Requests that were decoded again, and gave the same."""
        results = by_label(server, "aurora_audited_requests", "result")
        assert not results.get("different") and not results.get("failed"), results
        return results.get("same", 0.0)

    with Server(target, **serve) as server:
        check(server)
        wait_until(lambda: decode_rounds(server), "rounds in the metrics", 10)
        assert set(decode_rounds(server)) == {"cold"}
        if not made:
            # killed while the server is cold: the next one goes on
            with trainer(config, tmp_path / "trainer.log") as first:
                wait_until(lambda: at_version(server, 1), "a version", 120)
                first.kill()
            check(server)
        with trainer(config, tmp_path / "trainer.log") as second:
            wait_until(
                lambda: drafted(server),
                lambda: f"a round that drafts: {decode_rounds(server)}",
                120,
            )
            found = metrics(server)
            assert found["aurora_draft_version"] >= 1 and found["aurora_attached"] == 1
            for _ in range(3):
                check(server)
            # while nobody asks, what it said is decoded plainly, alone
            before = audited(server)
            wait_until(lambda: audited(server) > before, "an audit", 30)
            if made:
                return
            # killed while it drafts, or while it rests again
            second.kill()
        check(server)
        version = metrics(server)["aurora_draft_version"]
        server.kill()
    with Server(target, **serve | {"log": tmp_path / "again.log"}) as server:
        check(server)
        wait_until(lambda: "aurora_draft_version" in metrics(server), "metrics", 10)
        assert metrics(server)["aurora_draft_version"] >= version
        with trainer(config, tmp_path / "trainer.log"):
            wait_until(lambda: at_version(server, version + 1), "a newer version", 120)
        check(server)
    assert (tmp_path / "weights" / "CURRENT").exists()
    (initial,) = (tmp_path / "checkpoints").glob("initial-draft-*")
    assert {f.name for f in initial.iterdir()} >= {"config.json", "model.safetensors"}
    log = (tmp_path / "trainer.log").read_text()
    assert "Traceback" not in log, log[-3000:]
