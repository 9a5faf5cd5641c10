"""A network taken apart: each operation as it passes, with its counts.

The network runs on torch's meta device, where tensors have shapes and no values, and each operation
is recorded as it passes: padding, strides and shortcuts are those of a real run.

Multiplies are counted for one picture:

- convolutions and linear layers: each weight once for each place where it is applied, zeros of the
  padding included (multiply-accumulates, as torch's own counter has them);
- attention: beside its linear layers its two matrix products, places * places * channels each;
- GroupNorm, LayerNorm: two for each value (the square for the variance, and the scaling);
- SiLU, GELU: one for each value. ReLU, additions and nearest upsampling: none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sdconv.analysis.anatomy.counts import Anatomy, Block, Layer
from sdconv.config import Config
from sdconv.convolution.geometry import Window, conv_multiplies, pair
from sdconv.errors import InputError
from sdconv.loading import build
from sdconv.models.base import Autoencoder
from sdconv.models.blocks import (
    AsymmetricDownsample2D,
    Attention,
    Downsample2D,
    ResnetBlock2D,
    Upsample2D,
)
from sdconv.models.tiny import TinyBlock

LARGEST_SIDE = 1 << 16
"""Rows or columns of the largest picture that is looked at."""

_BLOCKS = (ResnetBlock2D, Attention, Downsample2D, AsymmetricDownsample2D, Upsample2D, TinyBlock)


def dissect(config: Config, size: int | tuple[int, int] = 512) -> Anatomy:
    """What each layer of an autoencoder does to a picture; no weights are needed or read.

    Args:
        config: as ``sdconv.infer`` reads it from shapes.
        size: rows and columns of the picture, or one number for both; at most ``LARGEST_SIDE``.

    Raises:
        InputError: a size that no picture has, or less than one latent.
    """
    rows, columns = pair("size", size, 1)
    if max(rows, columns) > LARGEST_SIDE:
        raise InputError(
            "too large a picture",
            where="size",
            expected=f"at most {LARGEST_SIDE} rows and columns",
            got=f"{rows}x{columns}",
        )
    if not config.class_name.startswith("Autoencoder"):
        raise InputError(
            "only autoencoders are looked into",
            where="component",
            expected="vae",
            got=config.class_name,
        )
    with torch.device("meta"):
        network = build(config)
    assert isinstance(network, Autoencoder)
    least = network.downscale
    if min(rows, columns) < least:
        raise InputError(
            "too small a picture",
            where="size",
            expected=f"at least {least} rows and columns, which make one latent",
            got=f"{rows}x{columns}",
        )
    layers: list[Layer] = []
    with torch.no_grad():
        if network.encoder is not None:
            layers += _record(network, "encode", config["in_channels"], (rows, columns))
        if network.decoder is not None:
            latent = rows // least, columns // least
            layers += _record(network, "decode", config["latent_channels"], latent)
    return Anatomy(
        class_name=config.class_name,
        latent_channels=config["latent_channels"],
        size=(rows, columns),
        blocks=tuple(
            Block(name=name, class_name=class_name, path=path, layers=tuple(group))
            for (path, name, class_name), group in groupby(
                layers, key=lambda layer: (layer.path, layer.block, layer.block_class)
            )
        ),
    )


@dataclass(frozen=True)
class View:
    """What a tensor is: a map of (rows, columns), what its places see of the input, zeros around
    it. ``of_map``: False for what is no map and comes from none, as a text or a timestep."""

    size: tuple[int, int]
    rows: Window
    columns: Window
    sees_all: bool = False
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    of_map: bool = True

    @property
    def reach(self) -> tuple[bool, bool, int, int]:
        """What tells which of two views is the wider one."""
        return self.of_map, self.sees_all, self.rows.size, self.columns.size


def _record(network: nn.Module, path: str, channels: int, size: tuple[int, int]) -> list[Layer]:
    """The layers of ``network.encode`` or ``network.decode`` in the order they run."""
    recorder = Recorder(path)
    x = torch.empty(1, channels, *size, device="meta")
    recorder.see(x, View(size, Window(), Window()))
    try:
        with recorder.naming(network), recorder:
            getattr(network, path)(x)
    except ValueError as error:  # of torch's normalisation, where a group has a single value
        raise InputError(
            "too small a picture for this network's normalisation", where="size", got=error
        ) from error
    return recorder.layers


class Recorder(TorchFunctionMode):
    """Follows every tensor through torch's functions; ``layers`` grows as they run."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.layers: list[Layer] = []
        # the tensor is kept beside its view, so that no other gets its id
        self.views: dict[int, tuple[Tensor, View]] = {}
        self._modules: list[tuple[str, nn.Module]] = []

    @contextmanager
    def naming(self, network: nn.Module) -> Iterator[None]:
        """Knows, as long as it lasts, which of the network's modules is running."""
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
        if (view := self._widest(args)) is None:
            return result
        follow = _FOLLOW.get(func)
        if follow is not None and isinstance(result, Tensor):
            view = follow(self, view, result, *args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor):
                self.see(one, view)
        return result

    def see(self, x: Tensor, view: View) -> None:
        """Says what a tensor is."""
        self.views[id(x)] = x, view

    def view(self, x: Tensor) -> View | None:
        """What a tensor is, if it comes from one that is known."""
        return self.views[id(x)][1] if id(x) in self.views else None

    def _widest(self, args: Iterable[Any]) -> View | None:
        """The view of the tensor among ``args`` that sees most: a bypass adds nothing to it."""
        views = [
            view
            for arg in args
            for one in (arg if isinstance(arg, tuple | list) else (arg,))
            if isinstance(one, Tensor) and (view := self.view(one)) is not None
        ]
        return max(views, key=lambda view: view.reach, default=None)

    def add(
        self,
        role: str,
        before: View,
        after: View,
        *,
        channels: tuple[int, int],
        multiplies: int = 0,
        weights: Iterable[Tensor | None] = (),
        kernel: tuple[int, int] | None = None,
        stride: tuple[int, int] | None = None,
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    ) -> View:
        """Writes a layer down, under the name of the module that is running; gives ``after``."""
        block, module = next(
            (here for here in self._modules if isinstance(here[1], _BLOCKS)), self._modules[-1]
        )
        self.layers.append(
            Layer(
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
                receptive_field=(after.rows.size, after.columns.size),
                step=(after.rows.stride, after.columns.stride),
                sees_all=after.sees_all,
            )
        )
        return after


