"""What a dry run tells of each place: channels, strides, receptive fields, multiplies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from sdconv.analysis.anatomy import Layer, Recorder, View
from sdconv.config import (
    AutoencoderKLConfig,
    AutoencoderKLFlux2Config,
    AutoencoderTinyConfig,
    Config,
    UNet2DConditionConfig,
)
from sdconv.convolution.geometry import Window, pair
from sdconv.errors import SdconvError
from sdconv.features.hooks import attach
from sdconv.features.places import Place, places
from sdconv.features.reduction import channel_axis
from sdconv.loading import build
from sdconv.models.base import Network
from sdconv.models.dummy_inputs import Noise, inputs_for
from sdconv.models.meta_copy import double
from sdconv.models.unet import UNet2DConditionModel

PICTURE, LATENTS = 512, 64
"""Rows and columns of what an autoencoder and a U-Net are thought to be given."""

_CONFIGS: Mapping[str, type[Config]] = {
    kind.class_name: kind
    for kind in (
        AutoencoderKLConfig,
        AutoencoderKLFlux2Config,
        AutoencoderTinyConfig,
        UNet2DConditionConfig,
    )
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of one place; the fields of ``Point`` that a dry run fills."""

    channels: int
    size: tuple[int, int] | None
    stride: tuple[Fraction, Fraction] | None
    receptive_field: tuple[int, int] | None
    sees_all: bool | None
    multiplies: int


def facts_of(network: nn.Module, size: int | tuple[int, int] | None) -> dict[str, Facts]:
    """Facts by the names of places, in the order in which they are passed first.

    Args:
        network: an autoencoder or a U-Net, sdconv's or diffusers'. Of any other none are known.
        size: rows and columns of the picture or, for a U-Net, of the latents; None for ``PICTURE``
            or ``LATENTS``.

    Raises:
        InputError: a size that the network cannot take.
    """
    skeleton = _skeleton(network)
    if skeleton is None:
        return {}
    assumed = LATENTS if isinstance(skeleton, UNet2DConditionModel) else PICTURE
    rows_columns = pair("size", assumed if size is None else size, 1)
    noise = Noise(1, 0, torch.float32, torch.device("meta"))
    copy = double(network).float().eval()
    found: dict[str, Facts] = {}
    for method, given in inputs_for(skeleton, rows_columns, noise).items():
        found |= _run(copy, method, given)
    return found


def _skeleton(network: nn.Module) -> Network | None:
    """sdconv's network of the same config without weights or transformers; None for no such."""
    config = getattr(network, "config", None)
    kind = _CONFIGS.get(type(network).__name__) if config is not None else None
    if kind is None or config is None:
        return None
    if not isinstance(config, Config):
        own = {name: value for name, value in dict(config).items() if not name.startswith("_")}
        try:
            config = kind.from_json(own, "config")
        except SdconvError:  # of diffusers' kinds that sdconv has not
            return None
    with torch.device("meta"):
        if isinstance(config, UNet2DConditionConfig):
            return UNet2DConditionModel(config, None)
        return build(config)


def _run(network: nn.Module, method: str, given: tuple[Any, ...]) -> dict[str, Facts]:
    recorder = Recorder(method)
    map_, *conditions = given
    recorder.see(map_, View((map_.shape[2], map_.shape[3]), Window(), Window()))
    for condition in _tensors(conditions):
        recorder.see(condition, View((1, 1), Window(), Window(), of_map=False))
    passing = _Passing(recorder)
    handles = []
    try:
        with recorder.naming(network):
            for place in places(network).values():
                handles.append(attach(place, passing.visit(place)))
            with torch.no_grad(), recorder:
                getattr(network, method)(*given, return_dict=False)
    finally:
        for handle in handles:
            handle.remove()
    return passing.facts()


class _Passing:
    """The maps that pass in a dry run."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._seen: dict[str, tuple[Place, Tensor, View | None]] = {}

    def visit(self, place: Place) -> Callable[[Tensor], None]:
        def note(x: Tensor) -> None:
            view = self._recorder.view(x)
            self._seen.setdefault(place.name, (place, x, view))

        return note

    def facts(self) -> dict[str, Facts]:
        work: dict[str, list[Layer]] = {}
        for layer in self._recorder.layers:
            # the operation, and every block that it is in
            parts = layer.name.split(".")
            for length in range(1, len(parts) + 1):
                work.setdefault(".".join(parts[:length]), []).append(layer)
        return {
            name: _facts(place, x, self._view(place, view), work)
            for name, (place, x, view) in self._seen.items()
        }

    def _view(self, place: Place, view: View | None) -> View | None:
        """A skip's view is its source's: the whole that it is cut from sees more."""
        source = self._seen.get(place.skip or "") if place.kind == "skip" else None
        return view if source is None else source[2]


def _facts(place: Place, x: Tensor, view: View | None, work: Mapping[str, list[Layer]]) -> Facts:
    known = view is not None and view.of_map
    return Facts(
        channels=x.shape[channel_axis(x)],
        size=view.size if view is not None and known else None,
        stride=(view.rows.stride, view.columns.stride) if view is not None and known else None,
        receptive_field=(view.rows.size, view.columns.size) if view is not None and known else None,
        sees_all=view.sees_all if view is not None and known else None,
        multiplies=_multiplies(place, work),
    )


def _multiplies(place: Place, work: Mapping[str, list[Layer]]) -> int:
    part = place.name.partition(":")[2]
    if part.startswith("silu"):
        # one activation serves the block: first before conv1, last before conv2
        activations = work.get(f"{place.of}.nonlinearity", [])
        return activations[0 if part == "silu1" else -1].multiplies if activations else 0
    if place.before:
        return 0
    name = f"{place.of}.time_emb_proj" if part == "temb" else place.name
    return sum(layer.multiplies for layer in work.get(name, []))


def _tensors(given: Any) -> list[Tensor]:
    leaves: list[Any] = torch.utils._pytree.tree_leaves(given)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
