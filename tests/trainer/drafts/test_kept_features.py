"""Features are sent to a device once for as long as their sample lives. `meta` stands for the
device, which is not there."""

import pytest
import torch
from random_sample import random_sample

from aurora_trainer.drafts import kept_features
from aurora_trainer.drafts.batch import BatchConfig, pack


@pytest.fixture
def sent(monkeypatch):
    sizes, upload = [], kept_features.upload

    def counted(tensors, device):
        sizes.extend(t.nbytes for t in tensors)
        return upload(tensors, device)

    monkeypatch.setattr(kept_features, "upload", counted)
    return sizes


def test_features_are_sent_once_and_go_with_their_sample(sent):
    kept = kept_features.KeptFeatures("meta")
    samples = [random_sample(i) for i in range(6)]
    whole = [s.features.nbytes for s in samples]
    for first in (0, 2, 0):
        batch = pack(samples[first : first + 4], BatchConfig(), kept.of(samples[first : first + 4]))
        plain = pack(samples[first : first + 4], BatchConfig())
        moved = batch.to("meta")
        assert moved.features is batch.features and moved.features.is_meta
        assert moved.features.shape == plain.features.shape
        assert moved.topk_logits.is_meta and not batch.topk_logits.is_meta
        assert torch.equal(batch.levels[1].parent, plain.levels[1].parent)
        # what is counted on the batch is counted on the host
        assert torch.equal(moved.counts(), plain.counts())
    assert sent == whole and kept.nbytes == sum(whole)
    del samples[1:]
    assert kept.nbytes == whole[0]
    kept.clear()
    kept.of(samples)
    assert sent == [*whole, whole[0]]
    # a second life of the finalizer's key must not take what is new
    del samples[:]
    assert kept.nbytes == 0


def test_on_the_cpu_nothing_is_kept(sent):
    assert kept_features.KeptFeatures("cpu").of([random_sample(0)]) is None and not sent
