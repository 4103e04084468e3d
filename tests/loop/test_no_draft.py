"""Nobody trained a draft: the server starts without one, or with what init-draft made, decodes
plainly and teaches a real trainer. The server tries its versions in the same process, and output
stays what it is.
"""

from __future__ import annotations

import subprocess

import pytest
from bench_control import decode_rounds
from children import TRAINER, die_with_parent
from rig import generate, metrics, wait_until
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
    with open(tmp_path / "trainer.log", "wb") as log:
        trainer = subprocess.Popen(
            [*TRAINER, "run", "--config", config], stdout=log, stderr=log,
            preexec_fn=die_with_parent,
        )  # fmt: skip
    try:
        with Server(
            target, draft=draft, algorithm="AURORA", num_steps=3, args=["--enable-metrics"],
            env={"AURORA_CONFIG": str(config)}, log=tmp_path / "server.log",
        ) as server:  # fmt: skip
            assert outputs(generate(server, batch, PARAMS, None)) == expected
            wait_until(lambda: decode_rounds(server), "rounds in the metrics", 10)
            assert set(decode_rounds(server)) == {"cold"}

            places = iter(range(1000, 30000, 97))

            def drafted() -> bool:
                more = [stream[at : at + 32] for at in (next(places) for _ in range(8))]
                generate(server, more, PARAMS, None)
                return any(steps in decode_rounds(server) for steps in "123")

            wait_until(drafted, lambda: f"a round that drafts: {decode_rounds(server)}", 120)
            found = metrics(server)
            assert found["aurora_draft_version"] >= 1 and found["aurora_attached"] == 1
            for _ in range(3):
                assert outputs(generate(server, batch, PARAMS, None)) == expected
    finally:
        trainer.terminate()
        trainer.wait(30)
    assert (tmp_path / "weights" / "CURRENT").exists()
    drafts = [*(tmp_path / "checkpoints").glob("initial-draft-*"), *([draft] if draft else [])]
    (initial,) = drafts
    assert {f.name for f in initial.iterdir()} >= {"config.json", "model.safetensors"}
