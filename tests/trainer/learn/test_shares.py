"""A batch is dealt evenly and whole, a sample travels once, and what arrives is what was sent."""

import random

import torch
from random_sample import random_sample

from aurora_trainer.learn.shares import LEARN, TENSORS, Dealer, share_of
from aurora_trainer.ranks import _packed, _unpacked


def same(a, b) -> bool:
    others = [n for n in vars(a) if n not in TENSORS]
    return all(getattr(a, n) == getattr(b, n) for n in others) and all(
        getattr(a, n).dtype == getattr(b, n).dtype and torch.equal(getattr(a, n), getattr(b, n))
        for n in TENSORS
    )


def test_shares_are_even_whole_and_travel_once():
    dealer, rng = Dealer(3), random.Random(0)
    samples = [random_sample(i, verifies=rng.randint(1, 40), topk=1, width=1) for i in range(24)]
    samples[3].features = samples[3].features.bfloat16()
    held: list[dict] = [{}, {}, {}]
    seen: set[int] = set()
    bytes_sent = []
    for number in range(12):
        # half of it is new, as the buffer draws it
        new = samples[2 * number : 2 * number + 2]
        batch = rng.sample(samples[: 2 * number], min(6, 2 * number)) + new
        shares = dealer.deal(batch, new, depth=3, before=True, after=number % 2 == 0)
        got = []
        for rank, share in enumerate(shares):
            packed = _packed(share.order())
            bytes_sent.append(len(packed))
            order = _unpacked(packed)
            assert order.name == LEARN
            there = share_of(order, held[rank])
            assert [*map(same, there.samples, share.samples)] == [True] * len(share.samples)
            assert (there.unseen, there.depth, there.before, there.after) == (
                share.unseen, 3, True, number % 2 == 0,
            )  # fmt: skip
            assert [share.samples[n] for n in share.unseen] == [
                s for s in share.samples if any(s is n for n in new)
            ]
            assert not seen & set(share.new)
            seen |= set(share.new)
            got += share.samples
        assert sorted(map(id, got)) == sorted(map(id, batch))
        del shares, got, share, there, order, batch, new
    assert seen == set(range(24)) and sum(map(len, held)) == 24
    # those that the buffer let go of are let go of by the ranks with their next share
    del samples[:20]
    for rank, share in enumerate(dealer.deal(samples, [], 3, False, False)):
        share_of(_unpacked(_packed(share.order())), held[rank])
    assert sum(map(len, held)) == len(samples) == 4


def test_fresh_samples_even_out_what_repeats_do_not():
    dealer, longest = Dealer(2), 0
    batch = [random_sample(i, verifies=20, topk=1, width=1) for i in range(9)]
    for share in dealer.deal(batch, batch, 3, False, False):
        longest = max(longest, sum(len(s.features) for s in share.samples))
    whole = sum(len(s.features) for s in batch)
    assert longest <= whole / 2 + max(len(s.features) for s in batch)
