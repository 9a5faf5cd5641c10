"""Other padding than zeros, and replaced methods of convolutions: computed like the reference, by
the fast backend and under streaming."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import seeded
from helpers.numbers import error
from helpers.slow import first_of
from torch import Tensor, nn
from torch.nn import functional

import sdconv

CONFIG = seeded.kl((64, 64), 4, True, layers_per_block=1)
LATENTS = torch.randn(1, 4, 21, 18, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(1, 3, 43, 36, generator=torch.Generator().manual_seed(2))
MODES = ("circular", "reflect", "replicate")


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def along_x(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A `_conv_forward` as programs for panoramas set it."""
    rows, columns = conv.padding
    x = functional.pad(x, (columns, columns, 0, 0), mode="circular")
    x = functional.pad(x, (0, 0, rows, rows))
    return functional.conv2d(x, weight, bias, conv.stride, 0, conv.dilation, conv.groups)


def set_mode(mode: str) -> Callable[[nn.Module], None]:
    def change(network: nn.Module) -> None:
        for conv in convolutions(network):
            conv.padding_mode = mode  # type: ignore[assignment]

    return change


def set_conv_forward(network: nn.Module) -> None:
    for conv in convolutions(network):
        conv._conv_forward = along_x.__get__(conv)  # type: ignore[method-assign]


def dilate(network: nn.Module) -> None:
    for conv in convolutions(network):
        if conv.kernel_size == (3, 3) and conv.stride == (1, 1):
            conv.dilation = conv.padding = (2, 2)


def one_layer(network: Any) -> None:
    network.decoder.up_blocks[0].resnets[0].conv2.padding_mode = "replicate"
    network.encoder.conv_out.padding_mode = "circular"


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    **{mode: set_mode(mode) for mode in MODES},
    "_conv_forward": set_conv_forward,
    "dilation": dilate,
    "one layer": one_layer,
}


def outputs(network: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return network.decode(LATENTS).sample, network.encode(IMAGES).latent_dist.parameters


def check(network: Any) -> tuple[Tensor, Tensor]:
    """Compares both backends, streamed and not, with the reference; returns its outputs."""
    expected = outputs(network)
    for backend in ("fast", "reference"):
        for streams in (False, True):
            network.enable_tiling(streams)
            with sdconv.backend(backend):
                for got, wanted in zip(outputs(network), expected, strict=True):
                    assert error(got, wanted) < 2e-5, (backend, streams)
    network.disable_tiling()
    return expected


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_network(change: str) -> None:
    network = seeded.network(CONFIG)
    ordinary = outputs(network)
    CHANGES[change](network)
    for got, before in zip(check(network), ordinary, strict=True):
        assert error(got, before) > 1e-3, "the control: the change matters"


@pytest.mark.parametrize("method", ["_conv_forward", "forward"])
def test_a_method_of_torchs_class_is_replaced(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = seeded.network(CONFIG)
    ordinary = outputs(network)
    replacement = (
        along_x
        if method == "_conv_forward"
        else lambda conv, x: along_x(conv, x, conv.weight, conv.bias)
    )
    monkeypatch.setattr(nn.Conv2d, method, replacement)
    for got, before in zip(check(network), ordinary, strict=True):
        assert error(got, before) > 1e-3, "the control: the change matters"


def test_torchs_function_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    network = seeded.network(CONFIG)
    ordinary, plain = outputs(network), torch.conv2d

    def replacement(x: Tensor, *given: Any, **named: Any) -> Tensor:
        return plain(x, *given, **named) * 1.01

    monkeypatch.setattr(functional, "conv2d", replacement)
    for got, before in zip(check(network), ordinary, strict=True):
        assert error(got, before) > 1e-3, "the control: the change matters"


@pytest.mark.slow
@pytest.mark.parametrize("mode", first_of(MODES))
def test_strips_of_any_height(mode: str) -> None:
    from helpers.streamed import call, executed, planned

    network = seeded.network(CONFIG).double()
    set_mode(mode)(network)
    for direction, x in (("decode", LATENTS), ("encode", IMAGES)):
        expected = call(network, direction, x.double(), "reference")
        for rows in (1, 3):
            plan = planned(
                network, direction, x.double(), rows=rows, spill=False, backend="reference"
            )
            assert error(executed(plan, x.double()), expected) < 1e-10


def test_a_single_row_cannot_be_reflected() -> None:
    network: Any = seeded.network(CONFIG)
    set_mode("reflect")(network)
    row = LATENTS[:, :, :1]
    with pytest.raises(RuntimeError, match=r"[Pp]adding size"):
        network.decode(row)
    network.enable_tiling()
    with pytest.raises(RuntimeError, match=r"[Pp]adding size"):
        network.decode(row)


def test_a_limit_counts_layers_that_need_the_whole_feature_map() -> None:
    network: Any = seeded.network(CONFIG)
    set_conv_forward(network)
    network.enable_streaming("26MB")
    with pytest.raises(sdconv.InputError, match="memory limit cannot be met"):
        network.decode(LATENTS.repeat(1, 1, 4, 4))


def test_a_forward_of_its_own_is_refused() -> None:
    network: Any = seeded.network(CONFIG)
    network.decoder.conv_in.forward = lambda x: x
    network.enable_tiling()
    with pytest.raises(sdconv.InputError, match=r"decoder\.conv_in.*a forward of its own"):
        network.decode(LATENTS)
