"""Record each operation of a network, with its counts, during a run on the meta device.

Tensors on torch's meta device have shapes and no values, so that a run costs nothing; padding,
strides and shortcuts are those of a real run.

Multiplies are counted for one image:

- convolutions and linear layers: each weight once for each position where it is applied, the zeros
  of the padding included (multiply-accumulates, as torch's own counter has them);
- attention: in addition to its linear layers two matrix products, positions * positions * channels
  each;
- GroupNorm, LayerNorm: two for each value (the square for the variance, and the scaling);
- SiLU, GELU: one for each value. ReLU, additions, nearest upsampling, embedding tables: none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sdconv.analysis.anatomy.counts import Anatomy, Block, Operation
from sdconv.config import Config
from sdconv.config.facts import PIXELS_PER_LATENT
from sdconv.convolution.geometry import ReceptiveField, conv_multiplies, pair
from sdconv.devices import on_meta
from sdconv.errors import InputError
from sdconv.loading import build
from sdconv.models.base import Autoencoder, Network
from sdconv.models.blocks import (
    AsymmetricDownsample2D,
    Attention,
    Downsample2D,
    ResnetBlock2D,
    Upsample2D,
)
from sdconv.models.dummy_inputs import Noise, inputs_for
from sdconv.models.tiny import TinyBlock
from sdconv.models.unet import UNet2DConditionModel

LARGEST_SIDE = 1 << 16
"""The largest image that `dissect` takes, in rows or columns."""

_BLOCKS = (ResnetBlock2D, Attention, Downsample2D, AsymmetricDownsample2D, Upsample2D, TinyBlock)


def _is_block(module: nn.Module) -> bool:
    # the transformers are diffusers'
    return isinstance(module, _BLOCKS) or type(module).__name__ == "Transformer2DModel"


def dissect(config: Config, size: int | tuple[int, int] = 512) -> Anatomy:
    """What each operation of a network does to an image, or to its latents. No weights are needed
    or read.

    Args:
        config: as ``sdconv.infer`` derives it from shapes.
        size: rows and columns of the image, or one number for both; at most ``LARGEST_SIDE``. A
            U-Net's latents have an eighth of them, and its prompt 77 tokens.

    Raises:
        InputError: an invalid size, or an image of less than one latent.
    """
    rows, columns = pair("size", size, 1)
    if max(rows, columns) > LARGEST_SIDE:
        raise InputError(
            "the image is too large",
            where="size",
            expected=f"at most {LARGEST_SIDE} rows and columns",
            got=f"{rows}x{columns}",
        )
    with on_meta():
        network = build(config)
    least = network.downscale if isinstance(network, Autoencoder) else PIXELS_PER_LATENT
    if min(rows, columns) < least:
        raise InputError(
            "the image is too small",
            where="size",
            expected=f"at least {least} rows and columns, the size of one latent",
            got=f"{rows}x{columns}",
        )
    latent = rows // least, columns // least
    operations: list[Operation] = []
    with torch.no_grad():
        if isinstance(network, UNet2DConditionModel):
            operations += _record(network, "denoise", latent)
        for path in ("encode", "decode"):
            if getattr(network, f"{path}r", None) is not None:
                sides = (rows, columns) if path == "encode" else latent
                operations += _record(network, path, sides)
    unet = isinstance(network, UNet2DConditionModel)
    return Anatomy(
        class_name=config.class_name,
        latent_channels=config["out_channels" if unet else "latent_channels"],
        size=(rows, columns),
        blocks=tuple(
            Block(name=name, class_name=class_name, path=path, operations=tuple(group))
            for (path, name, class_name), group in groupby(
                operations, key=lambda one: (one.path, one.block, one.block_class)
            )
        ),
    )


@dataclass(frozen=True)
class TensorGeometry:
    """The size of a feature map, and its receptive field in the network's input.

    ``rows``, ``columns``: the receptive field on each axis. ``is_global``: whether attention makes
    every value depend on the whole input. ``padding``: zeros that ``F.pad`` has put around it,
    above, below, left and right. ``spatial``: False for a tensor that does not come from a feature
    map, such as a prompt embedding or a timestep.
    """

    size: tuple[int, int]
    rows: ReceptiveField
    columns: ReceptiveField
    is_global: bool = False
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    spatial: bool = True

    @classmethod
    def of_input(cls, size: tuple[int, int], *, spatial: bool = True) -> TensorGeometry:
        """The geometry of a network's input, whose values depend on themselves only."""
        return cls(size, ReceptiveField(), ReceptiveField(), spatial=spatial)

    @property
    def receptive_field(self) -> tuple[int, int]:
        """Input pixels that one value depends on through convolutions, in rows and columns."""
        return self.rows.size, self.columns.size

    @property
    def downscale(self) -> tuple[Fraction, Fraction]:
        """Input pixels from one value to the next, in rows and columns."""
        return self.rows.downscale, self.columns.downscale

    @property
    def extent(self) -> tuple[bool, bool, int, int]:
        """A key that orders geometries by their receptive fields."""
        return self.spatial, self.is_global, *self.receptive_field


