"""Full-size networks of sdconv and its peers, each as a call to time."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

import sdconv
from scripts.bench.configs import SD15, SDXL, TAEF1, TAESD, kl
from scripts.bench.record import sentence
from sdconv.loading import build

Size = tuple[int, int]
Run = Callable[[], object]
FAST = "sdconv fast"

REFERENCE, PLAIN_KERNELS = "sdconv reference", "sdconv fast, without Numba"

LABELS = {
    "plain": "diffusers",
    "channels_last": "diffusers, channels_last",
    "compiled": "diffusers, channels_last, compiled",
    "openvino": "OpenVINO, f32",
    "openvino_bf16": "OpenVINO, bf16",
    "onnxruntime": "ONNX Runtime",
    "mnn": "MNN",
    "ncnn": "ncnn",
    REFERENCE: REFERENCE,
    PLAIN_KERNELS: PLAIN_KERNELS,
    FAST: FAST,
}
# by work
NETWORKS: dict[str, Any] = {
    "decode": kl(4, True),
    "encode": kl(4, True),
    "unet": SD15,
    "unet-xl": SDXL,
    "tiny-decode": TAESD,
    "tiny-encode": TAESD,
    "taef1-decode": TAEF1,
    "taef1-encode": TAEF1,
}
# the default sizes of U-Nets
LATENTS: dict[str, Size] = {"unet": (64, 64), "unet-xl": (128, 128)}
# keys of `scripts.bench.runtimes.RUNTIMES`
CONVERTED = ("openvino", "openvino_bf16", "onnxruntime", "mnn", "ncnn")


def filled(network: nn.Module) -> Any:
    """A network from the meta device with random weights of about the scale of trained ones."""
    network.to_empty(device="cpu").eval()
    random = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=random)
        else:
            nn.init.constant_(parameter, float(name.endswith("weight")))
    return network


def ours(work: str) -> Any:
    """sdconv's full-size network."""
    with torch.device("meta"):
        return filled(build(NETWORKS[work]))


def theirs(network: Any) -> Any:
    """diffusers' network with the same weights."""
    import diffusers

    kind = getattr(diffusers, network.config.class_name)
    with torch.device("meta"):
        peer = kind.from_config(network.config.to_json())
    peer.load_state_dict(network.state_dict(), assign=True)
    return peer.eval()


def size_of(text: str) -> Size:
    """``512x768`` as rows and columns."""
    height, width = map(int, text.split("x"))
    return height, width


def inputs_of(work: str, size: Size) -> tuple[Tensor, ...]:
    """Noise: an image or the latents of one for an autoencoder, latents of this size for a U-Net,
    with its timestep and prompt."""
    height, width = size
    torch.manual_seed(0)
    if work.endswith("encode"):
        return (torch.randn(1, 3, height, width),)
    if work.endswith("decode"):
        channels = NETWORKS[work].latent_channels
        return (torch.randn(1, channels, height // 8, width // 8),)
    sample, step = torch.randn(1, 4, height, width), torch.tensor(500)
    if work == "unet-xl":
        pooled, times = torch.randn(1, 1280), torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]])
        return sample, step, torch.randn(1, 77, 2048), pooled, times
    return sample, step, torch.randn(1, 77, 768)


def call(network: Any, work: str, inputs: tuple[Tensor, ...]) -> Tensor:
    out: Any
    if work.startswith("unet"):
        added = dict(zip(("text_embeds", "time_ids"), inputs[3:], strict=False)) or None
        (out,) = network(*inputs[:3], added_cond_kwargs=added, return_dict=False)
    elif work.endswith("decode"):
        (out,) = network.decode(*inputs, return_dict=False)
    else:
        (out,) = network.encode(*inputs, return_dict=False)
    found: Tensor = out.mode() if work == "encode" else out
    return found


