"""The fast backend again and again, and from several threads at once: the same bits, no growth."""

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
from helpers import seeded
from torch import Tensor, nn

import sdconv
from sdconv.fast.cpu import conv as fused
from sdconv.fast.cpu import packed
from sdconv.fast.cpu.tiling import scratch
from sdconv.fast.cpu.weight_cache import prepared
from sdconv.fast.cpu.winograd import DOUBLED, PLAIN
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
    # whether weights are prepared now or were before
    prepared.clear()
    assert torch.equal(decoded(vae, 0), once)
    scratch.release()
    assert torch.equal(decoded(vae, 0), once)


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_any_height_of_strips(rows: int) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 68, 23, 33, generator=random)
    weight = torch.randn(40, 68, 3, 3, generator=random)
    for one, other in (
        (
            fused.winograd_convolution(x, weight)[0],
            fused.winograd_convolution(x, weight, tile_rows=rows)[0],
        ),
        (
            fused.winograd_convolution(x, weight, scheme=DOUBLED)[0],
            fused.winograd_convolution(x, weight, scheme=DOUBLED, tile_rows=rows)[0],
        ),
    ):
        assert float((one - other).abs().max() / one.abs().max()) < 1e-6


def test_several_threads_at_once(vae: Autoencoder) -> None:
    expected = [decoded(vae, seed) for seed in range(3)]
    assert not torch.equal(expected[0], expected[1])
    found: list[tuple[int, Tensor]] = []
    together = threading.Barrier(3)

    def work(seed: int) -> None:
        for _ in range(3):
            together.wait(60)
            if seed == 0:
                prepared.clear()  # under the others' hands
            found.append((seed, decoded(vae, seed)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    assert all(torch.equal(picture, expected[seed]) for seed, picture in found)


def test_a_thread_takes_its_working_memory_along() -> None:
    x, weight = torch.randn(1, 64, 16, 16), torch.randn(64, 64, 3, 3)
    held: list[weakref.ref[Tensor]] = []

    def work() -> None:
        fused.winograd_convolution(x, weight)
        held.extend(map(weakref.ref, vars(scratch)["_held"].values()))
        assert all(one() is not None for one in held)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    gc.collect()
    assert held and all(one() is None for one in held)


class _Mallinfo(ctypes.Structure):
    """What glibc's ``mallinfo2`` gives."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


MALLINFO = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
COUNTED = pytest.mark.skipif(MALLINFO is None, reason="counts what glibc 2.33 or newer handed out")


def handed_out() -> int:
    """Bytes that the allocator has handed out and not got back, whatever it keeps beside them and
    whatever of them the system has put away."""
    assert MALLINFO is not None
    MALLINFO.restype = _Mallinfo
    info = MALLINFO()
    return int(info.uordblks + info.hblkhd)


PLAINLY, IN_PLACE, DOUBLING = "winograd", "winograd in place", "winograd of a doubled map"


def resnet(channels: int, out_channels: int) -> nn.Module:
    return ResnetBlock2D(channels, out_channels, temb_channels=None, groups=4, eps=1e-6)


def methods(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> set[str]:
    """What convolutions are computed by during a call."""
    found = set()
    right = fused.winograd_convolution

    def by_winograd(*args: Any, scheme: Any = PLAIN, in_place: bool = False, **options: Any) -> Any:
        found.add(DOUBLING if scheme is DOUBLED else IN_PLACE if in_place else PLAINLY)
        return right(*args, scheme=scheme, in_place=in_place, **options)

    def by(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: [found.add(name), function(*args)][1]

    with monkeypatch.context() as patch:
        patch.setattr(fused, "winograd_convolution", by_winograd)
        patch.setattr(packed, "convolution", by("packed", packed.convolution))
        patch.setattr(fused, "direct", by("direct", fused.direct))
        run()
    return found


def growth(run: Callable[[], object], count: int) -> int:
    """Bytes that this process holds more after every one of three stretches of so many calls: what
    is kept for later is in one, what each call leaves is in all."""
    grown = []
    for _ in range(3):
        before = handed_out()
        for _ in range(count):
            run()
        grown.append(handed_out() - before)
    return min(grown)


# less than a float64 for each of 12 channels and 340 calls
LITTLE = 16_384


@COUNTED
@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        (lambda: resnet(8, 12), (8, 13, 14), {"direct"}),
        (lambda: resnet(96, 96), (96, 16, 16), {PLAINLY, IN_PLACE}),
        (lambda: resnet(128, 128), (128, 4, 3), {"packed"}),
        (lambda: Upsample2D(12), (12, 13, 14), {DOUBLING}),
    ],
    ids=["direct", "winograd", "packed", "doubling"],
)
def test_no_growth_over_1000_calls(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    expected: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gc.collect()
    before = prepared.memory
    run = partial(called, make().requires_grad_(False), torch.randn(1, *shape))
    assert methods(monkeypatch, run) == expected
    growth(run, 60)
    held = prepared.memory
    assert (held > before) == (expected != {"direct"})
    assert growth(run, 340) < LITTLE
    assert prepared.memory == held
    del run
    gc.collect()
    assert prepared.memory == before


def called(block: nn.Module, x: Tensor) -> None:
    with sdconv.backend("fast"):
        block(x)


@COUNTED
def test_no_growth_over_many_decodes(vae: Autoencoder, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(1, 4, 8, 8)

    def run() -> None:
        with torch.inference_mode(), sdconv.backend("fast"):
            vae.decode(latents)

    assert methods(monkeypatch, run) >= {PLAINLY, IN_PLACE, DOUBLING}
    growth(run, 3)
    held = prepared.memory
    assert growth(run, 20) < LITTLE
    assert prepared.memory == held


@COUNTED
def test_a_few_numbers_left_by_each_call_are_noticed() -> None:
    left: list[Tensor] = []
    assert growth(lambda: left.append(torch.ones(12, dtype=torch.float64)), 340) > LITTLE
