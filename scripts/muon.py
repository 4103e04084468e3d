"""Muon: momentum whose update is orthogonalised, for the matrices of a network (Jordan et al.,
2024).

The update of a weight [out, in] is U V^T of its momentum's singular value decomposition, found by
five Newton-Schulz steps. It is for matrices only: vectors and embeddings stay with AdamW.
"""

from __future__ import annotations

import torch


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values end in 0.7 to 1.2.

    Shape [K, rows, columns].
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Takes 2-D parameters only.

    `lr` is the size of an update per unit of root-mean-square weight, as for AdamW.
    """

    def __init__(
        self, params, lr: float, momentum=0.95, weight_decay=0.0, compute_dtype=torch.float32
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        # of the orthogonalisation; bfloat16 is enough
        self.compute_dtype = compute_dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                self._step_alike(parameters, shape, group)

    def _step_alike(self, parameters: list[torch.Tensor], shape: torch.Size, group: dict) -> None:
        nesterov = []
        for parameter in parameters:
            momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            momentum.lerp_(parameter.grad, 1 - group["momentum"])
            nesterov.append(parameter.grad.lerp(momentum, group["momentum"]))
        # An orthogonal update has a root-mean-square of 1 / sqrt(max(shape)); 0.2 is AdamW's
        # typical one.
        scale = 0.2 * max(shape) ** 0.5
        updates = orthogonalize(torch.stack(nesterov).to(self.compute_dtype))
        for parameter, update in zip(parameters, updates, strict=True):
            update = update.to(parameter.dtype)
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(
                update, alpha=-group["lr"] * scale
            )
