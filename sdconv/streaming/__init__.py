"""A VAE in strips of rows: memory that follows a limit, and the numbers of the whole picture.

GroupNorm's statistics and attention are those of the whole map, so that there are no seams; only
rounding differs from an ordinary run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sdconv.backends import backend
from sdconv.errors import InputError
from sdconv.fast.cpu.conv import NotFiniteError
from sdconv.sizes import in_words, parse_bytes
from sdconv.streaming.arena import is_parted
from sdconv.streaming.executor import run
from sdconv.streaming.folder import check_room, checked_folder
from sdconv.streaming.planner import Plan, enough_memory, least_memory, make_plan
from sdconv.streaming.progress import bar
from sdconv.streaming.steps import Work, steps_of

__all__ = [
    "Plan",
    "Streaming",
    "check_room",
    "checked_folder",
    "in_words",
    "least_memory",
    "make_plan",
    "parse_bytes",
    "steps_of",
]


@dataclass(frozen=True)
class Streaming:
    """How a network streams.

    Attributes:
        limit: bytes of memory beside weights and input (on CUDA, of the device's), None for none.
        spill: folder for maps beyond the limit. progress: show a bar on a terminal.
    """

    limit: int | None
    spill: Path | None
    progress: bool

    @classmethod
    def of(
        cls, memory_limit: int | str | None, spill: str | Path | None, progress: bool
    ) -> Streaming:
        """The settings, checked.

        Raises:
            InputError: the limit is no size, or the folder cannot be written to.
        """
        limit = None if memory_limit is None else parse_bytes(memory_limit)
        return cls(limit, None if spill is None else checked_folder(spill), progress)

    def plan(self, network: nn.Module, work: Work, x: Tensor) -> Plan:
        """What a call with ``x`` will do.

        Raises:
            InputError: the limit cannot be met; or as ``steps_of``.
        """
        steps = steps_of(network, work, *x.shape[2:])
        return make_plan(
            steps,
            pictures=len(x),
            limit=self.limit,
            can_spill=self._can_spill(x),
            parted=is_parted(x.device),
        )

    def __call__(self, network: nn.Module, work: Work, x: Tensor) -> Tensor:
        """Moments of latents for pictures, or pictures for latents, ``(B, C, H, W)``; under
        autocast too in the network's own dtype.

        Raises:
            InputError: the input wants gradients; another dtype or device than the network's; the
                limit cannot be met, or not with NaN or infinity; too little room for what is
                spilled.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(next(network.parameters()).dtype)
        _check(network, x)
        with torch.autocast(x.device.type, enabled=False):
            try:
                return self._run(self.plan(network, work, x), work, x)
            except NotFiniteError as error:
                layer = str(error)
            # not in the handler, where the first run's maps are still alive
            return self._run(self._plan_again(network, work, x, layer), work, x)

    def _can_spill(self, x: Tensor) -> bool:
        return self.spill is not None or x.device.type != "cpu"

    def _plan_again(self, network: nn.Module, work: Work, x: Tensor, layer: str) -> Plan:
        """By the reference, the only one that puts NaN and infinity where they belong.

        Raises:
            InputError: it takes more memory than the limit.
        """
        with backend("reference"):
            try:
                return self.plan(network, work, x)
            except InputError as error:
                steps = steps_of(network, work, *x.shape[2:])
                enough = enough_memory(steps, pictures=len(x), can_spill=self._can_spill(x))
                raise InputError(
                    "NaN or infinity, for which the memory limit is too low",
                    where=layer if x.isfinite().all() else "the input",
                    expected="finite numbers",
                    hint="look for them in the input and in the weights (sdconv inspect --values); "
                    f"to see where they come out, raise the limit: {enough}",
                ) from error

    def _run(self, plan: Plan, work: Work, x: Tensor) -> Tensor:
        if plan.spilled and self.spill is not None:
            check_room(self.spill, plan.spilled)
        out = x.new_empty(plan.shape)
        words = {"encode": "encoding", "decode": "decoding"}[work]
        with torch.no_grad(), bar(words, plan.multiplies, shown=self.progress) as tick:
            for one, made in zip(x, out, strict=True):
                run(plan, one, made, folder=self.spill, tick=lambda step, done: tick(done))
        return out


def _check(network: nn.Module, x: Tensor) -> None:
    weight = next(network.parameters())
    if (x.dtype, x.device) != (weight.dtype, weight.device):
        raise InputError(
            "the input is not of the network's kind",
            where="streaming",
            expected=f"{weight.dtype} on {weight.device}",
            got=f"{x.dtype} on {x.device}",
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise InputError(
            "streaming computes no gradients",
            where="streaming",
            hint="call it under torch.no_grad(), or call disable_streaming()",
        )
