"""Runs an autoencoder within a memory limit, in strips of rows.

A VAE runs layer by layer: GroupNorm's statistics and attention are those of the whole feature map,
so there are no seams. A tiny autoencoder's strips flow through all layers at once, see
:mod:`sdconv.streaming.rows`. The result differs from an ordinary run by rounding only.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sdconv.backends import backend
from sdconv.errors import InputError, SdconvError
from sdconv.fast.cpu.conv import NotFiniteError
from sdconv.models.tiny import AutoencoderTiny
from sdconv.sizes import parse_bytes
from sdconv.streaming.arena import has_separate_spill
from sdconv.streaming.executor import progress_bar, run
from sdconv.streaming.parallel.bands import Bands, band_steps
from sdconv.streaming.parallel.executor import BandRun, strip_counts
from sdconv.streaming.parallel.group import AgreedError, RankGroup, checksum
from sdconv.streaming.planner import StreamPlan, least_memory, make_plan, sufficient_limits
from sdconv.streaming.rows import RowPlan, plan_rows, run_rows
from sdconv.streaming.spill import check_disk_space, spill_folder
from sdconv.streaming.steps import Direction, StreamStep, steps_of

__all__ = [
    "Parallel",
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

    def over_ranks(
        self, network: nn.Module, group: dist.ProcessGroup | None, timeout: float
    ) -> Parallel:
        """The same settings for each of the ranks of a group, which call this together.

        Args:
            network: must be the same on every rank.
            group: None for all ranks.
            timeout: seconds for which a rank waits for another.

        Raises:
            SdconvError: as `RankGroup`.
            AgreedError: the ranks' networks differ.
        """
        device = next(network.parameters()).device
        ranks = RankGroup(group, device, timeout)
        try:
            weights = network.state_dict()
            ranks.agree(
                {
                    "the network": f"{type(network).__name__} with {len(weights)} tensors",
                    "its dtype": next(network.parameters()).dtype,
                    "its weights": f"checksum {checksum(weights.values()):08x}",
                },
                hints={"its weights": "load the same weights on every rank"},
            )
        except BaseException:
            ranks.close()
            raise
        shown = self.progress and ranks.rank == 0
        return Parallel(self.limit, self.spill, shown, ranks)

    def plan(self, network: nn.Module, direction: Direction, x: Tensor) -> StreamPlan:
        """The plan that a call with ``x`` follows.

        Raises:
            InputError: the limit cannot be met; or as ``steps_of``.
        """
        return make_plan(
            self._steps(network, direction, x),
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

    def _steps(self, network: nn.Module, direction: Direction, x: Tensor) -> tuple[StreamStep, ...]:
        return steps_of(network, direction, *x.shape[2:])

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
                steps = self._steps(network, direction, x)
                enough = sufficient_limits(steps, batch=len(x), can_spill=self._can_spill(x))
                raise InputError(
                    "NaN or infinity, which take more memory than the limit to compute exactly",
                    where=layer if x.isfinite().all() else "the input",
                    expected="finite numbers",
                    hint="look for them in the input and in the weights (sdconv inspect --values); "
                    f"to see which outputs they reach, raise the limit: {enough}",
                ) from error

    def _check_disk_space(self, plan: StreamPlan) -> None:
        if plan.spilled and self.spill is not None:
            check_disk_space(self.spill, plan.spilled)

    def _run(
        self, plan: StreamPlan, direction: Direction, x: Tensor, run: Callable[..., None] = run
    ) -> Tensor:
        self._check_disk_space(plan)
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


@dataclass(frozen=True)
class Parallel(Streaming):
    """The settings of a network that computes each image over several ranks: calling them encodes
    or decodes, on every rank at once.

    Attributes:
        limit, spill: of each rank.
        group: the ranks.
    """

    group: RankGroup

    def close(self) -> None:
        """Leaves the other ranks."""
        self.group.close()

    @contextmanager
    def sharing_errors(self) -> Iterator[None]:
        """Raises an error of this rank on every rank, which all wait for each other's input.

        Raises:
            AgreedError: this rank failed; the others raise it when they are called.
        """
        try:
            yield
        except AgreedError:
            raise
        except SdconvError as error:
            self.group.share(error)

    def __call__(self, network: nn.Module, direction: Direction, x: Tensor) -> Tensor:
        """As `Streaming.__call__`; ``x`` and the result are whole on every rank.

        Raises:
            AgreedError: a rank's input is refused, or the ranks were called with different inputs,
                networks or backends; raised on every rank, before anything is computed.
            SdconvError: another rank ended, or did not answer in time. The ranks are then no longer
                connected.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(next(network.parameters()).dtype)
        with self.group.closing_on_failure(), torch.autocast(x.device.type, enabled=False):
            with self.sharing_errors():
                _check(network, x)
                plan = self.plan(network, direction, x)
            try:
                return self._run_bands(plan, network, direction, x)
            except NotFiniteError as error:
                layer = str(error)
            with self.sharing_errors():
                plan = self._plan_with_reference(network, direction, x, layer)
            with backend("reference"):
                return self._run_bands(plan, network, direction, x)

    def _steps(self, network: nn.Module, direction: Direction, x: Tensor) -> tuple[StreamStep, ...]:
        steps = super()._steps(network, direction, x)
        return band_steps(Bands(steps, self.group.size), self.group.rank)

    def _run_bands(
        self, plan: StreamPlan, network: nn.Module, direction: Direction, x: Tensor
    ) -> Tensor:
        with self.sharing_errors():
            self._check_disk_space(plan)
        bands = Bands(super()._steps(network, direction, x), self.group.size)
        layers = [f"{step.name} {type(step.layer).__name__}" for step in bands.steps]
        strips = self.group.agree(
            {
                "the method called": direction,
                "the input's shape": tuple(x.shape),
                "the input's dtype": x.dtype,
                "the input's values": f"checksum {checksum([x]):08x}",
                "the layers' implementations": f"checksum {zlib.crc32(repr(layers).encode()):08x}",
            },
            strip_counts(plan),
            hints={
                "the input's values": "give every rank the same: broadcast it, or use one seed",
                "the layers' implementations": "use the same backend on every rank",
            },
        )
        share = BandRun(bands, tuple(zip(*strips, strict=True)), self.group)
        return self._run(plan, direction, x, share.run)
