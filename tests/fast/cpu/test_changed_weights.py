"""However weights change, the fast backend computes with what they are now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from helpers import implementations, pipelines
from helpers.loras import kohya, matrices
from helpers.numbers import error
from torch import Tensor, nn

import sdconv
from sdconv.backends import set_backend
from sdconv.fast.cpu.conv import plan_for
from sdconv.fast.cpu.weight_cache import weight_cache
from sdconv.models.blocks import ResnetBlock2D, Upsample2D

WITHIN = 2e-5


class Parts(nn.Module):
    """A ResNet block and an upsampling, both of which compute with packed weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.resnet = ResnetBlock2D(128, 128, temb_channels=None, groups=8, eps=1e-6)
        self.upsampler = Upsample2D(128)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsampler(self.resnet(x))  # type: ignore[no-any-return]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(1, 128, 48, 40, generator=torch.Generator().manual_seed(1))


def convolutions(parts: nn.Module) -> list[nn.Conv2d]:
    return [module for module in parts.modules() if isinstance(module, nn.Conv2d)]


def both(parts: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of the fast backend and of the reference."""
    with torch.no_grad():
        with sdconv.backend("fast"):
            out = parts(x)
        return out, parts(x)


def learn(parts: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.AdamW(parts.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        with sdconv.backend("fast"):
            parts(x).square().mean().backward()
        optimizer.step()


def merge_and_unmerge_by_peft(parts: nn.Module, x: Tensor) -> None:
    config = peft.LoraConfig(r=2, target_modules=["conv1", "conv"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, parts)
    wrapped = [module for module in parts.modules() if isinstance(module, peft.tuners.lora.Conv2d)]
    assert len(wrapped) == 2
    for layer in wrapped:
        layer.merge()
    parts.resnet.conv1 = parts.resnet.conv1.get_base_layer()  # type: ignore[union-attr]
    parts.upsampler.conv = parts.upsampler.conv.get_base_layer()  # type: ignore[union-attr]


def of_each(change: Callable[[Tensor], Any]) -> Callable[[nn.Module, Tensor], None]:
    def every(parts: nn.Module, x: Tensor) -> None:
        for conv in convolutions(parts):
            change(conv.weight)

    return every


def load(parts: nn.Module, x: Tensor) -> None:
    state = {name: tensor.flip(0) for name, tensor in parts.state_dict().items()}
    parts.load_state_dict(state)


def assign(parts: nn.Module, x: Tensor) -> None:
    state = {name: tensor.flip(0) for name, tensor in parts.state_dict().items()}
    parts.load_state_dict(state, assign=True)


def exchange(parts: nn.Module, x: Tensor) -> None:
    resnet: Any = parts.resnet
    resnet.conv1.weight, resnet.conv2.weight = resnet.conv2.weight, resnet.conv1.weight


CHANGES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "training": learn,
    "to bfloat16 and back": lambda parts, x: parts.bfloat16().float(),
    "weights loaded": load,
    "weights assigned": assign,
    "two weights exchanged": exchange,
    "a sum that its version does not show": of_each(lambda weight: weight.data.add_(0.05)),
    "data replaced": of_each(lambda weight: setattr(weight, "data", weight.data.flip(1))),
    "negated": of_each(lambda weight: weight.data.neg_()),
    "one number": of_each(lambda weight: weight.data[5, 6, 1, 1].add_(9)),
    "through numpy": of_each(lambda weight: weight.detach().numpy().__imul__(1.5)),
    "merged by PEFT": merge_and_unmerge_by_peft,
}


@pytest.mark.parametrize("change", CHANGES)
def test_packed_weights_are_never_stale(change: str, x: Tensor) -> None:
    parts = Parts()
    plans = [plan_for("conv3x3", x, conv.weight, False) for conv in convolutions(parts)]
    assert all(plan.method == "winograd" for plan in plans)
    out, before = both(parts, x)
    assert error(out, before) < WITHIN
    CHANGES[change](parts, x)
    out, after = both(parts, x)
    assert error(out, after) < WITHIN
    # the change made a difference
    assert error(before, after) > 10 * WITHIN


def test_weights_of_inference_mode(x: Tensor) -> None:
    with torch.inference_mode():
        parts = Parts()
        for conv in convolutions(parts):
            assert conv.weight.is_inference()
        for factor in (1, 2, -1):
            for conv in convolutions(parts):
                conv.weight.mul_(factor)
            out, expected = both(parts, x)
            assert error(out, expected) < WITHIN


@pytest.mark.parametrize("kind", ["sdconv", "patched"])
def test_fused_and_unfused_in_a_pipeline(kind: str) -> None:
    pipe = implementations.pipeline(kind, "text")
    unet = pipe.unet
    set_backend(unet, "fast")
    sample, text = torch.randn(1, 4, 12, 16), torch.randn(1, 7, pipelines.TEXT_WIDTH)

    def run() -> Tensor:
        with torch.no_grad():
            return unet(sample, 5, text).sample  # type: ignore[no-any-return]

    def same_as_reference() -> Tensor:
        fast = run()
        with sdconv.backend("reference"):
            expected = run()
        assert error(fast, expected) < WITHIN
        return expected

    plain = same_as_reference()
    made = matrices(unet, only="conv", alpha=1.0)
    pipe.load_lora_weights(kohya(made))
    wrapped = same_as_reference()
    pipe.fuse_lora(components=["unet"])
    fused = same_as_reference()
    pipe.unfuse_lora(components=["unet"])
    assert error(same_as_reference(), wrapped) < 1e-4
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    # merged into the very weights that were used before
    assert error(same_as_reference(), fused) < 1e-5
    assert error(plain, fused) > 1e-2


def test_merged_by_sdconv(x: Tensor) -> None:
    parts = Parts()
    out, before = both(parts, x)
    made = matrices(parts, only="conv", alpha=1.0)
    tensors = {
        f"{name}.lora_{word}.weight": matrix
        for name, (down, up, _) in made.items()
        for word, matrix in (("A", down), ("B", up))
    }
    merged = sdconv.merge_lora(parts, tensors, scale=0.1)
    out, after = both(parts, x)
    assert error(out, after) < WITHIN < error(before, after)
    merged.unmerge()
    out, again = both(parts, x)
    assert torch.equal(again, before)
    assert error(out, before) < WITHIN


def test_memory_is_counted_while_weights_change(x: Tensor) -> None:
    parts = Parts()
    before = weight_cache.memory
    both(parts, x)
    held = weight_cache.memory
    # 36 for each nine numbers of a weight, 25 for the upsampling's
    winograd = sum(4 * conv.weight.numel() * 4 for conv in convolutions(parts.resnet))
    assert held - before == winograd + 25 * parts.upsampler.conv.weight.numel() // 9 * 4
    for _ in range(5):
        of_each(lambda weight: weight.data.add_(0.01))(parts, x)
        both(parts, x)
    assert weight_cache.memory == held
    del parts
    assert weight_cache.memory == before


def test_without_room_for_packed_weights_none_is_kept(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = Parts()
    expected = both(parts, x)[1]
    weight_cache.clear()
    monkeypatch.setattr(weight_cache, "limit", weight_cache.memory)
    out, _ = both(parts, x)
    assert weight_cache.memory <= weight_cache.limit
    assert error(out, expected) < 5e-6


def test_a_packed_shortcut_keeps_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = ResnetBlock2D(128, 64, temb_channels=None, groups=8, eps=1e-6)
    x = torch.randn(1, 128, 48, 48)
    weight_cache.clear()
    expected = both(block, x)[1]
    whole = weight_cache.memory
    weight_cache.clear()
    monkeypatch.setattr(weight_cache, "limit", whole - 1)
    out, _ = both(block, x)
    assert 0 < weight_cache.memory <= weight_cache.limit
    assert error(out, expected) < 5e-6