def side_of(
    name: str,
    work: str,
    size: Size,
    network: Any = None,
    dtype: torch.dtype = torch.float32,
) -> Run:
    """The call to time for the side of that name; it returns the output.

    Args:
        network: sdconv's, whose weights the side shares; None for one of its own.
        dtype: of weights and inputs, but for runtimes, which are converted from float32. A given
            network is converted in place.
    """
    network, inputs = ours(work) if network is None else network, inputs_of(work, size)
    if name not in CONVERTED:
        network = network.to(dtype)
        inputs = tuple(one.to(dtype) if one.is_floating_point() else one for one in inputs)
    if name in PEERS:
        return PEERS[name](theirs(network), work, inputs)
    if name == PLAIN_KERNELS:
        sys.modules["numba"] = None  # type: ignore[assignment]  # as if it were not installed
    backend = "reference" if name == REFERENCE else "fast"

    def run() -> Tensor:
        with sdconv.backend(backend):
            return call(network, work, inputs)

    return run


def turns(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round; each has been called before."""
    names = list(runs)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            runs[name]()
            taken[name].append(time.perf_counter() - start)
    return taken


def medians(runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Median seconds of each run, after one warm-up call."""
    for run in runs.values():
        run()
    return {name: statistics.median(times) for name, times in turns(runs, rounds).items()}


class SideError(RuntimeError):
    """Why a side cannot be timed."""


class Separate:
    """A process of its own for one side or for several that share their weights, so that sides of
    different processes share neither threads nor memory."""

    # in that process
    _network: ClassVar[Any] = None
    _runs: ClassVar[dict[str, Run]] = {}

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, context, initializer=self._end_with_parent)

    def begin(
        self, name: str, work: str, size: Size, dtype: torch.dtype = torch.float32
    ) -> np.ndarray[Any, Any]:
        """Makes a side and calls it once; returns the output.

        Raises:
            SideError: it cannot be made, or fails.
        """
        try:
            out = self._process.submit(self._begin, name, work, size, dtype).result()
        except BrokenProcessPool:
            raise SideError("its process ends by a crash") from None
        if isinstance(out, str):
            raise SideError(out)
        return out

    def run(self, name: str) -> None:
        """Calls a side."""
        self._process.submit(self._again, name).result()

    @staticmethod
    def _end_with_parent() -> None:
        """A benchmark that is killed leaves no network behind in memory."""
        parent = multiprocessing.parent_process()
        assert parent is not None

        def wait() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()

    @classmethod
    def _begin(
        cls, name: str, work: str, size: Size, dtype: torch.dtype
    ) -> np.ndarray[Any, Any] | str:
        try:
            with torch.inference_mode():
                if cls._network is None:
                    cls._network = ours(work)
                cls._runs[name] = side_of(name, work, size, cls._network, dtype)
                out: Any = cls._runs[name]()
                return np.array(out.float() if isinstance(out, Tensor) else out, np.float32)
        except Exception as error:  # many cannot be sent to another process
            return sentence(error)

    @classmethod
    def _again(cls, name: str) -> None:
        with torch.inference_mode():
            cls._runs[name]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown()


def plain(network: Any, work: str, inputs: tuple[Tensor, ...]) -> Run:
    return lambda: call(network, work, inputs)


def channels_last(network: Any, work: str, inputs: tuple[Tensor, ...]) -> Run:
    # a copy, since the other sides share the weights
    network.load_state_dict({k: v.clone() for k, v in network.state_dict().items()}, assign=True)
    network.to(memory_format=torch.channels_last)
    first = inputs[0].contiguous(memory_format=torch.channels_last)
    return lambda: call(network, work, (first, *inputs[1:]))


def compiled(network: Any, work: str, inputs: tuple[Tensor, ...]) -> Run:
    run = channels_last(network, work, inputs)
    return torch.compile(run)


def _converted(name: str) -> Callable[[Any, str, tuple[Tensor, ...]], Run]:
    """A runtime that is imported when it is used."""

    def run(network: Any, work: str, inputs: tuple[Tensor, ...]) -> Run:
        from scripts.bench.runtimes import RUNTIMES, Called

        return RUNTIMES[name](Called(network, work, call), inputs)

    return run


PEERS: dict[str, Callable[[Any, str, tuple[Tensor, ...]], Run]] = {
    "plain": plain,
    "channels_last": channels_last,
    "compiled": compiled,
    **{name: _converted(name) for name in LABELS if name in CONVERTED},
}
