"""The tiny autoencoder on the fast backend: the reference's results, or the reference itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import seeded
from helpers.numbers import error
from helpers.slow import first_of
from torch import Tensor, nn
from torch.nn.utils import parametrize

import sdconv
from sdconv.fast import tiny as fast
from sdconv.fast.cpu.conv import plan_for
from sdconv.models.tiny import AutoencoderTiny, TinyBlock

WITHIN = 1e-5
IMAGE, LATENTS = (2, 3, 72, 104), (2, 4, 11, 13)


@pytest.fixture(scope="module")
def network() -> AutoencoderTiny:
    """TAESD's own size, with few blocks."""
    config = sdconv.AutoencoderTinyConfig.from_json(
        {"num_encoder_blocks": [1, 1, 1, 1], "num_decoder_blocks": [1, 1, 1, 1]}, "TAESD"
    )
    return seeded.network(config).requires_grad_(False)  # type: ignore[no-any-return]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Spies on the fast convolutions: the names of those called, in order."""
    found: list[str] = []
    for name in ("conv3x3", "upsample_conv"):
        inner = getattr(fast, name)

        def seen(*args: Any, name: str = name, inner: Any = inner, **kwargs: Any) -> Any:
            found.append(name)
            return inner(*args, **kwargs)

        monkeypatch.setattr(fast, name, seen)
    yield found


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def both(run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What a call gives on the reference and on the fast backend."""
    expected = run()
    with sdconv.backend("fast"):
        return expected, run()


@torch.no_grad()
def test_decode(network: AutoencoderTiny, calls: list[str]) -> None:
    expected, out = both(lambda: network.decode(drawn(*LATENTS)).sample)
    assert error(out, expected) < WITHIN
    assert not torch.equal(out, expected)
    # at the lowest resolution, torch's own kernel is as fast
    assert calls == ["upsample_conv"] * 2 + ["conv3x3"] * 3 + ["upsample_conv"] + ["conv3x3"] * 3
    assert out.is_contiguous()


@torch.no_grad()
def test_encode(network: AutoencoderTiny, calls: list[str]) -> None:
    expected, out = both(lambda: network.encode(drawn(*IMAGE)).latents)
    assert error(out, expected) < WITHIN
    assert calls == ["conv3x3"] * 6


@torch.no_grad()
@pytest.mark.parametrize("dtype", first_of([torch.bfloat16, torch.float16]))
def test_16_bits(network: AutoencoderTiny, dtype: torch.dtype) -> None:
    exact = network.decode(drawn(*LATENTS)).sample
    half = seeded.network(network.config).to(dtype).requires_grad_(False)
    half.load_state_dict(network.state_dict())
    reference, out = both(lambda: half.decode(drawn(*LATENTS).to(dtype)).sample)
    assert out.dtype == dtype
    assert error(out.float(), exact) < 1.5 * error(reference.float(), exact)


@torch.no_grad()
@pytest.mark.parametrize("kind", [k for k, c in seeded.WITH_PEER.items() if "Tiny" in c.class_name])
def test_every_kind(kind: str) -> None:
    small = seeded.network(seeded.WITH_PEER[kind]).requires_grad_(False)
    x = drawn(1, small.config.latent_channels, 6, 5)
    assert error(*both(lambda: small.decode(x).sample)) < WITHIN


@torch.no_grad()
def test_a_relu_that_is_left_out_is_noticed(
    network: AutoencoderTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Injects a fault: the first convolution's ReLU is lost."""
    inner = fast.conv3x3

    def faulty(x: Tensor, weight: Tensor, prologue: None, epilogue: Any, **options: Any) -> Any:
        if epilogue.residual is None and not options["in_place"]:
            epilogue = fast.Epilogue(epilogue.bias)
        return inner(x, weight, prologue, epilogue, **options)

    monkeypatch.setattr(fast, "conv3x3", faulty)
    expected, out = both(lambda: network.decode(drawn(*LATENTS)).sample)
    assert error(out, expected) > 1e-2


@torch.no_grad()
def test_values_that_are_not_finite(network: AutoencoderTiny) -> None:
    x = drawn(*LATENTS)
    x[0, 0, 3, 4] = torch.nan
    expected, out = both(lambda: network.decode(x).sample)
    assert torch.equal(out.isnan(), expected.isnan())
    assert out.isnan().any() and not out.isnan().all()


def double(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return 2 * out


CHANGED: dict[str, Callable[[TinyBlock], object]] = {
    "a convolution with a hook": lambda block: block.conv[2].register_forward_hook(double),
    "an activation with a hook": lambda block: block.conv[1].register_forward_hook(double),
    "the last activation": lambda block: setattr(block, "fuse", nn.GELU()),
    "the sequence with a hook": lambda block: block.conv.register_forward_hook(double),
    "circular padding": lambda block: setattr(block.conv[0], "padding_mode", "circular"),
    "a parametrization": lambda block: parametrize.register_parametrization(
        block.conv[0], "weight", Doubled()
    ),
}


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_block_is_computed_plainly(change: str, calls: list[str]) -> None:
    torch.manual_seed(0)
    block, x = TinyBlock(64), drawn(1, 64, 24, 20)
    plain = block(x)
    CHANGED[change](block)
    block.conv[0]._reversed_padding_repeated_twice = [1, 1, 1, 1]
    expected, out = both(lambda: block(x))
    assert torch.equal(out, expected)
    assert error(out, plain) > 1e-3
    assert calls == []


def test_gradients_are_those_of_the_plain_code() -> None:
    block, x = TinyBlock(64), drawn(1, 64, 24, 20).requires_grad_()
    expected, out = both(lambda: torch.autograd.grad(block(x).square().sum(), x)[0])
    assert torch.equal(out, expected)


@torch.no_grad()
def test_few_channels_are_left_to_torch(calls: list[str]) -> None:
    block, x = TinyBlock(8), drawn(1, 8, 24, 20)
    assert plan_for("conv3x3", x, block.conv[0].weight, False).method == "direct"
    assert torch.equal(*both(lambda: block(x)))
    assert calls == []


def test_compiled(network: AutoencoderTiny) -> None:
    with sdconv.backend("fast"):
        compiled = torch.compile(network.decoder, fullgraph=True, backend="eager")
        out = compiled(drawn(*LATENTS))
    assert error(out, network.decoder(drawn(*LATENTS))) < WITHIN
    torch.compiler.reset()
