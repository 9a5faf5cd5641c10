"""An autoencoder that computes an image in parts has no whole feature maps: a capture or an edit
inside it is refused when it begins."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import diffusers
import pytest
import torch
from helpers import pipelines, seeded
from torch import nn

import sdconv
from sdconv import SdconvError

CONFIG = seeded.kl((32, 32), 4, True, layers_per_block=1)
INSIDE = "decoder.mid_block.resnets.0"

Enter = Callable[[Any, str], AbstractContextManager[Any]]
WAYS: dict[str, Enter] = {
    "capture": lambda target, name: sdconv.capture(target, name),
    "edit": lambda target, name: sdconv.edit(target, {name: lambda x, context: x}),
    "reuse": lambda target, name: sdconv.features.reuse(target, name, steps=None),
}


@pytest.fixture
def vae() -> Any:
    return seeded.network(CONFIG)


@pytest.mark.parametrize("way", WAYS)
def test_streaming_is_refused_at_entry(vae: Any, way: str) -> None:
    vae.enable_streaming()
    entered = False
    with pytest.raises(SdconvError, match="streaming is on") as raised:
        with WAYS[way](vae, INSIDE):
            entered = True
    assert not entered
    assert "disable_streaming() of the network" in str(raised.value)
    vae.disable_streaming()
    with torch.no_grad(), WAYS[way](vae, INSIDE):
        vae.decode(torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize("way", WAYS)
def test_tiling_of_diffusers_is_refused_and_named(way: str) -> None:
    vae = pipelines.vae(2)
    vae.enable_tiling()
    with pytest.raises(SdconvError, match="tiling is on") as raised, WAYS[way](vae, INSIDE):
        pass
    assert "disable_tiling()" in str(raised.value)
    vae.disable_tiling()
    with torch.no_grad(), WAYS[way](vae, INSIDE):
        vae.decode(torch.zeros(1, 4, 4, 4))


def test_another_modules_streaming_that_is_off_is_not_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1))
    network.streaming = False  # type: ignore[assignment]
    with torch.no_grad(), sdconv.capture(network, "0") as maps:
        network(torch.zeros(1, 3, 4, 4))
    assert list(maps) == ["0"]


def test_a_container_is_searched(vae: Any) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 3, 1)
            self.inner = nn.ModuleDict({"vae": vae})

        def forward(self, x: torch.Tensor) -> Any:
            return self.inner["vae"](self.first(x)).sample

    both, x = Both(), torch.zeros(1, 3, 8, 8)
    vae.enable_streaming(progress=False)
    with pytest.raises(SdconvError, match=r"disable_streaming\(\) of inner\.vae"):
        with sdconv.capture(both, "*"):
            both(x)
    with torch.no_grad(), sdconv.capture(both, ["first", "inner.vae"]) as maps:  # outside of it
        both(x)
    assert list(maps) == ["first", "inner.vae"]
    vae.disable_streaming()
    with torch.no_grad(), sdconv.capture(both, "*") as maps:
        both(x)
    assert f"inner.vae.{INSIDE}" in maps


def test_a_pipelines_unet_can_be_captured_while_its_vae_is_tiled() -> None:
    pipe = pipelines.pipeline("text")
    pipe.vae.enable_tiling()
    with sdconv.capture(pipe, "unet.mid_block") as maps:
        pipelines.run(pipe, "text")
    assert len(maps.series("unet.mid_block")) == 2
    with pytest.raises(SdconvError, match=r"disable_tiling\(\) of vae"):
        with sdconv.capture(pipe, ["unet.mid_block", "vae.decoder.*"]):
            pass
    assert isinstance(pipe.vae, diffusers.AutoencoderKL)
