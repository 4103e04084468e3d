"""The running mean of the weights: its formula, that it is what is published and scored, and that a
resumed run goes on with it.
"""

from dataclasses import replace

import pytest
import torch
from naive_draft import CONFIG, VARIANTS, make
from safetensors.torch import load_file
from small_training import open_training, train

from aurora_sglang_plugin.weights.manifest import version_name
from aurora_trainer.checkpoint import load_newest, save_checkpoint
from aurora_trainer.learn.optimizer import Optimizer, OptimizerConfig
from aurora_trainer.learn.running_mean import RunningMean

AVERAGE = "trainer.optimizer.average=0.9"


def test_it_follows_its_formula():
    masters = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
    mean = RunningMean(0.5, masters)
    want = 0.0
    for updates in range(1, 30):
        value = float(updates % 7)
        for master in masters.values():
            master.fill_(value)
        mean.update(masters, updates)
        keep = min(0.5, (updates + 1) / (updates + 10))
        want = keep * want + (1 - keep) * value
        assert all(bool((w - want).abs().max() < 1e-5) for w in mean.weights.values())


def test_switched_off_it_is_the_draft_itself():
    draft = make(VARIANTS["plain"], torch.float32)
    mean = RunningMean(0.0, dict(draft.named_parameters()))
    assert not mean.weights and mean.draft(draft) is draft


def test_a_draft_of_two_layers_has_one_that_is_not_trained():
    draft = make(replace(CONFIG, num_hidden_layers=2), torch.float32)
    optimizer = Optimizer(draft, OptimizerConfig())
    assert len(optimizer.masters) < len(dict(draft.named_parameters()))
    mean = RunningMean(0.9, optimizer.masters)
    with torch.no_grad():
        for master in optimizer.masters.values():
            master.add_(1.0)
    mean.update(optimizer.masters, 1)
    scored = dict(mean.draft(draft).named_parameters())
    assert all(torch.equal(scored[name], weight) for name, weight in mean.weights.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_published_is_the_mean_and_what_is_trained_is_not(models, stream, tmp_path, dtype):
    training = open_training(models, tmp_path, dtype, AVERAGE)
    train(training, stream, 20)
    mean, masters = training.learner.mean.weights, training.optimizer.masters
    assert any(not torch.equal(mean[n], m) for n, m in masters.items())
    scored = training.learner.mean_draft()
    assert (
        scored is not training.draft and scored.embed.data_ptr() == training.draft.embed.data_ptr()
    )
    for name, weight in scored.named_parameters():
        assert torch.equal(weight, mean[name].to(weight.dtype)), name
    version = training.publish()
    path = tmp_path / "weights" / version_name(version) / "model.safetensors"
    for name, tensor in load_file(path).items():
        if name in mean:
            assert torch.equal(tensor, mean[name].to(tensor.dtype)), name


def test_a_resumed_run_goes_on_with_the_same_mean(models, stream, tmp_path):
    whole, first, second = (
        open_training(models, tmp_path / name, "float32", AVERAGE) for name in ("a", "b", "c")
    )
    train(whole, stream, 24)
    train(first, stream, 13)
    (tmp_path / "checkpoints").mkdir()
    save_checkpoint(tmp_path / "checkpoints", 13, *first.checkpoint(), keep=2)
    second.restore(load_newest(tmp_path / "checkpoints"), live=False)
    train(second, stream, 24, replayed=13)
    for name, weight in whole.learner.mean.weights.items():
        assert torch.equal(weight, second.learner.mean.weights[name]), name


def test_a_checkpoint_without_a_mean_starts_one(models, stream, tmp_path):
    plain = open_training(models, tmp_path / "a", "float32")
    train(plain, stream, 5)
    (tmp_path / "checkpoints").mkdir()
    save_checkpoint(tmp_path / "checkpoints", 5, *plain.checkpoint(), keep=2)
    averaged = open_training(models, tmp_path / "b", "float32", AVERAGE)
    averaged.restore(load_newest(tmp_path / "checkpoints"), live=False)
    for name, master in averaged.optimizer.masters.items():
        assert torch.equal(averaged.learner.mean.weights[name], master)
