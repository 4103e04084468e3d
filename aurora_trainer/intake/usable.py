"""Whether training can use a sample."""

from __future__ import annotations

from collections import Counter

from aurora_trainer.intake.sample import Sample


def unusable(sample: Sample, feature_width: int, vocab_size: int, rows: Counter[str]) -> str | None:
    """A cause, or None; counts its generated positions in `rows`: with_target, altered.

    Too large an id would index out of the embedding.
    """
    if sample.features.shape[1] != feature_width:
        return "wrong_feature_width"
    ids = [t for t in (sample.tokens, sample.node_token, sample.topk_ids) if t.numel()]
    if any(int(t.max()) >= vocab_size for t in ids):
        return "token_out_of_vocabulary"
    generated = int((sample.position_node >= 0).sum())
    if sample.num_steps < 1 or not generated:
        return "without_targets"
    targets = int(sample.has_target.sum())
    rows["with_target"] += targets
    rows["altered"] += generated - targets
    return None if targets else "altered"
