"""A rank other than 0: it does what rank 0 tells it, until it is told to stop."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aurora_trainer.drafts.kinds import rebuild
from aurora_trainer.drafts.target import TargetTensors, open_target
from aurora_trainer.intake.sample import Sample
from aurora_trainer.learn.learner import Learner
from aurora_trainer.learn.shares import LEARN, share_of
from aurora_trainer.ranks import Order, Ranks

if TYPE_CHECKING:
    from aurora_trainer.config import TrainerFile

log = logging.getLogger(__name__)


class Follower:
    """Stands where rank 0 has its Daemon. Raises ValueError if the target cannot be read."""

    def __init__(self, config: TrainerFile, ranks: Ranks):
        model = config.trainer.model
        dtype = getattr(torch, model.compute_dtype)
        self._tensors = TargetTensors(open_target(model.target), model.device, dtype)
        self._learner = Learner(config.trainer, ranks)
        self._ranks = ranks
        # those that rank 0 dealt to this one and may ask for again
        self._samples: dict[int, Sample] = {}

    def run_live(self, max_steps: int | None = None, record: Path | None = None) -> None:
        """Follow rank 0, which receives."""
        self._follow()

    def run_recording(
        self, path: Path, max_steps: int | None = None, *, original_pace: bool = False
    ) -> None:
        """Follow rank 0, which reads the recording."""
        self._follow()

    def _follow(self) -> None:
        # rank 0 heeds them, and needs the others for its last checkpoint
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        # rank 0 tells what all do
        logging.getLogger().setLevel(logging.WARNING)
        while (order := self._ranks.hear()).name != "stop":
            self._do(order)

    def _do(self, order: Order) -> None:
        learner = self._learner
        if order.name == LEARN:
            with self._ranks.together():
                share = share_of(order, self._samples)
            try:
                learner.learn([share])
            except Exception:
                # so does rank 0, which tries it again in parts
                learner.give_up()
        elif order.name == "start":
            with self._ranks.together():
                draft = rebuild(order.about["draft"], order.tensors, self._tensors)
            learner.start(draft)
        elif order.name == "restore":
            learner.restore({}, order.about["optimizer"], order.about["mean_began"], "")
        elif order.name == "begin_again":
            learner.begin_again()
        elif order.name == "snapshot":
            learner.snapshot({})
        elif order.name == "weights":
            learner.weights(order.about["role"])
        elif order.name == "finite":
            learner.finite(order.about["most"])
        elif order.name == "mean_draft":
            learner.mean_draft()
        else:
            assert order.name == "wait", order.name
