import copy
import json
import math

import pytest
import torch
from naive_draft import VARIANTS, make
from random_sample import random_sample
from safetensors.torch import load, save

from aurora_trainer.drafts.batch import BatchConfig, pack
from aurora_trainer.learn.objective import LossConfig, objective
from aurora_trainer.learn.optimizer import Optimizer, OptimizerConfig, schedule

KINDS = ["adamw", "muon"]


def train(draft, optimizer, seeds):
    losses = []
    for seed in seeds:
        loss, _ = objective(draft, pack([random_sample(seed)], BatchConfig()), LossConfig())
        loss.backward()
        losses.append(loss.item())
        optimizer.step(loss.item())
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(kind):
    draft = make(VARIANTS["plain"], torch.float32)
    losses = train(draft, Optimizer(draft, OptimizerConfig(kind=kind, lr=1e-2)), [0] * 30)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact(kind, dtype):
    """Through bytes: 4 updates, save, load into a fresh draft and optimizer, 4 more, against 8 in
    one run.
    """
    config = OptimizerConfig(
        kind=kind, warmup_updates=6, schedule="cosine", cosine_updates=9, weight_decay=0.1
    )
    whole = make(VARIANTS["plain"], dtype)
    train(whole, optimizer := Optimizer(whole, config), range(4))
    tensors, rest = optimizer.state_dict()
    stored = save(tensors), json.dumps(rest)
    train(whole, optimizer, range(4, 8))

    resumed = make(VARIANTS["plain"], dtype)
    with torch.no_grad():
        for p in resumed.parameters():
            p.zero_()
    again = Optimizer(resumed, config)
    again.load_state_dict(load(stored[0]), json.loads(stored[1]))
    train(resumed, again, range(4, 8))
    assert again.updates == 8
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    (a, _), (b, _) = optimizer.state_dict(), again.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_adamw_is_torchs():
    ours, theirs = make(VARIANTS["plain"], torch.float32), make(VARIANTS["plain"], torch.float32)
    config = OptimizerConfig(lr=3e-3, warmup_updates=0, clip_norm=0.5, weight_decay=0.1)
    optimizer = Optimizer(ours, config)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    for seed in range(5):
        train(ours, optimizer, [seed])
        objective(theirs, pack([random_sample(seed)], BatchConfig()), LossConfig())[0].backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
        reference.zero_grad()
    for (name, a), b in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(
            a, b[1], atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_a_norm_in_bfloat16_moves_through_its_master():
    """An update of 1e-4 is below bfloat16's resolution at 1.0; a hundred of them are not."""
    layer = torch.nn.LayerNorm(4, bias=False).to(torch.bfloat16)
    optimizer = Optimizer(layer, OptimizerConfig(lr=1e-4, warmup_updates=0))
    for _ in range(100):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step(1.0)
    assert (layer.weight < 1).all() and layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("loss", [1.0, math.nan, math.inf])
def test_what_is_not_finite_is_skipped_and_counted(loss):
    draft = make(VARIANTS["plain"], torch.float32)
    optimizer = Optimizer(draft, OptimizerConfig())
    train(draft, optimizer, [0])
    before, (state, _) = copy.deepcopy((draft.checkpoint(), optimizer.state_dict()))
    draft.norm.weight.grad = torch.full_like(draft.norm.weight, math.nan if loss == 1.0 else 1.0)
    update = optimizer.step(loss)
    assert not update.applied and (optimizer.skipped, optimizer.updates) == (1, 1)
    assert all(torch.equal(before[n], t) for n, t in draft.checkpoint().items())
    assert all(torch.equal(state[n], t) for n, t in optimizer.state_dict()[0].items())
    assert draft.norm.weight.grad is None


def test_the_gradient_is_clipped_as_a_whole():
    layer = torch.nn.Linear(3, 2, bias=True)
    optimizer = Optimizer(layer, OptimizerConfig(clip_norm=0.5, beta1=0.0))
    layer.weight.grad, layer.bias.grad = torch.full((2, 3), 3.0), torch.full((2,), 4.0)
    assert optimizer.step(0.0).grad_norm == pytest.approx((6 * 9 + 2 * 16) ** 0.5)
    first = [t for n, t in optimizer.state_dict()[0].items() if n.startswith("first")]
    assert torch.cat([t.flatten() for t in first]).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_schedule():
    config = OptimizerConfig(
        lr=1.0, warmup_updates=3, schedule="cosine", cosine_updates=100, final_lr=0.1
    )
    assert schedule(config, 0) == pytest.approx(0.25)
    assert schedule(config, 50) == pytest.approx(0.55)
    assert schedule(config, 100) == schedule(config, 500) == pytest.approx(0.1)
    assert schedule(OptimizerConfig(lr=2.0, warmup_updates=0), 9) == 1.0


def test_a_rate_that_nobody_chose_follows_the_width():
    auto = OptimizerConfig()
    assert auto.peak(896) == pytest.approx(5e-4, rel=0.01)
    assert auto.peak(4096) == pytest.approx(1.1e-4, rel=0.01) and auto.peak(64) == 1e-3
    assert OptimizerConfig(kind="muon").peak(4096) == 1e-3
    assert OptimizerConfig(lr=2.0).peak(4096) == OptimizerConfig(lr=2.0).peak(64) == 2.0
    layer = torch.nn.Linear(3, 2)
    optimizer = Optimizer(layer, OptimizerConfig(warmup_updates=0), width=4096)
    layer.weight.grad = torch.ones_like(layer.weight)
    assert optimizer.step(1.0).lr == auto.peak(4096)


@pytest.mark.parametrize("shape", [(8, 8), (4, 20), (20, 4)])
def test_muon_keeps_a_gradients_directions_and_evens_their_sizes(shape):
    """torch orthogonalizes in bfloat16: 3% of another direction may come in."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    optimizer = Optimizer(layer, OptimizerConfig(kind="muon", lr=0.5, warmup_updates=0))
    before, layer.weight.grad = layer.weight.detach().clone(), gradient.clone()
    optimizer.step(0.0)
    # relative to lr as large as an AdamW update
    update = (before - layer.weight.detach()) / (0.5 * 0.2 * max(shape) ** 0.5)
    got = u.T @ update @ v.T
    assert (got.diagonal() > 0.5).all() and (got.diagonal() < 1.3).all()
    assert (got - got.diagonal().diag()).abs().max() < 3e-2


def test_muon_decays_matrices_apart_from_their_update():
    layer = torch.nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    config = OptimizerConfig(kind="muon", lr=0.1, weight_decay=0.5, warmup_updates=0)
    optimizer = Optimizer(layer, config)
    layer.weight.grad = torch.zeros(2, 3)
    optimizer.step(0.0)
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.1 * 0.5))


def test_the_state_of_another_run_is_refused():
    draft = make(VARIANTS["plain"], torch.float32)
    state = Optimizer(draft, OptimizerConfig(kind="adamw")).state_dict()
    with pytest.raises(ValueError, match="kind adamw"):
        Optimizer(draft, OptimizerConfig(kind="muon")).load_state_dict(*state)
    with pytest.raises(ValueError, match="expected"):
        other = make(VARIANTS["reduced vocabulary"], torch.float32)
        Optimizer(other, OptimizerConfig(kind="adamw")).load_state_dict(*state)


def test_steps_too_small_for_bfloat16_add_up():
    """Beside 1.0 bfloat16 knows 0.996: a norm's weight that steps by 1e-3 would never leave 1.0
    without its master.
    """
    norm = torch.nn.Module()
    norm.weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Optimizer(norm, OptimizerConfig(lr=1e-3, warmup_updates=0))
    for _ in range(10):
        norm.weight.grad = torch.ones_like(norm.weight)
        optimizer.step(0.0)
    torch.testing.assert_close(
        optimizer.masters["weight"], torch.full((4,), 0.99), atol=1e-5, rtol=0
    )
    assert (
        torch.equal(norm.weight, optimizer.masters["weight"].bfloat16()) and (norm.weight < 1).all()
    )


def test_given_masters_are_taken_unrounded():
    norm = torch.nn.Module()
    norm.weight = torch.nn.Parameter(torch.full((4,), 1.001).bfloat16())
    assert (
        Optimizer(norm, OptimizerConfig(), {"weight": torch.full((4,), 1.001)}).masters["weight"]
        == 1.001
    ).all()
