"""Time and memory of decoding, encoding and U-Net steps: diffusers' and sdconv's, side by side.

Medians of 20 runs after warming up, on CUDA by events. The most valuable rows come first, and those
that torch.compile takes long for after the others of their kind; what the time does not suffice for
is listed. A side that fails, for instance for lack of memory, has a row that says so.
``difference`` is that of a side's output from the first side's, over its largest value, so that a
fast wrong answer shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from scripts.bench.sides import theirs
from scripts.gpu import networks
from scripts.gpu.options import Options
from scripts.gpu.precision import BFLOAT16, FLOAT16, FLOAT32, Precision
from scripts.gpu.record import DeviceLostError, Record, sentence
from scripts.gpu.stages import variants
from scripts.gpu.timing import once, timed
from sdconv.backends import set_backend
from sdconv.models.dummy_inputs import Noise, inputs_for

RUNS = 20
# a row's largest difference from diffusers that is rounding and not a mistake
ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Side:
    """Whose network, in which memory format, and whether torch.compile compiles it or a CUDA graph
    of it is recorded."""

    name: str
    ours: bool = False
    channels_last: bool = False
    compiled: bool = False
    recorded: bool = False


EAGER = Side("diffusers")
CHANNELS_LAST = Side("diffusers, channels_last", channels_last=True)
COMPILED = Side("diffusers, channels_last, compiled", channels_last=True, compiled=True)
FAST = Side("sdconv fast", ours=True, channels_last=True)
FAST_COMPILED = Side("sdconv fast, compiled", ours=True, channels_last=True, compiled=True)
RECORDED = Side("sdconv fast, CUDA graph", ours=True, channels_last=True, recorded=True)
SIDES = (EAGER, FAST, COMPILED, CHANNELS_LAST, FAST_COMPILED)


# in the plan, in place of sides: the variants of the fast backend's operations
VARIANTS: tuple[Side, ...] = ()


@dataclass(frozen=True)
class Work:
    """What is computed. ``size``: the side of the square image; for a U-Net, 8 times that of its
    latents."""

    network: str
    method: str
    size: int
    batch: int
    precision: Precision

    @property
    def values(self) -> dict[str, Any]:
        """The columns of a row."""
        return {
            "network": networks.label(self.network),
            "method": {"forward": "one step"}.get(self.method, self.method),
            "size": self.size,
            "batch": self.batch,
            "dtype": self.precision.name,
        }


def run(record: Record, options: Options) -> None:
    record.facts(runs=RUNS, cores=torch.get_num_threads())
    bench = Bench(record, options)
    for work, sides in plan(options):
        if sides is VARIANTS:
            bench.add_variants(work)
            continue
        for side in sides:
            if options.compiled or not side.compiled:
                bench.add(work, side)


def plan(options: Options) -> Iterator[tuple[Work, Sequence[Side]]]:
    """What is measured, in this order."""
    if options.small:
        decode = Work(networks.SDXL_VAE, "decode", 64, 1, FLOAT32)
        for work in (decode, Work(networks.SD15_UNET, "forward", 64, 1, FLOAT32)):
            yield work, (EAGER, FAST, CHANNELS_LAST)
        yield Work(networks.SDXL_VAE, "encode", 64, 2, BFLOAT16), (EAGER, FAST)
        # the quickest to compile
        yield Work(networks.TAESD, "decode", 64, 1, FLOAT32), (EAGER, COMPILED, FAST_COMPILED)
        return
    headline, important, rest = works()
    plain = [side for side in SIDES if not side.compiled]
    compiled = [side for side in SIDES if side.compiled]
    yield headline, (EAGER, FAST, RECORDED, COMPILED)
    for work in important:
        yield work, (EAGER, FAST, RECORDED)
    yield headline, (FAST_COMPILED, CHANNELS_LAST)
    for work in important:
        yield work, compiled
    yield headline, VARIANTS
    for work in important:
        yield work, (CHANNELS_LAST,)
    for sides in (plain, compiled):
        for work in rest:
            yield work, sides


def works() -> tuple[Work, list[Work], list[Work]]:
    """The one of which the most is known elsewhere; those of most use; and the others."""
    vae, flux = networks.SDXL_VAE, networks.FLUX1_VAE
    steps = [(networks.SD15_UNET, 512), (networks.SDXL_UNET, 1024)]
    important = [Work(vae, "decode", size, 1, BFLOAT16) for size in (1024, 512, 2048)]
    important += [Work(vae, "encode", 1024, 1, BFLOAT16)]
    important += [Work(name, "forward", size, 1, BFLOAT16) for name, size in steps]
    every = [
        Work(name, method, size, batch, precision)
        for batch in (1, 4)
        for size in (1024, 512, 2048)
        for name in (flux, vae)
        for method in ("decode", "encode")
        for precision in (BFLOAT16, FLOAT16)
    ]
    every += [Work(name, "forward", size, 1, FLOAT16) for name, size in steps]
    return important[0], important[1:], [work for work in every if work not in important]


class Bench:
    """Networks, inputs and first outputs, kept from one row to the next."""

    # networks kept on the device at a time: the sides of one
    KEPT = 3

    def __init__(self, record: Record, options: Options) -> None:
        self._record, self._options = record, options
        self._networks: dict[tuple[str, Precision, bool, bool], Any] = {}
        self._outputs: dict[Work, Tensor] = {}

    def add(self, work: Work, side: Side) -> None:
        """Adds the row of one side."""
        values = {**work.values, "side": side.name}
        key = ", ".join(str(value) for value in values.values())
        least, most = (30.0, 120.0) if side.compiled else (4.0, 60.0)
        if self._options.small:
            least = 1.0
        found = self._record.measure(
            key,
            lambda: self._measured(work, side),
            least=least,
            most=most,
            must_work=side.ours,
            **values,
        )
        if side.compiled:
            torch.compiler.reset()
        if found is None:
            self._networks.clear()
        elif found["difference"] is not None:
            self._check(key, found["difference"], work.precision)

    def add_variants(self, work: Work) -> None:
        """Adds the rows of the variants that the fast backend chooses from."""

        def measure() -> dict[str, Any]:
            found = self._measured(work, FAST)
            difference = found["difference"]
            right = difference is not None and difference <= ROUNDING[work.precision.dtype]
            return {**work.values, **found, "right": right}

        try:
            from sdconv.fast.cuda import choices

            variants.add(self._record, choices, measure, least=1.0 if self._options.small else 4.0)
        except DeviceLostError:
            raise
        except Exception as error:  # the sides that come after are worth more
            self._record.row("variants", error=sentence(error))

    def _check(self, key: str, difference: float, precision: Precision) -> None:
        if not difference <= ROUNDING[precision.dtype]:
            self._record.complain(f"{key}: differs from diffusers by {difference:.2g}")

    @torch.no_grad()
    def _measured(self, work: Work, side: Side) -> dict[str, Any]:
        device = self._options.device
        network = self._network(work, side)
        call = caller(network, work, side, self._options)
        first = once(call, device)
        difference = self._difference(work, side, call())
        runs = 3 if self._options.small else RUNS
        timing = timed(call, device, runs=runs, seconds=0.5 if self._options.small else 4.0)
        second = once(call, device)
        return {
            "milliseconds": timing.milliseconds,
            "fastest": timing.fastest,
            "slowest": timing.slowest,
            "runs": timing.runs,
            "first_seconds": first,
            "compile_seconds": first - second if side.compiled else None,
            "peak_bytes": timing.peak,
            "difference": difference,
        }

    def _network(self, work: Work, side: Side) -> Any:
        """The network of a side; diffusers' has the same weights."""
        wanted = work.network, work.precision, side.ours, side.channels_last
        if wanted not in self._networks:
            while len(self._networks) >= self.KEPT:
                self._networks.pop(next(iter(self._networks)))
            network = networks.built(work.network, work.precision.dtype, self._options)
            if not side.ours:
                network = theirs(network)
            network.requires_grad_(False)
            if side.channels_last:
                network.to(memory_format=torch.channels_last)
            self._networks[wanted] = network
        return self._networks[wanted]

    def _difference(self, work: Work, side: Side, output: Tensor) -> float | None:
        """From the first side's output, over its largest value; None for that one."""
        if side == EAGER:
            # on the CPU: it must not add to the memory of the sides
            self._outputs[work] = output.cpu()
        if side == EAGER or work not in self._outputs:
            return None
        expected = self._outputs[work].to(output.device).float()
        return float((output.float() - expected).abs().max() / expected.abs().max())