def _pad(_: Recorder, view: View, y: Tensor, x: Tensor, pad: tuple[int, ...], **__: Any) -> View:
    left, right, top, bottom = pad
    return replace(view, padding=(top, bottom, left, right))


def _conv2d(
    recorder: Recorder,
    view: View,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    *_: object,
) -> View:
    top, bottom, left, right = view.padding
    zeros = (top + padding[0], bottom + padding[0], left + padding[1], right + padding[1])
    kernel = (weight.shape[2], weight.shape[3])
    after = replace(
        view,
        size=(y.shape[2], y.shape[3]),
        rows=view.rows.through(kernel[0], stride[0], zeros[:2]),
        columns=view.columns.through(kernel[1], stride[1], zeros[2:]),
        padding=(0, 0, 0, 0),
    )
    return recorder.add(
        "convolution",
        view,
        after,
        channels=(x.shape[1], y.shape[1]),
        multiplies=conv_multiplies(weight.shape[1], weight.shape[0], kernel, after.size),
        weights=(weight, bias),
        kernel=kernel,
        stride=stride,
        padding=zeros,
    )


def _linear(
    recorder: Recorder, view: View, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> View:
    # tokens (B, places, C): a linear layer is applied at each place, as a 1x1 convolution is; a
    # vector (B, C) is an embedding
    return recorder.add(
        "attention" if x.ndim > 2 else "embedding",
        view,
        view,
        channels=(x.shape[-1], y.shape[-1]),
        multiplies=prod(x.shape[1:-1]) * weight.numel(),
        weights=(weight, bias),
    )


def _attention(
    recorder: Recorder, view: View, y: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any
) -> View:
    # (B, heads, places, C): query with key, and the result with value
    products = query.numel() * key.shape[-2] + y.numel() * key.shape[-2]
    channels = y.shape[1] * y.shape[-1]
    # an attention to a text sees no more of the map
    looked_at = recorder.view(key)
    after = replace(view, sees_all=view.sees_all or (looked_at is not None and looked_at.of_map))
    return recorder.add(
        "attention", view, after, channels=(channels, channels), multiplies=products
    )


def _norm(
    recorder: Recorder,
    view: View,
    y: Tensor,
    x: Tensor,
    groups_or_shape: object,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> View:
    # tokens (B, places, C) are normalised by nn.LayerNorm
    channels = x.shape[1] if isinstance(groups_or_shape, int) else x.shape[-1]
    return recorder.add(
        "normalisation",
        view,
        view,
        channels=(channels, channels),
        multiplies=2 * x.numel(),
        weights=(weight, bias),
    )


def _one_each(recorder: Recorder, view: View, y: Tensor, x: Tensor, *_: Any, **__: Any) -> View:
    channels = (x.shape[1], x.shape[1])
    return recorder.add("activation", view, view, channels=channels, multiplies=x.numel())


def _relu(recorder: Recorder, view: View, y: Tensor, x: Tensor, *_: Any, **__: Any) -> View:
    return recorder.add("activation", view, view, channels=(x.shape[1], x.shape[1]))


def _upsample(recorder: Recorder, view: View, y: Tensor, x: Tensor, *_: Any, **__: Any) -> View:
    rows, columns = y.shape[2] // x.shape[2], y.shape[3] // x.shape[3]
    after = replace(
        view,
        size=(y.shape[2], y.shape[3]),
        rows=view.rows.upsampled(rows),
        columns=view.columns.upsampled(columns),
    )
    return recorder.add("upsampling", view, after, channels=(x.shape[1], y.shape[1]))


# torch's function -> what becomes of the view; any other function leaves it as it is
_FOLLOW: Mapping[Callable[..., Any], Callable[..., View]] = {
    F.pad: _pad,
    F.conv2d: _conv2d,
    F.linear: _linear,
    F.scaled_dot_product_attention: _attention,
    F.group_norm: _norm,
    F.layer_norm: _norm,
    F.silu: _one_each,
    F.gelu: _one_each,
    F.relu: _relu,
    F.interpolate: _upsample,
}
