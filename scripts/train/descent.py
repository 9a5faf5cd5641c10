"""The optimisers that train the small networks, and the running average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

EMA_DECAY = 0.999


class Muon:
    """Momentum that is orthogonalised before each step (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon) and scaled to Adam's step size (Liu et al. 2025,
    https://arxiv.org/abs/2502.16982). A convolution counts as a matrix ``(out, in * kH * kW)``.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.state = [(parameter, torch.zeros_like(parameter)) for parameter in parameters]

    @torch.no_grad()
    def step(self, rate: float, pool: ThreadPoolExecutor) -> None:
        list(pool.map(lambda pair: self._move(*pair, rate), self.state))

    def _move(self, parameter: nn.Parameter, momentum: Tensor, rate: float) -> None:
        with torch.no_grad():
            assert parameter.grad is not None
            momentum.lerp_(parameter.grad, 0.05)
            update = parameter.grad.lerp(momentum, 0.95).flatten(1)
            tall = update.shape[0] > update.shape[1]
            x = update.T if tall else update
            x = x / (x.norm() + 1e-12)
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            x = (x.T if tall else x).reshape(parameter.shape)
            parameter.sub_(x, alpha=rate * 0.2 * math.sqrt(max(update.shape)))


class Descent:
    """Muon for a network's large matrices and AdamW for its other parameters, on the mean of the
    workers' gradients."""

    def __init__(self, network: nn.Module, pool: ThreadPoolExecutor) -> None:
        self.parameters = list(network.parameters())
        wide = [p.ndim > 1 and min(p.shape[:2]) >= 32 for p in self.parameters]
        self.muon = Muon([p for p, is_wide in zip(self.parameters, wide, strict=True) if is_wide])
        rest = [p for p, is_wide in zip(self.parameters, wide, strict=True) if not is_wide]
        self.adam = torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.0)
        self.pool = pool

    def step(self, gradients: Iterable[tuple[Tensor, ...]], rate: float) -> None:
        """One step on each worker's gradients, in the order of the parameters."""
        for parameter, grads in zip(self.parameters, zip(*gradients, strict=True), strict=True):
            parameter.grad = torch.stack(grads).mean(dim=0)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.muon.step(2 * rate, self.pool)
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, step: int) -> None:
    """Moves the averaged weights towards the network's, faster in the first steps."""
    share = 1 - min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), share)
