"""One update of the draft: clip, refuse what is not finite, schedule, AdamW or Muon on float32
masters.

Masters and moments are float32 whatever the draft computes in (bf16 masters would freeze the norms
at 1.0). Where the draft computes in float32 the parameters are the masters. Everything that a
resumed run needs is in flat tensors and a small JSON-able dict, and resuming from them is
bit-exact. With several ranks each holds and updates only rows of its own (shards.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim.adamw import adamw

from aurora_sglang_plugin.config import Section
from aurora_trainer.drafts.kinds import ENDS, HEAD
from aurora_trainer.learn.shards import Shards
from aurora_trainer.ranks import Ranks

# of learning rates that nobody chose
HIGHEST, PER_WIDTH = 1e-3, 0.45
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """How the draft is updated. Rates are relative to one update, whatever its size in tokens."""

    # muon: matrices but those at either end of the draft, in bfloat16, which is slow on a CPU that
    # lacks it; the rest by AdamW
    kind: Literal["adamw", "muon"] = "adamw"
    # learning rate; auto: 0.45 over the draft's width (5e-4 at 896, 1.1e-4 at 4096), at most 1e-3,
    # and 1e-3 for muon
    lr: Positive | Literal["auto"] = "auto"
    # factor on lr for the draft's head
    head_lr: Positive = 1.0
    # AdamW
    beta1: Fraction = 0.9
    # AdamW
    beta2: Fraction = 0.95
    # AdamW
    eps: Positive = 1e-8
    # Muon
    momentum: Fraction = 0.95
    # of matrices, decoupled
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    # of the whole gradient
    clip_norm: Positive = 1.0
    # what is published is a running mean of about 1 / (1 - average) updates; 0: the weights
    average: Fraction = 0.0
    # updates over which the rate rises to `lr`
    warmup_updates: Annotated[int, Field(ge=0)] = 10
    # `constant` or `cosine`
    schedule: Literal["constant", "cosine"] = "constant"
    # to the end of the cosine
    cosine_updates: Annotated[int, Field(gt=0)] = 10_000
    # factor on lr at the end of the cosine
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.1

    def peak(self, width: int) -> float:
        """The learning rate after warm-up, of a draft of this width. A wider one wants less, about
        in proportion: 5e-4 won at 896 (docs/learning.md), others train 4,096 at 5e-5 to 1e-4."""
        if self.lr != "auto":
            return self.lr
        return HIGHEST if self.kind == "muon" else min(HIGHEST, PER_WIDTH / max(1, width))


@dataclass(frozen=True)
class Update:
    """What `Optimizer.step` did, e.g. Update(applied=True, grad_norm=0.7, lr=1e-3, loss=2.1)."""

    # False: loss or gradient was not finite, nothing changed
    applied: bool
    # before clipping
    grad_norm: float
    lr: float
    loss: float


class Optimizer:
    """State of the updates of one draft. `updates` counts applied ones, `skipped` refused ones.

    `masters` are float32, by name, this rank's rows; the draft's parameters are their rounding, or
    they themselves. Given are those to start from, None: the draft's own values. `width` is the
    draft's, for a learning rate that nobody chose.
    """

    def __init__(
        self,
        draft: nn.Module,
        config: OptimizerConfig,
        masters: Mapping[str, Tensor] | None = None,
        width: int = 1,
        ranks: Ranks | None = None,
    ):
        self.config, self._peak = config, config.peak(width)
        self.parameters = {n: p for n, p in draft.named_parameters() if p.requires_grad}
        self.updates = 0
        self.skipped = 0
        # updates at which the schedule began
        self.began = 0
        shapes = {n: p.shape for n, p in self.parameters.items()}
        self.shards = Shards(ranks or Ranks(), shapes, self._orthogonal)
        self.masters = {
            n: (
                self.shards.own(n, p.data)
                if p.dtype == torch.float32
                else self.shards.own(n, (masters or {}).get(n, p).detach()).to(
                    p.device, torch.float32
                )
            )
            for n, p in self.parameters.items()
        }
        self._first = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        self._second = {
            n: torch.zeros_like(m) for n, m in self.masters.items() if not self._orthogonal(n)
        }
        matrices = {n: m for n, m in self.masters.items() if self._orthogonal(n) and len(m)}
        self._muon: torch.optim.Muon | None = None
        if matrices:
            # an update as large as AdamW's, so that both take the same lr (Liu et al., "Muon is
            # scalable", 2025)
            self._muon = torch.optim.Muon(
                list(matrices.values()), momentum=config.momentum, adjust_lr_fn="match_rms_adamw"
            )
            for name, master in matrices.items():
                self._muon.state[master]["momentum_buffer"] = self._first[name]

    def step(self, loss: Tensor | float) -> Update:
        """Apply the gradients accumulated in the parameters, whose objective was `loss`; clear them
        either way. All ranks call it together; gradients add up to that of `loss`.

        Waits for the device once, to read the loss and the gradient's norm.
        """
        gradients: dict[str, Tensor] = {}
        several = self.shards.ranks.size > 1
        for name, p in self.parameters.items():
            gradient, p.grad = p.grad, None
            if gradient is not None or several:
                gradients[name] = torch.zeros_like(p) if gradient is None else gradient
            del gradient
        gradients = self.shards.summed(gradients)
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients.values()]
        whole = torch.stack(norms).norm() if norms else torch.zeros(())
        if several:
            whole = self.shards.ranks.sum_(whole.square()).sqrt()
        value, norm = torch.stack([torch.as_tensor(loss).detach().to(whole), whole]).tolist()
        lr = self._peak * schedule(self.config, self.updates - self.began)
        if not (math.isfinite(value) and math.isfinite(norm)):
            self.skipped += 1
            return Update(False, norm, lr, value)
        clip = min(1.0, self.config.clip_norm / (norm + 1e-6))
        self.updates += 1
        with torch.no_grad():
            # one float32 gradient at a time
            for name in list(gradients):
                self._apply(name, gradients.pop(name).float().mul_(clip), lr)
            self._spread()
        return Update(True, norm, lr, value)

    def warm_up_again(self) -> None:
        """Begin the schedule again, if the rate fell by it: to the peak, and down from there. A
        constant rate is at its peak."""
        if self.config.schedule != "constant":
            self.began = self.updates

    def _orthogonal(self, name: str) -> bool:
        matrix = self.parameters[name].dim() == 2 and not name.startswith(ENDS)
        return self.config.kind == "muon" and matrix

    def _apply(self, name: str, gradient: Tensor, lr: float) -> None:
        c, master, first = self.config, self.masters[name], self._first[name]
        if not len(master):
            return
        decay = c.weight_decay if master.dim() == 2 else 0.0
        if self._muon is not None and self._orthogonal(name):
            # it passes over the masters without a gradient
            self._muon.param_groups[0] |= {"lr": lr, "weight_decay": decay}
            master.grad = gradient
            self._muon.step()
            master.grad = None
        else:
            # one pass over the tensors; on a CPU it takes a ninth of the time of the same formulas
            # one by one
            before = torch.full((), self.updates - 1.0, device=master.device)
            adamw(
                [master], [gradient], [first], [self._second[name]], [], [before], fused=True,
                amsgrad=False,
                beta1=c.beta1, beta2=c.beta2,
                lr=lr * (c.head_lr if name.startswith(HEAD) else 1.0),
                weight_decay=decay, eps=c.eps, maximize=False,
            )  # fmt: skip

    def _spread(self) -> None:
        """The parameters, from the masters of all ranks."""
        parameters = {name: p.data for name, p in self.parameters.items()}
        for name, parameter in parameters.items():
            if parameter.dtype != torch.float32:
                self.shards.own(name, parameter).copy_(self.masters[name])
        self.shards.spread_(parameters)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, rest): masters and moments, this rank's rows, as the next step changes them; a
        JSON-able dict."""
        return self._tensors(), {
            "kind": self.config.kind,
            "updates": self.updates,
            "skipped": self.skipped,
            "began": self.began,
        }

    def _tensors(self) -> dict[str, Tensor]:
        parts = {"master": self.masters, "first": self._first, "second": self._second}
        return {f"{part}.{name}": t for part, held in parts.items() for name, t in held.items()}

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of `state_dict`, whole at rank 0; all ranks go through it together."""
        for key, rows in self._tensors().items():
            yield key, self.shards.gathered(key.partition(".")[2], rows)

    def check(self, tensors: Mapping[str, Tensor], rest: dict[str, Any]) -> None:
        """Raises ValueError for the state of something else."""
        own = self._tensors()
        if rest["kind"] != self.config.kind or own.keys() != tensors.keys():
            raise ValueError(
                f"optimizer state is of kind {rest['kind']} with {len(tensors)} tensors, this run's"
                f" is {self.config.kind} with {len(own)}; resume with the configuration that it was"
                " made with"
            )
        for name, tensor in tensors.items():
            shape = self.shards.shapes[name.partition(".")[2]]
            if tensor.shape != shape:
                raise ValueError(
                    f"optimizer state: {name} is {tuple(tensor.shape)}, expected {tuple(shape)}"
                )

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor] | None, rest: dict[str, Any]) -> None:
        """Restore in place, the draft's parameters included. All ranks call it together, rank 0
        with whole tensors, the others with None.

        Raises ValueError for the state of something else.
        """
        if tensors is not None:
            self.check(tensors, rest)
        for key, rows in self._tensors().items():
            whole = None if tensors is None else tensors[key]
            self.shards.scatter_(key.partition(".")[2], whole, rows)
        self._spread()
        self.updates, self.skipped = rest["updates"], rest["skipped"]
        self.began = rest.get("began", 0)


def schedule(config: OptimizerConfig, updates: int) -> float:
    """Share of the learning rate of the update that follows `updates` applied ones: linear warm-up,
    then constant or cosine.
    """
    warm = min(1.0, (updates + 1) / (config.warmup_updates + 1))
    if config.schedule == "constant":
        return warm
    done = min(1.0, updates / config.cosine_updates)
    return warm * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))
