"""A network's run recorded as a CUDA graph: static shapes, and one launch for all kernels.

A small feature map's kernels take less time than launching them from Python. A graph is recorded
for one shape and launched whole.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from sdconv.errors import InputError

# Runs before the recording, in which cuDNN chooses its kernels and Triton compiles its own.
_WARMUP = 3


class Recording:
    """A recorded run, called like the function that was recorded. See `record`."""

    def __init__(
        self, network: nn.Module, function: Callable[..., Tensor], examples: tuple[Tensor, ...]
    ) -> None:
        self._network = network
        self._inputs = tuple(one.detach().clone() for one in examples)
        self._graph = torch.cuda.CUDAGraph()
        with self._on_device(), torch.no_grad():
            current = torch.cuda.current_stream()
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                for _ in range(_WARMUP):
                    function(*self._inputs)
            current.wait_stream(aside)
            self._memory = _memory(network)
            with torch.cuda.graph(self._graph):
                self._output = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Runs the graph on other values; returns a new tensor.

        Raises:
            InputError: an input differs in shape, dtype or device from the recorded one, or a
                weight's memory has been replaced since the recording.
        """
        expected, got = ([_kind(one) for one in given] for given in (self._inputs, inputs))
        if expected != got:
            raise InputError(
                "a recording has fixed shapes",
                where="inputs",
                expected=", ".join(expected),
                got=", ".join(got),
                hint="make another recording with inputs of this kind",
            )
        if _memory(self._network) != self._memory:
            raise InputError(
                "weights have been replaced since the recording, which would read the old ones",
                where=type(self._network).__name__,
                hint="record again; changes in place need no new recording",
            )
        with self._on_device(), torch.no_grad():
            for own, given in zip(self._inputs, inputs, strict=True):
                own.copy_(given)
            self._graph.replay()
            return self._output.clone()

    def _on_device(self) -> AbstractContextManager[None]:
        # The tensors' device need not be the current one.
        return torch.cuda.device_of(self._inputs[0])  # type: ignore[no-untyped-call]


def record(network: nn.Module, function: Callable[..., Tensor], *examples: Tensor) -> Recording:
    """Records a run of a network as a CUDA graph, without gradients.

    ::

        decode = record(vae, lambda latents: vae.decode(latents).sample, latents)
        image = decode(latents)

    Args:
        network: the network that ``function`` runs. Its weights may later change in place.
        function: from tensors to one tensor, on the GPU alone: it must not read values back.
        examples: inputs of the shapes, dtypes and device that all later inputs have.

    Raises:
        InputError: an example is not on CUDA.
    """
    if not examples or not all(_is_cuda(one) for one in examples):
        raise InputError(
            "only a run on CUDA can be recorded",
            where="examples",
            expected="one or more CUDA tensors",
            got=", ".join(map(_kind, examples)) or "none",
        )
    return Recording(network, function, examples)


def _is_cuda(x: Tensor) -> bool:
    return x.is_cuda


def _kind(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def _memory(network: nn.Module) -> list[Any]:
    return [one.data_ptr() for one in (*network.parameters(), *network.buffers())]
