"""The training bench: it measures what agrees, and shows no figure of what does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_trainer_cpu import check
from safetensors.torch import save_file
from synthetic_samples import ragged, sample

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_trainer_cpu.py"


def test_it_runs_and_both_sides_agree(tmp_path):
    out = tmp_path / "out.json"
    options = "--tokens 96 --hidden 64 --vocab 256 --rounds 1 --kinds trees --out".split()
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *options, str(out)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (about,) = json.loads(out.read_text())
    (trees,) = about["results"]
    assert (
        set(trees["peak_bytes"]) == set(trees["seconds"]) == {"ours", "dense", "dense, one by one"}
    )
    assert (
        all(s > 0 for s in trees["cpu_seconds"]["ours"]) and 0 < trees["gradient_difference"] < 1e-3
    )
    assert "tok/s" in run.stdout


def test_sides_that_differ_show_no_figures(tmp_path):
    files = {"ours": tmp_path / "ours", "dense": tmp_path / "dense"}
    save_file({"w": torch.ones(3)}, files["ours"])
    save_file({"w": torch.tensor([1.0, 1.0, 1.01])}, files["dense"])
    with pytest.raises(SystemExit, match="gradient of w by dense"):
        check({"ours": 1.0, "dense": 1.0}, files)
    with pytest.raises(SystemExit, match="loss 1.1 of dense"):
        check({"ours": 1.0, "dense": 1.1}, files)


@pytest.mark.parametrize("positions", [20, 64, 301])
def test_synthetic_samples_are_of_one_piece(positions):
    """Every position from the first root's on has a target, and trees hang where they were
    drawn.
    """
    s = sample(positions, vocab=100, features=4, kept=5, seed=positions)
    assert len(s.features) == positions == len(s.tokens) - 1
    assert (s.position_node[: s.prompt_len - 1] == -1).all() and (
        s.position_node[s.prompt_len - 1 :] >= 0
    ).all()
    node = s.position_node[s.prompt_len - 1 :]
    assert torch.equal(s.node_token[node], s.tokens[s.prompt_len :]) and s.node_accepted[node].all()
    assert torch.equal(
        s.node_position[node] + s.node_depth[node], torch.arange(s.prompt_len - 1, positions)
    )
    assert (s.topk_ids.sort(-1).values.diff() > 0).all() and (s.topk_logits.diff() <= 0).all()
    assert (
        sum(len(part.features) for part in ragged(positions, vocab=100, features=4, kept=5))
        == positions
    )
