"""The fast backend called repeatedly and from several threads: the same bits, no growth."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import halos, seeded
from helpers.numbers import error
from torch import Tensor, nn

import sdconv
from sdconv.fast.cpu import conv
from sdconv.fast.cpu.buffer_pool import scratch
from sdconv.fast.cpu.conv import Epilogue, uncached_products, winograd_conv
from sdconv.fast.cpu.weight_cache import weight_cache
from sdconv.fast.cpu.winograd import CONV3X3, DOWNSAMPLE_CONV, UPSAMPLE_CONV
from sdconv.models.base import Autoencoder
from sdconv.models.blocks import ResnetBlock2D, Upsample2D


@pytest.fixture(scope="module")
def vae() -> Autoencoder:
    return seeded.network(seeded.kl((96, 128), 4, True, layers_per_block=1))


def decoded(vae: Autoencoder, seed: int) -> Tensor:
    latents = torch.randn(1, 4, 25, 30, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode(), sdconv.backend("fast"):
        return vae.decode(latents).sample  # type: ignore[no-any-return]


def test_the_same_bits_each_time(vae: Autoencoder) -> None:
    once = decoded(vae, 0)
    assert torch.equal(decoded(vae, 0), once)
    # whether weights are packed now or were before
    weight_cache.clear()
    assert torch.equal(decoded(vae, 0), once)
    scratch.release()
    assert torch.equal(decoded(vae, 0), once)


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_any_height_of_strips(rows: int) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 68, 46, 34, generator=random)
    weight = torch.randn(40, 68, 3, 3, generator=random)
    for scheme in (CONV3X3, UPSAMPLE_CONV, DOWNSAMPLE_CONV):
        one = winograd_conv(x, weight, scheme, None, Epilogue(), 1)[0]
        with halos.strips_of(rows):
            other = winograd_conv(x, weight, scheme, None, Epilogue(), 1)[0]
        assert error(other, one) < 1e-6


def test_several_threads_at_once(vae: Autoencoder) -> None:
    expected = [decoded(vae, seed) for seed in range(3)]
    assert not torch.equal(expected[0], expected[1])
    found: list[tuple[int, Tensor]] = []
    together = threading.Barrier(3)

    def work(seed: int) -> None:
        for _ in range(3):
            together.wait(60)
            if seed == 0:
                weight_cache.clear()  # while the others use it
            found.append((seed, decoded(vae, seed)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    assert all(torch.equal(image, expected[seed]) for seed, image in found)


def test_scratch_memory_is_freed_with_its_thread() -> None:
    x, weight = torch.randn(1, 64, 16, 16), torch.randn(64, 64, 3, 3)
    held: list[weakref.ref[Tensor]] = []

    def work() -> None:
        winograd_conv(x, weight, CONV3X3, None, Epilogue(), 1)
        held.extend(map(weakref.ref, vars(scratch)["_buffers"].values()))
        assert all(one() is not None for one in held)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    gc.collect()
    assert held and all(one() is None for one in held)


class _Mallinfo(ctypes.Structure):
    """The result of glibc's ``mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


MALLINFO = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
COUNTED = pytest.mark.skipif(MALLINFO is None, reason="needs mallinfo2 of glibc 2.33 or newer")


def allocated() -> int:
    """Bytes allocated and not freed, without what the allocator keeps in reserve, and whether or
    not they are resident."""
    assert MALLINFO is not None
    MALLINFO.restype = _Mallinfo
    info = MALLINFO()
    return int(info.uordblks + info.hblkhd)


UNCACHED = "winograd without a cached weight"
WINOGRAD, IN_PLACE, UPSAMPLE = "winograd", "winograd in place", "winograd after upsampling"


def resnet(channels: int, out_channels: int) -> nn.Module:
    return ResnetBlock2D(channels, out_channels, temb_channels=None, groups=4, eps=1e-6)


def methods(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> set[str]:
    """The methods of convolutions during a call; watches the functions that compute them."""
    found = set()

    def by_winograd(x: Any, weight: Any, scheme: Any, *others: Any) -> Any:
        *_, in_place, products = others
        if products is uncached_products:
            found.add(UNCACHED)
        else:
            found.add(UPSAMPLE if scheme is UPSAMPLE_CONV else IN_PLACE if in_place else WINOGRAD)
        return winograd_conv(x, weight, scheme, *others)

    def by(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: [found.add(name), function(*args)][1]

    with monkeypatch.context() as patch:
        patch.setattr(conv, "winograd_conv", by_winograd)
        patch.setattr(conv, "direct_conv", by("direct", conv.direct_conv))
        run()
    return found


def growth(run: Callable[[], object], count: int) -> int:
    """The least growth over three series of ``count`` calls: what is kept for later shows in one of
    them, what each call leaves behind in all."""
    grown = []
    for _ in range(3):
        before = allocated()
        for _ in range(count):
            run()
        grown.append(allocated() - before)
    return min(grown)


# less than a float64 for each of 12 channels and 340 calls
LITTLE = 16_384


@pytest.mark.slow
@COUNTED
@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        (lambda: resnet(8, 12), (8, 13, 14), {"direct"}),
        (lambda: resnet(96, 96), (96, 24, 24), {WINOGRAD, IN_PLACE}),
        (lambda: resnet(128, 128), (128, 12, 12), {UNCACHED}),
        (lambda: Upsample2D(96), (96, 24, 24), {UPSAMPLE}),
    ],
    ids=["direct", "winograd", "uncached", "upsample"],
)
def test_no_growth_over_1000_calls(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    expected: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gc.collect()
    before = weight_cache.memory
    run = partial(called, make().requires_grad_(False), torch.randn(1, *shape))
    assert methods(monkeypatch, run) == expected
    growth(run, 60)
    held = weight_cache.memory
    assert (held > before) == (expected not in ({"direct"}, {UNCACHED}))
    assert growth(run, 340) < LITTLE
    assert weight_cache.memory == held
    del run
    gc.collect()
    assert weight_cache.memory == before


def called(block: nn.Module, x: Tensor) -> None:
    with sdconv.backend("fast"):
        block(x)


@pytest.mark.slow
@COUNTED
def test_no_growth_over_many_decodes(vae: Autoencoder, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(1, 4, 12, 12)

    def run() -> None:
        with torch.inference_mode(), sdconv.backend("fast"):
            vae.decode(latents)

    assert methods(monkeypatch, run) >= {WINOGRAD, IN_PLACE, UNCACHED}
    growth(run, 3)
    held = weight_cache.memory
    assert growth(run, 20) < LITTLE
    assert weight_cache.memory == held


@COUNTED
def test_a_few_numbers_left_by_each_call_are_noticed() -> None:
    left: list[Tensor] = []
    assert growth(lambda: left.append(torch.ones(12, dtype=torch.float64)), 340) > LITTLE
