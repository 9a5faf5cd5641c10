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
from sdconv.ops.fused import NotFiniteError
from sdconv.streaming.arena import is_parted
from sdconv.streaming.executor import run
from sdconv.streaming.folder import check_room, checked_folder
from sdconv.streaming.planner import Plan, least_memory, make_plan
from sdconv.streaming.progress import bar
from sdconv.streaming.sizes import in_words, parse_bytes
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
        can_spill = self.spill is not None or x.device.type != "cpu"
        return make_plan(
            steps,
            pictures=len(x),
            limit=self.limit,
            can_spill=can_spill,
            parted=is_parted(x.device),
        )

    def __call__(self, network: nn.Module, work: Work, x: Tensor) -> Tensor:
        """Moments of latents for pictures, or pictures for latents, ``(B, C, H, W)``; under
        autocast too in the network's own dtype.

        Raises:
            InputError: gradients are asked for; another dtype or device than the network's; the
                limit cannot be met; too little room for what is spilled.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(next(network.parameters()).dtype)
        _check(network, x)
        with torch.autocast(x.device.type, enabled=False):
            try:
                return self._run(network, work, x)
            except NotFiniteError:  # which only the reference puts where it belongs
                with backend("reference"):
                    return self._run(network, work, x)

    def _run(self, network: nn.Module, work: Work, x: Tensor) -> Tensor:
        plan = self.plan(network, work, x)
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
            fix="call it under torch.no_grad(), or call disable_streaming()",
        )
