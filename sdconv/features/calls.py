"""The calls of a network: their numbers, their timesteps, and the guidance halves of their
batches."""

from __future__ import annotations

import inspect
import itertools
import threading
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sdconv.errors import SdconvError
from sdconv.features.hooks import first_tensor, recomputing

Half = Literal["conditional", "unconditional"]


class Call:
    """One call of a network.

    Attributes:
        index: the number of the call, from 0, since the ``with`` block was entered.
        guided: whether classifier-free guidance doubles the batch; None if that is not known.
        size: rows and columns of a denoiser's input; None for other networks.
    """

    def __init__(
        self,
        index: int,
        timestep: object = None,
        guided: bool | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self.index = index
        self.guided = guided
        self.size = size
        self._timestep = timestep.detach().clone() if isinstance(timestep, Tensor) else timestep

    @cached_property
    def timestep(self) -> float | tuple[float, ...] | None:
        """The timestep of a denoiser's call; a tuple if the samples of the batch have different
        ones; None for other networks."""
        if self._timestep is None:
            return None
        values = torch.as_tensor(self._timestep).reshape(-1).tolist()
        return float(values[0]) if len(set(values)) == 1 else tuple(map(float, values))

    def rows(self, half: Half, batch: int) -> slice:
        """The rows of a batch of ``batch`` samples that belong to one guidance half.

        Raises:
            SdconvError: the halves are not known, or there is only one.
        """
        if self.guided is None:
            raise SdconvError(
                f"it is not known which half of the batch is {half}",
                where=f"call {self.index}",
                expected="a whole batch of a pipeline's U-Net, doubled by classifier-free guidance",
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
        """The same call for a feature map whose first axis is not the batch."""
        return Call(self.index, self._timestep, size=self.size)


class CallCounter:
    """Counts the calls of one network.

    A denoiser's calls are those of its ``forward``, which has a ``timestep`` argument. The encoder
    and decoder of an autoencoder are entered through ``encode`` and ``decode``, so there each hook
    point counts how often it was passed. Feature maps belong to the call that their thread began
    last, or, in a thread that began none (it may only compute gradients), to the last call of all.

    Args:
        network: the network whose calls are counted.
        pipeline: the pipeline that calls it, or None.
        denoiser: the network is the pipeline's denoiser, whose batch guidance doubles.
    """

    def __init__(self, network: nn.Module, pipeline: Any = None, *, denoiser: bool = False) -> None:
        self._network = network
        self._pipeline = pipeline if denoiser else None
        self._names = list(inspect.signature(network.forward).parameters)
        self.timed = "timestep" in self._names
        self._numbers = itertools.count()
        self._latest: Call | None = None
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._passed: dict[str, int] = {}

    def attach(self) -> RemovableHandle:
        """Start counting."""

        # a function is shared with copies of the network; a bound method would copy the lock and
        # fail
        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._begin(args, kwargs)

        return self._network.register_forward_pre_hook(begin, with_kwargs=True)

    def current(self, name: str) -> Call:
        """The call that is passing the hook point ``name``."""
        call: Call | None = getattr(self._thread, "call", self._latest)
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
        if timestep is None and (position := self._names.index("timestep")) < len(args):
            timestep = args[position]
        sample = first_tensor((args, kwargs))
        batch = None if sample is None or sample.ndim == 0 else len(sample)
        size = None if sample is None or sample.ndim != 4 else (sample.shape[2], sample.shape[3])
        self._latest = Call(next(self._numbers), timestep, self._guided(batch), size)
        self._thread.call = self._latest

    def _guided(self, batch: int | None) -> bool | None:
        """Whether guidance doubles the batch; None if the pipeline does not say, or batches
        otherwise."""
        pipeline = self._pipeline
        guided: bool | None = getattr(pipeline, "do_classifier_free_guidance", None)
        # batches of three: InstructPix2Pix adds the image condition, PAG the perturbed attention
        thirds = "InstructPix2Pix" in type(pipeline).__name__
        thirds |= bool(getattr(pipeline, "do_perturbed_attention_guidance", False))
        # guided, but this call has one half only
        alone = bool(guided) and batch is not None and batch % 2 == 1
        return None if guided is None or thirds or alone else bool(guided)