def caller(network: Any, work: Work, side: Side, options: Options) -> Callable[[], Tensor]:
    """The call that is timed."""
    inputs = inputs_of(network, work, side, options)
    if side.ours:
        # the network's own: a compiled call keeps it, whatever the context is
        set_backend(network, "fast")

    def run() -> Tensor:
        return networks.call(network, work.method, inputs)

    if side.recorded:
        from sdconv.fast.cuda import graphs

        tensors, structure = tree_flatten(inputs)
        recording = graphs.record(
            network,
            lambda *given: networks.call(network, work.method, tree_unflatten(given, structure)),
            *tensors,
        )
        return lambda: recording(*tensors)
    return torch.compile(run, dynamic=False) if side.compiled else run


def inputs_of(network: Any, work: Work, side: Side, options: Options) -> tuple[Any, ...]:
    """A method's inputs; the first is the image or the latents."""
    # diffusers' network has other classes, and the same config
    own = network if side.ours else networks.empty(work.network, options)
    pixels = (work.size, work.size)
    size = pixels if work.method != "forward" else (work.size // 8, work.size // 8)
    noise = Noise(work.batch, 0, work.precision.dtype, torch.device(options.device))
    first, *others = inputs_for(own, size, noise)[work.method]
    if side.channels_last:
        first = first.contiguous(memory_format=torch.channels_last)
    return (first, *others)
