"""The plan follows its load and its settings, and the command prints it."""

import json
import math
from dataclasses import replace

import pytest
from models import make_random_target
from typer.testing import CliRunner

from aurora_trainer.cli import app
from aurora_trainer.config import TrainerFile
from aurora_trainer.drafts.target import read_config
from aurora_trainer.tools import plan, sizes

V, H = 320, 64
SETTINGS = TrainerFile.model_validate({"trainer": {"model": {"target": "t", "draft": "d"}}})


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_random_target(tmp_path_factory.mktemp("target"), vocab=V, hidden=H)


def test_rates_follow_the_load(target):
    opened, base = read_config(target), sizes.Load()

    def at(section, key, settings=SETTINGS, **changes):
        return plan.plan(opened, settings, replace(base, **changes))[section][key]

    link = at("link", "bytes_per_s")
    assert at("link", "bytes_per_s", tokens_per_s=2000, requests_per_s=8) == pytest.approx(2 * link)
    assert at("link", "bytes_per_s", servers=3) == pytest.approx(3 * link)
    assert at("training", "optimizer_steps_per_s") == pytest.approx(1000 / 512)
    assert at("link", "bytes_per_generated_token", accept_length=4) < at(
        "link", "bytes_per_generated_token"
    )
    halved = SETTINGS.model_validate(
        {
            "plugin": {"capture": {"sample_rate": 0.5}},
            "trainer": {"model": {"target": "t", "draft": "d"}},
        }
    )
    assert at("link", "bytes_per_s", halved) == pytest.approx(link / 2)
    one, four = (at("server", "extra_device_bytes_per_rank", tp=tp) for tp in (1, 4))
    assert (
        one == 2 * sizes.parameter_count(plan.draft_config(opened.config, V), opened) * 4
        and one / 4 < four < one
    )
    # of several ranks each holds a part of the moments, and the whole draft
    alone, each = (at("trainer_device", "moments_bytes", ranks=ranks) for ranks in (1, 4))
    assert each == alone // 4 and at("trainer_ranks", "positions_of_a_batch_each", ranks=4) == 1024
    largest = "parameters_that_a_device_of_80_gb_holds"
    assert 1e8 < at("trainer_ranks", largest) < at("trainer_ranks", largest, ranks=4)
    idle = plan.plan(opened, SETTINGS, replace(base, tokens_per_s=0, requests_per_s=0))
    assert math.isinf(idle["trainer_host"]["seconds_of_traffic_in_the_buffer"])


def test_the_command(target, tmp_path):
    def run(*arguments):
        result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
        return result.exit_code, result.output

    # no weights there
    (tmp_path / "config.json").write_text((target / "config.json").read_text())
    code, said = run(tmp_path / "config.json", "--json", "--accept-length", 3, "--draft-vocab", 100)
    found = json.loads(said)
    assert (
        code == 0 and found["draft"]["vocabulary"] == 100 and found["draft"]["dtype"] == "float32"
    )
    code, said = run(tmp_path)
    assert code == 0 and "bytes per generated token" in said and "GPU" in said
    assert "neither a directory nor" in run("/nowhere")[1]
    assert "dtype int4" in run(tmp_path, "--dtype", "int4")[1]
    (tmp_path / "aurora.toml").write_text(
        '[trainer.model]\ntarget="t"\ndraft="d"\n[trainer.batch]\nmax_positions=64\n'
    )
    fewer = json.loads(run(tmp_path, "--json", "--config", tmp_path / "aurora.toml")[1])
    assert (
        fewer["trainer_device"]["activations_bytes"] < found["trainer_device"]["activations_bytes"]
    )
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    code, said = run(tmp_path)
    assert code == 2 and "lacks num_hidden_layers" in said