def _record(network: Network, path: str, size: tuple[int, int]) -> list[Operation]:
    """The operations of one of ``PATHS``, in the order in which they run."""
    recorder = Recorder(path)
    method = "forward" if path == "denoise" else path
    channels = network.config["latent_channels" if path == "decode" else "in_channels"]
    x = torch.empty(1, channels, *size, device="meta")
    recorder.track(x, TensorGeometry.of_input(size))
    conditions: list[Any] = []
    if path == "denoise":  # the timestep, the prompt and what else is added, whatever the size
        noise = Noise(1, 0, torch.float32, torch.device("meta"))
        _, *conditions = inputs_for(network, (1, 1), noise)[method]
    for condition in tree_leaves(conditions):
        if isinstance(condition, Tensor):
            tokens = condition.shape[1] if condition.ndim == 3 else 1
            recorder.track(condition, TensorGeometry.of_input((tokens, 1), spatial=False))
    with recorder.following_modules(network), recorder:
        getattr(network, method)(x, *conditions)
    return recorder.operations


class Recorder(TorchFunctionMode):
    """Follow feature maps through torch's functions, and record each operation.

    ``operations``: those that have run so far. ``path``: what they are recorded under.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.operations: list[Operation] = []
        # The tensor is kept with its geometry, so that its id is not used again.
        self._geometries: dict[int, tuple[Tensor, TensorGeometry]] = {}
        self._modules: list[tuple[str, nn.Module]] = []

    @contextmanager
    def following_modules(self, network: nn.Module) -> Iterator[None]:
        """Record operations under the name of the running module, inside the block."""
        handles = []
        for name, module in network.named_modules():
            here = (name, module)
            handles += [
                module.register_forward_pre_hook(lambda *_, here=here: self._modules.append(here)),
                module.register_forward_hook(lambda *_: self._modules.pop() and None),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if (geometry := self._widest(args)) is None:
            return result
        record = _RECORD.get(func)
        if record is not None and isinstance(result, Tensor):
            geometry = record(self, geometry, result, *args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor):
                self.track(one, geometry)
        return result

    def track(self, x: Tensor, geometry: TensorGeometry) -> None:
        """Follow a tensor from here on."""
        self._geometries[id(x)] = x, geometry

    def geometry(self, x: Tensor) -> TensorGeometry | None:
        """A tensor's geometry; None if it does not come from a tensor that is tracked."""
        return self._geometries[id(x)][1] if id(x) in self._geometries else None

    def _widest(self, args: Iterable[Any]) -> TensorGeometry | None:
        """The geometry with the largest receptive field among ``args``: where a shortcut is added,
        that of the other branch."""
        geometries = [
            geometry
            for arg in args
            for one in (arg if isinstance(arg, tuple | list) else (arg,))
            if isinstance(one, Tensor) and (geometry := self.geometry(one)) is not None
        ]
        return max(geometries, key=lambda geometry: geometry.extent, default=None)

    def inside(self, class_name: str) -> bool:
        """Whether a module of this class is running."""
        return any(type(module).__name__ == class_name for _, module in self._modules)

    def add(
        self,
        role: str,
        before: TensorGeometry,
        after: TensorGeometry,
        *,
        channels: tuple[int, int],
        multiplies: int = 0,
        weights: Iterable[Tensor | None] = (),
        kernel: tuple[int, int] | None = None,
        stride: tuple[int, int] | None = None,
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    ) -> TensorGeometry:
        """Record an operation of the module that is running, and return ``after``."""
        block, module = next(
            (here for here in self._modules if _is_block(here[1])), self._modules[-1]
        )
        self.operations.append(
            Operation(
                name=self._modules[-1][0],
                block=block,
                block_class=type(module).__name__,
                path=self.path,
                role=role,
                kernel=kernel,
                stride=stride,
                padding=padding,
                in_channels=channels[0],
                out_channels=channels[1],
                in_size=before.size,
                out_size=after.size,
                parameters=sum(weight.numel() for weight in weights if weight is not None),
                multiplies=multiplies,
                receptive_field=after.receptive_field if after.spatial else None,
                downscale=after.downscale if after.spatial else None,
                global_receptive_field=after.is_global,
            )
        )
        return after


def _pad(
    _: Recorder, before: TensorGeometry, y: Tensor, x: Tensor, pad: tuple[int, ...], **__: Any
) -> TensorGeometry:
    left, right, top, bottom = pad
    return replace(before, padding=(top, bottom, left, right))


