"""The arithmetic of a merge, against the LoRA's layers run as layers of their own."""

from __future__ import annotations

import pytest
import torch
from helpers.numbers import error
from torch import nn

import sdconv


def test_locon_with_a_mid_matrix() -> None:
    # a 1x1 convolution, one with the kernel, and a 1x1 convolution again
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1))
    parts = [nn.Conv2d(6, 3, 1), nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 1)]
    x, scale, alpha = torch.randn(2, 6, 9, 7), 0.4, 1.5
    with torch.no_grad():
        for part in parts:
            part.bias.zero_()
        added = nn.Sequential(*parts)(x) * (scale * alpha / 3)
        before = model(x)
        names = ("lora_down.weight", "lora_mid.weight", "lora_up.weight")
        tensors = {f"lora_unet_0.{n}": p.weight.data for n, p in zip(names, parts, strict=True)}
        tensors["lora_unet_0.alpha"] = torch.tensor(alpha)
        sdconv.merge_lora(model, tensors, scale)
        assert torch.allclose(model(x), before + added, atol=1e-6)
        assert not torch.allclose(model(x), before, atol=1e-2)


@pytest.mark.parametrize(
    ("kernel", "given", "up"),
    [
        (3, {"padding": 1, "stride": 2}, (8, 3, 1, 1)),
        (3, {"padding": 1}, (8, 3)),
        (1, {}, (8, 3, 1, 1)),
    ],
)
def test_convolutions(kernel: int, given: dict[str, int], up: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    layer, down = (nn.Conv2d(6, channels, kernel, **given) for channels in (8, 3))
    model, x, after = nn.ModuleDict({"a": layer}), torch.randn(2, 6, 9, 7), torch.randn(8, 3)
    with torch.no_grad():
        before = layer(x)
        low = nn.functional.conv2d(x, down.weight, **given)
        added = nn.functional.conv2d(low, after[..., None, None])
        tensors = {"a.lora_A.weight": down.weight.data, "a.lora_B.weight": after.view(up)}
        sdconv.merge_lora(model, tensors)
        assert torch.allclose(layer(x), before + added, atol=1e-5)


def test_linear_matrices_on_a_1x1_convolution_and_vice_versa() -> None:
    torch.manual_seed(2)
    a, b = torch.randn(3, 6), torch.randn(8, 3)
    for layer, extra in ((nn.Conv2d(6, 8, 1), ()), (nn.Linear(6, 8), (1, 1))):
        model = nn.ModuleDict({"a": layer})
        before = layer.weight.detach().clone()
        tensors = {"a.lora_A.weight": a.view(3, 6, *extra), "a.lora_B.weight": b.view(8, 3, *extra)}
        sdconv.merge_lora(model, tensors)
        assert torch.allclose(layer.weight.flatten(1), before.flatten(1) + b @ a, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_summed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    model = nn.ModuleDict({"a": nn.Linear(64, 48)}).to(dtype)
    down, up = torch.randn(4, 64).half(), torch.randn(48, 4).half()
    before = model["a"].weight.detach().clone()
    sdconv.merge_lora(model, {"a.lora_A.weight": down, "a.lora_B.weight": up}, 1 / 3)
    wide = before.double() + (up.double() @ down.double()) / 3
    # half a unit in the last place, plus the error of the arithmetic
    least = 2e-15 if dtype == torch.float64 else 3e-7
    assert error(model["a"].weight, wide) < torch.finfo(dtype).eps / 2 + least
    assert model["a"].weight.dtype == dtype
