"""The trainer's numbers do not change: 20 steps over a recording with kernels are those with the
references.

Losses of all steps agree within the first TOLERANCE (relative). Final weights differ by at most the
second one of how far training moved them, both as the norm over all of them, not element by
element: AdamW turns the sign of a gradient near zero into a whole step. In the interpreter two
cases run, on a few positions a step; on a GPU all, on more positions.
"""

import aurora_kernels.tree_attention
import aurora_kernels.tree_loss
import pytest
import torch
from models import make_random_target
from traffic import write_trace

from aurora_sglang_plugin.weights.manifest import target_fingerprint
from aurora_trainer.config import load_trainer_config
from aurora_trainer.drafts.eagle3_init import init_draft
from aurora_trainer.learn.trainer import Training
from aurora_trainer.recordings.recording import read_messages

STEPS, VOCAB, HIDDEN = 20, 100, 128
# (losses, weights); found in the interpreter: 7e-7 and 3e-6, 3e-3 and 1e-2
TOLERANCE = {
    ("cpu", "float32"): (1e-5, 1e-4),
    ("cpu", "bfloat16"): (2e-2, 0.05),
    ("cuda", "float32"): (1e-4, 1e-2),
    ("cuda", "bfloat16"): (2e-2, 0.3),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A target of heads of 64, a draft with half its vocabulary, and a recording."""
    site = tmp_path_factory.mktemp("site")
    target = make_random_target(site / "target", vocab=VOCAB, hidden=HIDDEN, heads=2, kv_heads=1)
    counts = torch.rand(VOCAB, generator=torch.Generator().manual_seed(0))
    init_draft(target, site / "whole", "random")
    init_draft(target, site / "reduced", "random", draft_vocab=VOCAB // 2, token_counts=counts)
    about = {"target": target_fingerprint(target), "vocab": VOCAB, "features": 3 * HIDDEN}
    write_trace(site / "recording", requests=2 * STEPS, outputs=24, **about)
    write_trace(site / "small", requests=STEPS + 2, outputs=4, **about)
    return site


def train(
    site, out, draft, dtype, device, small: bool
) -> tuple[list[float], torch.Tensor, torch.Tensor]:
    """(loss of each step, all masters before training, and after it)."""
    settings = {
        "weights.directory": out,
        "trainer.model.target": site / "target",
        "trainer.model.draft": site / draft,
        "trainer.model.device": device,
        "trainer.model.dtype": dtype,
        "trainer.pace.new_positions_per_step": 4 if small else 24,
        "trainer.batch.max_positions": 16 if small else 512,
        "trainer.gate.enabled": False,
        # or the trees are left out
        "trainer.loss.rejected": 0.3,
        "trainer.loss.rejected_by": "reach",
        "trainer.optimizer.lr": 3e-3,
    }
    training = Training(load_trainer_config(None, [f"{k}={v}" for k, v in settings.items()]))

    def weights() -> torch.Tensor:
        return torch.cat([m.detach().cpu().flatten() for m in training.optimizer.masters.values()])

    before, losses = weights(), []
    for record, message in read_messages(site / ("small" if small else "recording")):
        training.feed(message, record.record)
        while training.due() and training.steps < STEPS:
            losses.append(training.step().update.loss)
    assert training.updates == STEPS and training.optimizer.skipped == 0
    training.close()
    return losses, before, weights()


def only(monkeypatch, kernels: bool) -> None:
    """Kernels in every operation of a step, or none: what should not run raises."""

    def refused(*_, **__):
        raise AssertionError("a reference ran where kernels should")

    for module, reference in (
        (aurora_kernels.tree_attention, "tree_attention_ref"),
        (aurora_kernels.tree_loss, "tree_loss_ref"),
    ):
        if kernels:
            monkeypatch.setattr(module, reference, refused)
        else:
            monkeypatch.setattr(module, "use_kernels", lambda x: False)


@pytest.mark.parametrize("draft", ["whole", "reduced"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_twenty_steps_with_kernels_are_those_with_references(dtype, draft, site, device, tmp_path):
    if (small := device == "cpu") and (dtype, draft) not in (
        ("float32", "reduced"),
        ("bfloat16", "whole"),
    ):
        pytest.skip("takes minutes in the interpreter")
    with pytest.MonkeyPatch.context() as patch:
        only(patch, kernels=False)
        want, start, end = train(site, tmp_path / "references", draft, dtype, device, small)
    with pytest.MonkeyPatch.context() as patch:
        only(patch, kernels=True)
        got, same_start, other_end = train(site, tmp_path / "kernels", draft, dtype, device, small)
    assert torch.equal(start, same_start)
    # it learns, so there is something to agree on
    assert want[-1] < 0.9 * want[0]
    loss_error = max(abs(a - b) / abs(a) for a, b in zip(want, got, strict=True))
    moved = (end - start).norm()
    weight_error = float((end - other_end).norm() / moved)
    print(
        f"{dtype} {draft} on {device}: loss error {loss_error:.1e}, weights {weight_error:.1e} of"
        " what they moved"
    )
    losses_within, weights_within = TOLERANCE[device, dtype]
    assert loss_error <= losses_within and weight_error <= weights_within
