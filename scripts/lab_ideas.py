"""What the trainer does not do, tried in the lab: each becomes the trainer's if it wins.

An idea is made with the Training of a run and may change it; it is told of every request.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence

import torch
from aurora_kernels.limits import E4M3_MAX
from torch import Tensor

from aurora_trainer.drafts.batch import Batch, BatchConfig, pack
from aurora_trainer.intake.sample import Sample
from aurora_trainer.learn import objective, trainer
from aurora_trainer.learn.accept_length import chains
from aurora_trainer.learn.trainer import Training


class Idea:
    def __init__(self, training: Training):
        self.training = training

    def request(self, sample: Sample) -> None:
        """A request came in, is scored already and is trained on next."""


class Float8Features(Idea):
    """Features as they would travel in a byte each: e4m3, with a scale for each position and
    layer. Scoring sees them whole, as the server does."""

    def request(self, sample: Sample) -> None:
        layers = self.training.draft.config.num_aux
        parts = sample.features.float().unflatten(1, (layers, -1))
        scale = parts.abs().amax(-1, keepdim=True).clamp_min(1e-12) / E4M3_MAX
        rounded = (parts / scale).to(torch.float8_e4m3fn).float() * scale
        sample.features = rounded.flatten(1).to(sample.features.dtype)


class OnlyKnown(Idea):
    """As the reference does: no loss where the target's first choice is a token that the draft
    cannot propose."""

    def __init__(self, training: Training):
        super().__init__(training)
        trainer.losses = self._losses

    def _losses(self, draft, batch, config, counts=None):
        known = draft.to_draft_ids(batch.topk_ids[:, 0]) >= 0
        weigh = objective._weight

        def weighed(level, depth, config, counts):
            return weigh(level, depth, config, counts) * known[level.target[level.rows]]

        objective._weight = weighed
        try:
            return objective.losses(draft, batch, config, counts)
        finally:
            objective._weight = weigh


class UsesByNeed(Idea):
    """Many passes over each sample at first, few later: uses(n) = clip(16 sqrt(50 / n), 2, 16) of
    request n, where the arm's own pace stands for 8."""

    def __init__(self, training: Training):
        super().__init__(training)
        self._requests = 0
        self._own = training.config.trainer.pace.new_positions_per_step

    def request(self, sample: Sample) -> None:
        self._requests += 1
        uses = min(16.0, max(2.0, 16 * math.sqrt(50 / self._requests)))
        config = self.training.config
        pace = config.trainer.pace.model_copy(
            update={"new_positions_per_step": round(self._own * 8 / uses)}
        )
        own = config.trainer.model_copy(update={"pace": pace})
        self.training.config = config.model_copy(update={"trainer": own})


class Anchored(Idea):
    """Weights anchored at the first rejection (Draft training as verification sees it, "VAT"): of
    every position, depths up to the first wrong choice weigh 1, those behind it
    gamma^(depths behind it). Which choice was the first wrong one is of the sample's last visit;
    of its first visit, depth 0. One mean over all depths."""

    def __init__(self, training: Training):
        super().__init__(training)
        # of a sample's level-0 positions: the first wrong depth
        self._by_id: dict[int, Tensor] = {}
        self._samples: Sequence[Sample] = ()
        trainer.pack, trainer.losses = self._pack, self._losses

    def _pack(self, samples: Sequence[Sample], config: BatchConfig) -> Batch:
        self._samples = samples
        return pack(samples, config)

    def _losses(self, draft, batch, config, counts=None):
        owner = batch.base_sample
        first_wrong = torch.zeros(len(owner), dtype=torch.int64)
        for n, sample in enumerate(self._samples):
            if (held := self._by_id.get(id(sample))) is not None:
                first_wrong[owner == n] = held
        weights = [
            config.gamma ** (d - first_wrong[level.base[level.rows]]).clamp_min(0).float()
            for d, level in enumerate(batch.levels)
        ]
        whole = sum(config.gamma**d for d in range(len(weights)))
        scale = whole / sum(float(w.sum()) for w in weights)
        given = iter([w * scale for w in weights])
        kept, objective._weight = objective._weight, lambda *_: next(given)
        try:
            found = objective.losses(draft, batch, config, counts)
        finally:
            objective._weight = kept
        match = chains(draft, batch, found).match
        run = match.long().cumprod(1).sum(1)
        for n, sample in enumerate(self._samples):
            if id(sample) not in self._by_id:
                weakref.finalize(sample, self._by_id.pop, id(sample), None)
            self._by_id[id(sample)] = run[owner == n]
        return found


IDEAS: dict[str, Callable[[Training], Idea]] = {
    "only_known": OnlyKnown,
    "uses_by_need": UsesByNeed,
    "anchored": Anchored,
    "float8_features": Float8Features,
}
