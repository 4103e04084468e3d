import pytest
import torch

from aurora_trainer.drafts import vocab


def test_offsets_ids_and_mask_say_the_same():
    counts = torch.tensor([5, 0, 9, 9, 1, 0])
    d2t = vocab.most_frequent(counts, 3)
    assert vocab.target_ids(d2t).tolist() == [0, 2, 3]
    assert vocab.draft_ids(d2t, 6).tolist() == [0, -1, 1, 2, -1, -1]
    assert vocab.mask(d2t, 6).tolist() == [True, False, True, True, False, False]
    vocab.check(d2t, 3, 6)


def test_kept_tokens_displace_frequent_ones_and_ties_go_to_lower_ids():
    assert vocab.target_ids(
        vocab.most_frequent(torch.tensor([5, 0, 9, 9, 1, 0]), 2, keep=(5,))
    ).tolist() == [2, 5]
    assert vocab.target_ids(vocab.most_frequent(torch.zeros(6), 3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("d2t", [[0, 0], [0, -1, 0], [-1, 0, 0], [0, 0, 4]])
def test_offsets_that_are_not_a_vocabulary_are_refused(d2t):
    with pytest.raises(ValueError):
        vocab.check(torch.tensor(d2t), 3, 6)


def test_a_size_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="expected 2 .* to 6"):
        vocab.most_frequent(torch.zeros(6), 1, keep=(0, 1))
