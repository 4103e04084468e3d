"""What the draft computes in: bfloat16 learns as float32 does, over float32 masters that nothing
rounds.
"""

import pytest
import torch
from safetensors.torch import load_file
from small_training import open_training, train

from aurora_sglang_plugin.weights.manifest import version_name
from aurora_trainer.checkpoint import load_newest, save_checkpoint
from aurora_trainer.config import ModelConfig


def test_bfloat16_learns_as_float32_does(models, stream, tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        training = open_training(models, tmp_path / dtype, dtype)
        losses[dtype] = torch.tensor(train(training, stream, 60))
        assert training.optimizer.skipped == 0
    exact, rounded = losses["float32"], losses["bfloat16"]
    assert exact[-10:].mean() < 0.3 * exact[:5].mean()
    assert not torch.equal(exact, rounded)
    # the same batches in the same order
    torch.testing.assert_close(rounded[:5], exact[:5], rtol=0.01, atol=0)
    torch.testing.assert_close(rounded[-10:].mean(), exact[-10:].mean(), rtol=0.05, atol=0)


def test_what_is_in_which_dtype(models, stream, tmp_path):
    training = open_training(models, tmp_path, "bfloat16")
    train(training, stream, 30)
    for draft in (training.draft, training.served.draft):
        assert {p.dtype for p in draft.parameters()} == {draft.embed.dtype} == {torch.bfloat16}
        assert draft.inv_freq.dtype == torch.float32
    # one copy of the largest matrix
    assert training.draft.embed.data_ptr() == training.served.draft.embed.data_ptr()
    assert {t.dtype for t in training.optimizer.state_dict()[0].values()} == {torch.float32}

    version = training.publish()
    assert training.served.draft is not training.served.initial
    for draft in (training.served.draft, training.served.initial):
        assert draft.embed.data_ptr() == training.draft.embed.data_ptr()
    published = load_file(tmp_path / "weights" / version_name(version) / "model.safetensors")
    for name, master in training.optimizer.masters.items():
        # float32, as the initial draft is
        assert torch.equal(published[name], master), name
        assert torch.equal(dict(training.draft.named_parameters())[name], master.bfloat16()), name
    assert not torch.equal(published["fc.weight"], published["fc.weight"].bfloat16().float())

    training.resume_from_published()
    assert all(
        torch.equal(published[name], master) for name, master in training.optimizer.masters.items()
    )


def test_bfloat16_resumes_to_the_same_bits(models, stream, tmp_path):
    """Through a checkpoint on disk: 17 steps, then 13 more in another trainer, against 30 in
    one.
    """
    whole, first, second = (
        open_training(models, tmp_path / name, "bfloat16") for name in ("a", "b", "c")
    )
    losses = train(whole, stream, 30)
    train(first, stream, 17)
    (tmp_path / "checkpoints").mkdir()
    save_checkpoint(tmp_path / "checkpoints", 17, *first.checkpoint(), keep=2)
    second.restore(load_newest(tmp_path / "checkpoints"), live=False)
    assert train(second, stream, 30, replayed=17) == losses[17:]
    (want, _), (got, _) = whole.checkpoint(), second.checkpoint()
    assert want.keys() == got.keys() and all(torch.equal(want[n], got[n]) for n in want)


def test_a_run_in_float32_goes_on_in_bfloat16(models, stream, tmp_path):
    exact = open_training(models, tmp_path / "a", "float32")
    train(exact, stream, 10)
    (tmp_path / "checkpoints").mkdir()
    save_checkpoint(tmp_path / "checkpoints", 10, *exact.checkpoint(), keep=2)
    rounded = open_training(models, tmp_path / "b", "bfloat16")
    rounded.restore(load_newest(tmp_path / "checkpoints"), live=False)
    for name, master in rounded.optimizer.masters.items():
        assert torch.equal(master, exact.optimizer.masters[name])
        assert torch.equal(dict(rounded.draft.named_parameters())[name], master.bfloat16())


@pytest.mark.parametrize(
    ("device", "dtype", "want"),
    [("cpu", "auto", "float32"), ("cuda", "auto", "bfloat16"), ("cpu", "bfloat16", "bfloat16")],
)
def test_auto_is_what_the_device_is_good_at(device, dtype, want):
    assert ModelConfig(target="t", draft="d", device=device, dtype=dtype).compute_dtype == want
