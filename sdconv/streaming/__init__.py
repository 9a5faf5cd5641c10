"""Runs an autoencoder within a memory limit, in strips of rows.

A VAE runs layer by layer: GroupNorm's statistics and attention are those of the whole feature map,
so there are no seams. A tiny autoencoder's strips flow through all layers at once, see
:mod:`sdconv.streaming.rows`. The result differs from an ordinary run by rounding only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sdconv.backends import backend
from sdconv.errors import InputError
from sdconv.fast.cpu.conv import NotFiniteError
from sdconv.models.tiny import AutoencoderTiny
from sdconv.sizes import parse_bytes
from sdconv.streaming.arena import has_separate_spill
from sdconv.streaming.executor import progress_bar, run
from sdconv.streaming.planner import StreamPlan, least_memory, make_plan, sufficient_limits
from sdconv.streaming.rows import RowPlan, plan_rows, run_rows
from sdconv.streaming.spill import check_disk_space, spill_folder
from sdconv.streaming.steps import Direction, steps_of

__all__ = [
    "RowPlan",
    "StreamPlan",
    "Streaming",
    "check_disk_space",
    "least_memory",
    "make_plan",
    "plan_rows",
    "spill_folder",
    "steps_of",
]


@dataclass(frozen=True)
class Streaming:
    """The streaming settings of a network; calling them encodes or decodes.

    Attributes:
        limit: bytes of memory without weights and input (on CUDA, of the device's memory); None for
            no limit.
        spill: folder for feature maps beyond the limit.
        progress: show a progress bar on a terminal.
    """

    limit: int | None
    spill: Path | None
    progress: bool

    @classmethod
    def of(
        cls, memory_limit: int | str | None, spill: str | Path | None, progress: bool
    ) -> Streaming:
        """Checks the arguments of ``enable_streaming``.

        Raises:
            InputError: the limit is not an amount of memory, or the folder is not writable.
        """
        limit = None if memory_limit is None else parse_bytes(memory_limit)
        return cls(limit, None if spill is None else spill_folder(spill), progress)

    def plan(self, network: nn.Module, direction: Direction, x: Tensor) -> StreamPlan:
        """The plan that a call with ``x`` follows.

        Raises:
            InputError: the limit cannot be met; or as ``steps_of``.
        """
        steps = steps_of(network, direction, *x.shape[2:])
        return make_plan(
            steps,
            batch=len(x),
            limit=self.limit,
            can_spill=self._can_spill(x),
            separate_spill=has_separate_spill(x.device),
        )

    def row_plan(self, network: AutoencoderTiny, direction: Direction, x: Tensor) -> RowPlan:
        """The plan that a call with ``x`` follows in a tiny autoencoder.

        Raises:
            InputError: as ``plan_rows``.
        """
        return plan_rows(network, direction, len(x), *x.shape[2:], limit=self.limit)

    def __call__(self, network: nn.Module, direction: Direction, x: Tensor) -> Tensor:
        """Encodes images to the moments of their latents, or decodes latents to images: ``(B, C, H,
        W)``. Autocast has no effect: the network computes in its own dtype.

        Raises:
            InputError: the input requires gradients, or has another dtype or device than the
                network; the limit cannot be met, or not for an input with NaN or infinity; the disk
                is too full for what is spilled.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(next(network.parameters()).dtype)
        _check(network, x)
        with torch.autocast(x.device.type, enabled=False):
            if isinstance(network, AutoencoderTiny):
                return self._run_rows(network, direction, x)
            try:
                return self._run(self.plan(network, direction, x), direction, x)
            except NotFiniteError as error:
                layer = str(error)
            # after the handler, because inside it the first run's buffers are still alive
            plan = self._plan_with_reference(network, direction, x, layer)
            return self._run(plan, direction, x)

    def _can_spill(self, x: Tensor) -> bool:
        return self.spill is not None or x.device.type != "cpu"

    def _plan_with_reference(
        self, network: nn.Module, direction: Direction, x: Tensor, layer: str
    ) -> StreamPlan:
        """A plan for the reference backend, the only one that puts NaN and infinity exactly where
        they belong.

        Raises:
            InputError: the reference takes more memory than the limit.
        """
        with backend("reference"):
            try:
                return self.plan(network, direction, x)
            except InputError as error:
                steps = steps_of(network, direction, *x.shape[2:])
                enough = sufficient_limits(steps, batch=len(x), can_spill=self._can_spill(x))
                raise InputError(
                    "NaN or infinity, which take more memory than the limit to compute exactly",
                    where=layer if x.isfinite().all() else "the input",
                    expected="finite numbers",
                    hint="look for them in the input and in the weights (sdconv inspect --values); "
                    f"to see which outputs they reach, raise the limit: {enough}",
                ) from error

    def _run(self, plan: StreamPlan, direction: Direction, x: Tensor) -> Tensor:
        if plan.spilled and self.spill is not None:
            check_disk_space(self.spill, plan.spilled)
        out = x.new_empty(plan.shape)
        with torch.no_grad(), self._progress(direction, plan.multiplies) as advance:
            run(plan, x, out, folder=self.spill, on_strip=lambda step, done: advance(done))
        return out

    def _run_rows(self, network: AutoencoderTiny, direction: Direction, x: Tensor) -> Tensor:
        plan = self.row_plan(network, direction, x)
        out = x.new_empty(plan.shape)
        with torch.no_grad(), self._progress(direction, len(out) * out.shape[2]) as advance:
            run_rows(plan, x, out, advance)
        return out

    def _progress(
        self, direction: Direction, total: int
    ) -> AbstractContextManager[Callable[[int], object]]:
        label = {"encode": "encoding", "decode": "decoding"}[direction]
        return progress_bar(label, total, shown=self.progress)


def _check(network: nn.Module, x: Tensor) -> None:
    weight = next(network.parameters())
    if (x.dtype, x.device) != (weight.dtype, weight.device):
        raise InputError(
            "the input has another dtype or device than the network",
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
