"""What is wrong at start ends the server with a message that says what to do.

Both servers are started at once.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from models import make_random_target
from rig import START_S
from serve import Server

from aurora_trainer.drafts.eagle3_init import init_draft


@pytest.fixture(scope="module")
def failures(target, taught, tmp_path_factory):
    """The end of the log of each server that must not start."""
    folder = tmp_path_factory.mktemp("start")
    other = make_random_target(folder / "other-target", layers=4)
    init_draft(other, folder / "other-draft", "random")
    (folder / "aurora.toml").write_text(
        '[link]\nendpoint = "tcp://10.0.0.7:5590"\n[plugin.capture]\nsample_rat ='
        ' 0.5\n[trainer.x]\nis = "not read"\n'
    )

    def fail(name, draft, env):
        with pytest.raises(RuntimeError) as error:
            Server(
                target,
                draft=draft,
                algorithm="AURORA",
                env=env,
                log=folder / f"{name}.log",
                timeout_s=START_S,
            )
        return str(error.value)

    with ThreadPoolExecutor(2) as pool:
        jobs = {
            "draft": pool.submit(fail, "draft", folder / "other-draft", {}),
            "config": pool.submit(
                fail, "config", taught / "full", {"AURORA_CONFIG": str(folder / "aurora.toml")}
            ),
        }
        return {name: job.result() for name, job in jobs.items()}


def test_a_draft_for_another_target(failures):
    text = failures["draft"]
    assert "the server exited with" in text and "exited with 0" not in text
    assert (
        "other-draft" in text
        and "made for another target" in text
        and "aurora-trainer init-draft" in text
    )


def test_a_bad_configuration(failures):
    text = failures["config"]
    assert "the server exited with" in text and "exited with 0" not in text
    assert "aurora.toml is not a valid configuration" in text
    assert (
        "plugin.capture.sample_rat" in text
        and "link.endpoint" in text
        and "expected ipc://" in text
    )