def _conv2d(
    recorder: Recorder,
    before: TensorGeometry,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    *_: object,
) -> TensorGeometry:
    top, bottom, left, right = before.padding
    zeros = (top + padding[0], bottom + padding[0], left + padding[1], right + padding[1])
    kernel = (weight.shape[2], weight.shape[3])
    after = replace(
        before,
        size=(y.shape[2], y.shape[3]),
        rows=before.rows.through(kernel[0], stride[0], zeros[:2]),
        columns=before.columns.through(kernel[1], stride[1], zeros[2:]),
        padding=(0, 0, 0, 0),
    )
    return recorder.add(
        "convolution",
        before,
        after,
        channels=(x.shape[1], y.shape[1]),
        multiplies=conv_multiplies(weight.shape[1], weight.shape[0], kernel, after.size),
        weights=(weight, bias),
        kernel=kernel,
        stride=stride,
        padding=zeros,
    )


def _linear(
    recorder: Recorder,
    before: TensorGeometry,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> TensorGeometry:
    # Tokens (B, positions, C): a linear layer is applied at each position, as a 1x1 convolution is.
    # A vector (B, C) is an embedding.
    role = "embedding" if x.ndim == 2 else "attention"
    return recorder.add(
        "feed-forward" if recorder.inside("FeedForward") else role,
        before,
        before,
        channels=(x.shape[-1], y.shape[-1]),
        multiplies=prod(x.shape[1:-1]) * weight.numel(),
        weights=(weight, bias),
    )


def _attention(
    recorder: Recorder,
    before: TensorGeometry,
    y: Tensor,
    query: Tensor,
    key: Tensor,
    *_: Any,
    **__: Any,
) -> TensorGeometry:
    # (B, heads, positions, C): query with key, and the result with value
    products = query.numel() * key.shape[-2] + y.numel() * key.shape[-2]
    channels = y.shape[1] * y.shape[-1]
    # cross-attention to a prompt embedding does not widen the receptive field
    source = recorder.geometry(key)
    is_global = before.is_global or (source is not None and source.spatial)
    after = replace(before, is_global=is_global)
    return recorder.add(
        "attention", before, after, channels=(channels, channels), multiplies=products
    )


def _norm(
    recorder: Recorder,
    before: TensorGeometry,
    y: Tensor,
    x: Tensor,
    groups_or_shape: object,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> TensorGeometry:
    # tokens (B, positions, C) are normalised by nn.LayerNorm
    channels = x.shape[1] if isinstance(groups_or_shape, int) else x.shape[-1]
    return recorder.add(
        "normalisation",
        before,
        before,
        channels=(channels, channels),
        multiplies=2 * x.numel(),
        weights=(weight, bias),
    )


def _activation(
    recorder: Recorder, before: TensorGeometry, y: Tensor, x: Tensor, *_: Any, **__: Any
) -> TensorGeometry:
    channels = x.shape[1] if x.ndim == 4 else x.shape[-1]
    return recorder.add(
        "activation", before, before, channels=(channels, channels), multiplies=x.numel()
    )


def _relu(
    recorder: Recorder, before: TensorGeometry, y: Tensor, x: Tensor, *_: Any, **__: Any
) -> TensorGeometry:
    return recorder.add("activation", before, before, channels=(x.shape[1], x.shape[1]))


def _embedding(
    recorder: Recorder,
    before: TensorGeometry,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    *_: Any,
    **__: Any,
) -> TensorGeometry:
    return recorder.add("embedding", before, before, channels=(1, y.shape[-1]), weights=(weight,))


def _upsample(
    recorder: Recorder, before: TensorGeometry, y: Tensor, x: Tensor, *_: Any, **__: Any
) -> TensorGeometry:
    rows, columns = y.shape[2] // x.shape[2], y.shape[3] // x.shape[3]
    after = replace(
        before,
        size=(y.shape[2], y.shape[3]),
        rows=before.rows.upsampled(rows),
        columns=before.columns.upsampled(columns),
    )
    return recorder.add("upsampling", before, after, channels=(x.shape[1], y.shape[1]))


# torch's function -> what records it and gives its result's geometry. Any other function leaves the
# geometry as it is.
_RECORD: Mapping[Callable[..., Any], Callable[..., TensorGeometry]] = {
    F.pad: _pad,
    F.conv2d: _conv2d,
    F.linear: _linear,
    F.embedding: _embedding,
    F.scaled_dot_product_attention: _attention,
    F.group_norm: _norm,
    F.layer_norm: _norm,
    F.silu: _activation,
    F.gelu: _activation,
    F.relu: _relu,
    F.interpolate: _upsample,
}
