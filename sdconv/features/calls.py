"""Which call of a network a map is of: its number, its timestep, and the halves of its batch."""

from __future__ import annotations

import inspect
import itertools
import sys
import threading
from collections.abc import Callable, Container, Iterable
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sdconv.errors import InputError, SdconvError
from sdconv.features.hooks import first_tensor, recomputing
from sdconv.features.numbers import whole, wholes

Half = Literal["conditional", "unconditional"]
Steps = int | Iterable[int] | slice | Callable[["Call"], bool] | None


class Call:
    """One call of a network.

    Attributes:
        index: from 0, since the block was entered.
        guided: whether the batch is twice the pipeline's, for classifier-free guidance; None where
            that is not known.
    """

    def __init__(self, index: int, timestep: object = None, guided: bool | None = None) -> None:
        self.index = index
        self.guided = guided
        self._timestep = timestep.detach().clone() if isinstance(timestep, Tensor) else timestep

    @cached_property
    def timestep(self) -> float | tuple[float, ...] | None:
        """What a denoiser was told; several where the pictures of a batch differ; else None."""
        if self._timestep is None:
            return None
        values = torch.as_tensor(self._timestep).reshape(-1).tolist()
        return float(values[0]) if len(set(values)) == 1 else tuple(map(float, values))

    def rows(self, half: Half, batch: int) -> slice:
        """The places in a map's first axis, of length ``batch``, of one half.

        Raises:
            SdconvError: it is not known which they are, or there is no such half.
        """
        if self.guided is None:
            raise SdconvError(
                f"it is not known which half of the batch is {half}",
                where=f"call {self.index}",
                expected="a whole batch of a pipeline's U-Net with classifier-free guidance of two "
                "halves",
                hint="take the rows from .tensor",
            )
        if not self.guided:
            if half == "conditional":
                return slice(0, batch)
            raise SdconvError(
                "there is no unconditional half without classifier-free guidance",
                where=f"call {self.index}",
                hint="call the pipeline with guidance_scale above 1",
            )
        return slice(0, batch // 2) if half == "unconditional" else slice(batch // 2, batch)

    def without_halves(self) -> Call:
        """Of a map whose first axis goes over something else than the batch."""
        return Call(self.index, self._timestep)


class Counter:
    """Follows the calls of one network.

    A denoiser is called by its ``forward`` with a timestep, and its calls are counted. The halves
    of an autoencoder are entered from its ``encode`` and ``decode``; there each place counts for
    itself how often it was passed. A thread's maps are of the call that it began last; in a thread
    that began none, such as one that only computes gradients, of the last of all.

    Args:
        network: whose calls.
        pipeline: that calls it, or None.
        denoiser: it is the pipeline's, whose batch guidance doubles.
    """

    def __init__(self, network: nn.Module, pipeline: Any = None, *, denoiser: bool = False) -> None:
        self._network = network
        self._pipeline = pipeline if denoiser else None
        self._names = list(inspect.signature(network.forward).parameters)
        self.timed = "timestep" in self._names
        self._numbers = itertools.count()
        self._latest: Call | None = None
        self._here = threading.local()
        self._lock = threading.Lock()
        self._passed: dict[str, int] = {}

    def attach(self) -> RemovableHandle:
        """Begins to count."""

        # a function, which a copy of the network made meanwhile shares: locks cannot be copied
        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._begin(args, kwargs)

        return self._network.register_forward_pre_hook(begin, with_kwargs=True)

    def at(self, name: str) -> Call:
        """The call that passes a place now."""
        call: Call | None = getattr(self._here, "call", self._latest)
        if call is not None:
            return call
        again = recomputing()
        with self._lock:
            index = max(self._passed.get(name, 0) - again, 0)
            self._passed[name] = index + 1
        return Call(index)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.timed or recomputing():
            return
        timestep = kwargs.get("timestep")
        if timestep is None and (place := self._names.index("timestep")) < len(args):
            timestep = args[place]
        given = first_tensor((args, kwargs))
        batch = None if given is None or given.ndim == 0 else len(given)
        self._latest = Call(next(self._numbers), timestep, self._guided(batch))
        self._here.call = self._latest

    def _guided(self, batch: int | None) -> bool | None:
        """Whether the pipeline doubles the batch; None where it does not say or does otherwise."""
        pipeline = self._pipeline
        guided: bool | None = getattr(pipeline, "do_classifier_free_guidance", None)
        # three parts: InstructPix2Pix has the picture's, perturbed attention its own
        thirds = "InstructPix2Pix" in type(pipeline).__name__
        thirds |= bool(getattr(pipeline, "do_perturbed_attention_guidance", False))
        # guided, but called with one half alone
        alone = bool(guided) and batch is not None and batch % 2 == 1
        return None if guided is None or thirds or alone else bool(guided)


def selection(steps: Steps) -> tuple[Callable[[Call], bool], int | None]:
    """Whether a call is among ``steps``, and the number of the last one if that is known.

    Args:
        steps: numbers of calls from 0, a slice of them, a function of the call, or None for all.

    Raises:
        InputError: none of these.
    """
    if steps is None:
        return lambda call: True, None
    if callable(steps):
        return lambda call: bool(steps(call)), None
    if isinstance(steps, slice):
        bounds = (steps.start or 0, sys.maxsize if steps.stop is None else steps.stop, steps.step)
        first, stop, step = (whole(1 if one is None else one) for one in bounds)
        if first is not None and stop is not None and step and min(first, stop, step) >= 0:
            numbers = range(first, stop, step)
            return _among(numbers), numbers[-1] if numbers and stop < sys.maxsize else None
    else:
        one = whole(steps)
        wanted = wholes(steps) if one is None else [one]
        if wanted and min(wanted) >= 0:
            return _among(set(wanted)), max(wanted)
    raise InputError(
        "these are no calls",
        where="steps",
        expected="numbers from 0 on, a slice of them, or a function of the call",
        got=steps,
    )


def _among(numbers: Container[int]) -> Callable[[Call], bool]:
    """Whether a call's number is among these."""
    return lambda call: call.index in numbers
