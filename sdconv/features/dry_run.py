"""Facts of a network's hook points, measured by a run on the meta device: sizes, downscale factors,
receptive fields, convolutions, multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from sdconv.analysis.anatomy import Operation, Recorder, TensorGeometry
from sdconv.config import (
    AutoencoderKLConfig,
    AutoencoderKLFlux2Config,
    AutoencoderTinyConfig,
    Config,
    UNet2DConditionConfig,
)
from sdconv.convolution.geometry import ReceptiveField, pair
from sdconv.devices import on_meta
from sdconv.errors import SdconvError
from sdconv.features.hook_points import HookPoint, hook_points
from sdconv.features.hooks import attach
from sdconv.features.reduction import channel_axis
from sdconv.loading import build
from sdconv.models.base import Network
from sdconv.models.dummy_inputs import Noise, inputs_for
from sdconv.models.meta_copy import meta_copy
from sdconv.models.unet import UNet2DConditionModel

IMAGE_SIDE, LATENT_SIDE = 512, 64
"""Rows and columns of the default input of an autoencoder and of a U-Net."""

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
class PointFacts:
    """The facts of one hook point; the fields of ``Point`` with the same names."""

    channels: int
    size: tuple[int, int] | None
    downscale: tuple[Fraction, Fraction] | None
    receptive_field: tuple[int, int] | None
    global_receptive_field: bool | None
    kernel: tuple[int, int] | None
    stride: tuple[int, int] | None
    padding: tuple[int, int, int, int] | None
    multiplies: int


def dry_run(network: nn.Module, size: int | tuple[int, int] | None) -> dict[str, PointFacts]:
    """Facts by the names of hook points, in the order in which a run first passes them.

    Args:
        network: an autoencoder or a U-Net, sdconv's or diffusers'; other networks have no facts.
        size: rows and columns of the image or, for a U-Net, of the latents; None for ``IMAGE_SIDE``
            or ``LATENT_SIDE``.

    Raises:
        InputError: a size that the network cannot take.
    """
    found: dict[str, PointFacts] = {}
    for visits in _runs(network, size):
        found |= visits.facts()
    return found


def receptive_fields(network: nn.Module) -> dict[str, tuple[ReceptiveField, ReceptiveField]]:
    """The receptive field along rows and along columns of each hook point with feature maps: in
    pixels of the image for an encoder, in latents for a decoder and a U-Net."""
    return {
        name: (geometry.rows, geometry.columns)
        for visits in _runs(network, None)
        for name, geometry in visits.geometries().items()
    }


def _runs(network: nn.Module, size: int | tuple[int, int] | None) -> Iterator[_Visits]:
    """A run of each method of a network."""
    skeleton = _skeleton(network)
    if skeleton is None:
        return
    default = LATENT_SIDE if isinstance(skeleton, UNet2DConditionModel) else IMAGE_SIDE
    rows_columns = pair("size", default if size is None else size, 1)
    noise = Noise(1, 0, torch.float32, torch.device("meta"))
    copy = meta_copy(network).float().eval()
    for method, inputs in inputs_for(skeleton, rows_columns, noise).items():
        yield _run(copy, method, inputs)


def _skeleton(network: nn.Module) -> Network | None:
    """sdconv's network of the same config, without weights or transformers; None if sdconv has no
    such network."""
    config = getattr(network, "config", None)
    kind = _CONFIGS.get(type(network).__name__) if config is not None else None
    if kind is None or config is None:
        return None
    if not isinstance(config, Config):
        own = {name: value for name, value in dict(config).items() if not name.startswith("_")}
        try:
            config = kind.from_json(own, "config")
        except SdconvError:  # a variant in diffusers that sdconv does not have
            return None
    with on_meta():
        if isinstance(config, UNet2DConditionConfig):
            return UNet2DConditionModel(config, None)
        return build(config)


def _run(network: nn.Module, method: str, inputs: tuple[Any, ...]) -> _Visits:
    recorder = Recorder(method)
    sample, *conditions = inputs
    recorder.track(
        sample,
        TensorGeometry.of_input((sample.shape[2], sample.shape[3])),
    )
    for condition in _tensors(conditions):
        recorder.track(condition, TensorGeometry.of_input((1, 1), spatial=False))
    visits = _Visits(recorder)
    handles = []
    try:
        with recorder.following_modules(network):
            for point in hook_points(network).values():
                if point.kind != "probs":  # the network does not compute them
                    handles.append(attach(point, visits.visit(point)))
            with torch.no_grad(), recorder:
                getattr(network, method)(*inputs, return_dict=False)
    finally:
        for handle in handles:
            handle.remove()
    return visits


class _Visits:
    """The feature maps that a dry run passes, by hook point."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._seen: dict[str, tuple[HookPoint, Tensor, TensorGeometry | None]] = {}

    def visit(self, point: HookPoint) -> Callable[[Tensor], None]:
        def note(x: Tensor) -> None:
            self._seen.setdefault(point.name, (point, x, self._recorder.geometry(x)))

        return note

    def facts(self) -> dict[str, PointFacts]:
        work: dict[str, list[Operation]] = {}
        for operation in self._recorder.operations:
            # counted for the operation and for every block around it
            parts = operation.name.split(".")
            for length in range(1, len(parts) + 1):
                work.setdefault(".".join(parts[:length]), []).append(operation)
        return {
            name: _facts(point, x, self._geometry(point, geometry), work)
            for name, (point, x, geometry) in self._seen.items()
        }

    def geometries(self) -> dict[str, TensorGeometry]:
        """The geometry of each feature map with rows and columns."""
        found = {
            name: self._geometry(point, geometry)
            for name, (point, _, geometry) in self._seen.items()
        }
        return {name: one for name, one in found.items() if one is not None and one.spatial}

    def _geometry(self, point: HookPoint, own: TensorGeometry | None) -> TensorGeometry | None:
        """The geometry of a feature map: for a skip that of its source, because the concatenated
        tensor that it is a slice of has a larger receptive field."""
        source = self._seen.get(point.skip or "") if point.kind == "skip" else None
        return own if source is None else source[2]


