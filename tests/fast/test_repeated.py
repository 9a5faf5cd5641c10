"""The fast backend again and again, and from several threads at once: the same bits, no growth."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from pathlib import Path

import pytest
import seeded
import torch
from torch import Tensor, nn

import sdconv
from sdconv.blocks import ResnetBlock2D, Upsample2D
from sdconv.network import Autoencoder
from sdconv.ops import fused
from sdconv.ops.prepared import prepared
from sdconv.ops.strips import scratch
from sdconv.ops.winograd import DOUBLED


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


def anonymous() -> int:
    """Bytes of this process that are in no file."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_no_growth_over_1000_calls() -> None:
    gc.collect()
    before = prepared.memory
    block = nn.Sequential(
        ResnetBlock2D(8, 12, temb_channels=None, groups=4, eps=1e-6), Upsample2D(12)
    ).requires_grad_(False)
    calls(block, 200)
    held, resident = prepared.memory, anonymous()
    assert held > before
    calls(block, 1000)
    assert prepared.memory == held
    # a float64 for each channel and call would be 100 kB
    assert anonymous() - resident < 100_000
    del block
    gc.collect()
    assert prepared.memory == before


def calls(block: nn.Module, count: int) -> None:
    x = torch.randn(1, 8, 13, 14)
    with sdconv.backend("fast"):
        for _ in range(count):
            block(x)
