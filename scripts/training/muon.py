"""Muon: momentum whose matrix update is replaced by the nearest semi-orthogonal matrix (Jordan et al., 2024)."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steep at zero: singular values land in about [0.7, 1.2], not on 1


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly orthogonal matrices with the singular directions of `matrices` [G, rows, columns]; in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay; matrices of one shape go through together."""

    def __init__(self, matrices: Iterable[Tensor], lr: float, *, momentum: float = 0.95, weight_decay: float) -> None:
        by_shape = defaultdict(list)
        for matrix in matrices:
            by_shape[tuple(matrix.shape)].append(matrix)
        groups = [{"params": params} for params in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            matrices = group["params"]
            gradient = torch.stack([matrix.grad for matrix in matrices])  # [G, rows, columns]
            state = self.state[matrices[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradient)
            momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
            update = orthogonalised(gradient.lerp(momentum, group["momentum"])).to(gradient.dtype)
            rows, columns = matrices[0].shape
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, update.unbind(), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