def _facts(
    point: HookPoint,
    x: Tensor,
    geometry: TensorGeometry | None,
    work: Mapping[str, list[Operation]],
) -> PointFacts:
    if geometry is not None and not geometry.spatial:
        geometry = None
    convolution = _convolution(work.get(point.name, []))
    return PointFacts(
        channels=x.shape[channel_axis(x)],
        size=None if geometry is None else geometry.size,
        downscale=None
        if geometry is None
        else (geometry.rows.downscale, geometry.columns.downscale),
        receptive_field=None if geometry is None else (geometry.rows.size, geometry.columns.size),
        global_receptive_field=None if geometry is None else geometry.is_global,
        kernel=None if convolution is None else convolution.kernel,
        stride=None if convolution is None else convolution.stride,
        padding=None if convolution is None else convolution.padding,
        multiplies=_multiplies(point, work),
    )


def _convolution(operations: Sequence[Operation]) -> Operation | None:
    """The only convolution of a module that does nothing else but upsample; None for others."""
    convolutions = [one for one in operations if one.role != "upsampling"]
    alone = len(convolutions) == 1 and convolutions[0].role == "convolution"
    return convolutions[0] if alone else None


def _multiplies(point: HookPoint, work: Mapping[str, list[Operation]]) -> int:
    part = point.name.partition(":")[2]
    if part.startswith("silu"):
        # the block calls one activation: first before conv1, last before conv2
        activations = work.get(f"{point.of}.nonlinearity", [])
        return activations[0 if part == "silu1" else -1].multiplies if activations else 0
    if point.before:
        return 0
    name = f"{point.of}.time_emb_proj" if part == "temb" else point.name
    return sum(operation.multiplies for operation in work.get(name, []))


def _tensors(inputs: Any) -> list[Tensor]:
    leaves: list[Any] = torch.utils._pytree.tree_leaves(inputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
