"""The share of each part: each operation belongs to one; the fast backend's kernels do too."""

from __future__ import annotations

import pytest
import torch
from helpers.paths import WEIGHTS

import sdconv
from scripts.bench.parts import PARTS, kernel_names, measured, part_of
from sdconv.fast.cpu.kernels import kernels_for


@pytest.mark.parametrize(
    ("operation", "part"),
    [
        ("aten::mkldnn_convolution", "products"),
        ("aten::addmm", "products"),
        ("aten::add_", "norms and activations"),
        ("aten::native_group_norm", "norms and activations"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::copy_", "memory"),
        ("sdconv kernel: bmm", "products"),
        ("sdconv kernel: input_transform", "transforms"),
        ("aten::never_heard_of", "the rest"),
    ],
)
def test_parts_of_operations(operation: str, part: str) -> None:
    assert part_of(operation) == part and part in PARTS


@pytest.mark.slow
@pytest.mark.parametrize("backend", sdconv.backends.BACKENDS)
def test_a_decode(backend: str) -> None:
    vae = sdconv.load(WEIGHTS / "tiny-vae.safetensors", dtype=torch.float32)
    latents, kernels = torch.randn(1, 4, 32, 32), kernels_for(torch.float32)
    before = kernels.bmm

    def run() -> None:
        with sdconv.backend(backend), torch.inference_mode():
            vae.decode(latents)

    run()
    total, seconds = measured(run, 2)
    assert kernels.bmm is before
    assert set(seconds) == set(PARTS) and sum(seconds.values()) == pytest.approx(total, rel=0.2)
    assert seconds["products"] > 0 and seconds["norms and activations"] > 0
    assert (seconds["transforms"] > 0) == (backend == "fast")


def test_every_kernel_has_a_part() -> None:
    names = kernel_names()
    assert {"bmm", "multiply_tiles"} <= set(names)
    assert [name for name in names if part_of(f"sdconv kernel: {name}") == "the rest"] == []
