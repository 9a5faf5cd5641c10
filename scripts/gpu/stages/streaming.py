"""A decode of 4096x4096 in 8 GiB of the device's memory, compared with diffusers' tiling.

The allocator is held to the limit while sdconv streams, so that a decode that takes more fails.
Errors are against the same weights and latents in a wider dtype, unstreamed, over the largest
value; the streamed decode may err twice as much as the unstreamed one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from scripts.bench.sides import theirs
from scripts.gpu import networks
from scripts.gpu.options import Options
from scripts.gpu.precision import BFLOAT16, FLOAT32, float32_by_tf32
from scripts.gpu.record import Record
from scripts.gpu.timing import once
from sdconv.models.dummy_inputs import Noise, inputs_for
from sdconv.sizes import format_bytes

STREAMED, TILED, WHOLE = "sdconv, streamed", "diffusers, tiles", "sdconv, unstreamed"
EXACT = "a wider dtype, unstreamed"
# error that is rounding in any case
LEAST = {torch.bfloat16: 2**-7, torch.float32: 2e-5}


def run(record: Record, options: Options) -> None:
    side, limit = (96, 64 << 20) if options.small else (4096, 8 << 30)
    precision = FLOAT32 if options.device == "cpu" else BFLOAT16
    decodes = Decodes(side, limit, precision.dtype, options)
    record.facts(
        network=networks.label(networks.SDXL_VAE),
        dtype=precision.name,
        size=side,
        limit_bytes=limit,
    )
    for name, measure in (
        (STREAMED, decodes.streamed),
        (TILED, decodes.tiled),
        (WHOLE, decodes.whole),
    ):
        record.measure(name, measure, least=0.5 if options.small else 3.0, side=name)
    compare(record, decodes)


class Decodes:
    """The decodes of one latent, whose images are kept on the CPU."""

    def __init__(self, side: int, limit: int, dtype: torch.dtype, options: Options) -> None:
        self.dtype, self._options, self._limit = dtype, options, limit
        self._network = networks.built(networks.SDXL_VAE, dtype, options).requires_grad_(False)
        noise = Noise(1, 0, dtype, torch.device(options.device))
        (self._latents,) = inputs_for(self._network, (side, side), noise)["decode"]
        self.images: dict[str, Tensor] = {}

    def streamed(self) -> dict[str, Any]:
        """sdconv's streaming. Its limit leaves room for the weights, the latents and the
        allocator's rounding."""
        held = sum(p.numel() * p.element_size() for p in self._network.parameters())
        own = self._limit - held - self._limit // 16
        self._network.enable_streaming(own, progress=False)
        try:
            with memory_held_to(self._limit, self._options.device):
                values = self._decode(STREAMED, self._network)
        finally:
            self._network.disable_streaming()
        return {**values, "memory_limit": format_bytes(own)}

    def tiled(self) -> dict[str, Any]:
        """diffusers' tiles, of the size that it takes them for SDXL."""
        network = theirs(self._network)
        network.enable_tiling()
        tile = 32 if self._options.small else 1024
        network.tile_sample_min_size = tile
        network.tile_latent_min_size = tile // self._network.downscale
        return self._decode(TILED, network)

    def whole(self) -> dict[str, Any]:
        return self._decode(WHOLE, self._network)

    @torch.no_grad()
    def exact(self) -> Tensor:
        """In the next wider dtype, without TF32."""
        wider = torch.float64 if self.dtype == torch.float32 else torch.float32
        try:
            with float32_by_tf32(False):
                latents = self._latents.to(wider)
                return networks.call(self._network.to(wider), "decode", (latents,)).cpu()
        finally:
            self._network.to(self.dtype)

    @torch.no_grad()
    def _decode(self, name: str, network: Any) -> dict[str, Any]:
        small = self._latents[..., :16, :16].contiguous()
        networks.call(network, "decode", (small,))  # the first call sets kernels up

        def decode() -> None:
            self.images[name] = networks.call(network, "decode", (self._latents,))

        device = self._options.device
        if device == "cpu":
            seconds, peaks = once(decode, device), {}
        else:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            seconds = once(decode, device)
            peaks = {
                "peak_bytes": torch.cuda.max_memory_allocated(),
                "reserved_bytes": torch.cuda.max_memory_reserved(),
            }
        self.images[name] = self.images[name].float().cpu()
        return {"seconds": seconds, **peaks}


@contextmanager
def memory_held_to(limit: int, device: str) -> Iterator[None]:
    """On CUDA, lets torch allocate no more than so many bytes within the block."""
    if device != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def compare(record: Record, decodes: Decodes) -> None:
    """Adds the images' errors to their rows."""
    if STREAMED not in decodes.images:
        record.complain("the streamed decode failed")
    elif WHOLE in decodes.images:
        streamed, whole = decodes.images[STREAMED], decodes.images[WHOLE]
        distance = float((streamed - whole).abs().max() / whole.abs().max())
        record.row(STREAMED, from_unstreamed=distance)

    def errors() -> dict[str, Any]:
        exact = decodes.exact()
        largest = exact.abs().max()
        found = {
            name: float((image - exact).abs().max() / largest)
            for name, image in decodes.images.items()
        }
        return {"errors": found}

    exact = record.measure(EXACT, errors, side=EXACT)
    if exact is None:
        return record.complain("there is no wider decode to measure errors against")
    for name, error in exact["errors"].items():
        record.row(name, distance=error)
    judge(record, exact["errors"], LEAST[decodes.dtype])


def judge(record: Record, errors: dict[str, float], least: float) -> None:
    """Complains if streaming errs more than twice as much as an ordinary decode, or if diffusers'
    tiles do not: then this comparison could not show an error."""
    allowed = max(2 * errors.get(WHOLE, 0.0), least)
    record.facts(allowed_error=allowed)
    if STREAMED in errors and not errors[STREAMED] <= allowed:
        record.complain(f"the streamed decode errs by {errors[STREAMED]:.2g}, not {allowed:.2g}")
    if TILED in errors and errors[TILED] <= allowed:
        record.complain("diffusers' tiles do not err more either: the comparison shows nothing")
