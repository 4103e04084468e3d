import pytest
import torch
from naive_draft import VARIANTS, make
from pydantic import ValidationError
from random_sample import random_sample

from aurora_trainer.drafts.batch import BatchConfig, pack
from aurora_trainer.learn.objective import LossConfig, objective


def double(batch):
    batch.features, batch.topk_logits, batch.logsumexp = (
        x.double() for x in (batch.features, batch.topk_logits, batch.logsumexp)
    )
    return batch


def naive_loss(draft, batch, config):
    """The formula of the objective, query by query, with all of the draft's vocabulary at once."""
    total = 0.0
    for d, (level, state) in enumerate(zip(batch.levels, draft.states(batch), strict=True)):
        terms = {True: [], False: []}
        for q in (level.target >= 0).nonzero()[:, 0].tolist():
            row = int(level.target[q])
            log_q = torch.log_softmax(draft.logits(state[q]), -1)
            ids, p = batch.topk_ids[row], (batch.topk_logits[row] - batch.logsumexp[row]).exp()
            mine = draft.draft_ids[ids]
            tail = 1 - p.sum()
            rest = torch.ones(len(log_q), dtype=torch.bool)
            rest[mine[mine >= 0]] = False
            p = torch.cat([p[mine >= 0], tail[None]]) / (p[mine >= 0].sum() + tail)
            log_q = torch.cat([log_q[mine[mine >= 0]], log_q[rest].logsumexp(0)[None]])
            w = level.reach[q] if config.rejected_by == "reach" and not level.accepted[q] else 1.0
            terms[bool(level.accepted[q])].append(w * (p * (p.log() - log_q)).sum())
        total = total + config.gamma**d * sum(terms[True]) / max(len(terms[True]), 1)
        total = total + config.gamma**d * config.rejected * sum(terms[False]) / max(
            len(terms[False]), 1
        )
    return total


@pytest.mark.parametrize("by", ["uniform", "reach"])
@pytest.mark.parametrize("name", ["plain", "reduced vocabulary"])
def test_the_objective_is_its_formula(name, by):
    draft = make(VARIANTS[name])
    batch = double(pack([random_sample(0), random_sample(1, topk=1)], BatchConfig()))
    config = LossConfig(distance={"forward_kl": 1.0}, gamma=0.7, rejected=0.6, rejected_by=by)
    loss, _ = objective(draft, batch, config)
    want = naive_loss(draft, batch, config)
    torch.testing.assert_close(loss, want, atol=1e-6, rtol=1e-6)
    parameters = list(draft.parameters())
    for a, b in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_micro_batches_add_up_to_one_batch():
    """A short sample weighs as many queries as it has, not as much as a long one."""
    draft, config = make(VARIANTS["plain"]), LossConfig(rejected=0.5)
    samples = [random_sample(0, verifies=1), random_sample(1, verifies=9), random_sample(2, topk=1)]
    parts = [double(pack([s], BatchConfig())) for s in samples]
    counts = sum(p.counts() for p in parts)
    whole, score = objective(draft, double(pack(samples, BatchConfig())), config)
    shares = [objective(draft, p, config, counts) for p in parts]
    torch.testing.assert_close(sum(loss for loss, _ in shares), whole)
    for name in ("count", "loss", "greedy_match", "overlap"):
        torch.testing.assert_close(sum(getattr(s, name) for _, s in shares), getattr(score, name))
    assert torch.equal(score.count, counts)


def test_scores_without_gradient_are_the_same():
    draft = make(VARIANTS["plain"])
    batch = double(pack([random_sample(0)], BatchConfig()))
    _, score = objective(draft, batch, LossConfig())
    with torch.no_grad():
        loss, again = objective(draft, batch, LossConfig())
    assert not loss.requires_grad and torch.equal(again.loss, score.loss)


def test_a_batch_without_any_target_costs_nothing():
    draft = make(VARIANTS["plain"])
    batch = double(pack([random_sample(0, verifies=0)], BatchConfig()))
    loss, score = objective(draft, batch, LossConfig(rejected=1.0))
    assert loss == 0 and score.mean("loss").isnan().all()
    loss.backward()
    assert not any(p.grad.any() for p in draft.parameters() if p.grad is not None)


def test_ids_outside_the_drafts_vocabulary_map_to_minus_one():
    draft = make(VARIANTS["reduced vocabulary"])
    mapped = draft.to_draft_ids(torch.tensor([[-1, *range(50)]]))[0]
    assert mapped[0] == -1 and (mapped[1:] >= 0).sum() == 20
    assert torch.equal(mapped[1:][mapped[1:] >= 0], torch.arange(20))


@pytest.mark.parametrize("bad", [{}, {"kl": 1.0}, {"tv": -1.0}])
def test_an_unknown_distance_is_refused(bad):
    with pytest.raises(ValidationError, match="distance"):
        LossConfig(distance=bad)
