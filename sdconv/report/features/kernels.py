"""The learned kernels of a network's convolutions, for the page."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from sdconv.features.points import Point
from sdconv.features.rendering import Values, downscaled
from sdconv.report.features.drawing import Drawing, box_of
from sdconv.report.features.sprites import webp
from sdconv.sizes import format_pair

MOST_COLOURED = 256
"""Kernels of a layer that are shown in colours, at most."""

SLICED = 12
"""Output and input channels whose slices are shown, those with the largest norms."""

NORM_SIDE = 128
"""Rows and columns of the image of norms, at most."""

_TIMES = " \u00d7 "


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """A convolution of the network.

    Args:
        name: of its module.
        box: name of the drawing's box that it belongs to.
        module: the convolution.
        facts: kernel, stride, padding, true stride and channels, as text.
    """

    name: str
    box: str
    module: nn.Conv2d
    facts: Mapping[str, str]


def kernels_of(network: nn.Module, points: Iterable[Point], drawing: Drawing) -> list[Kernels]:
    """The convolutions of a network in the order of a call.

    Args:
        network: whose modules have the points' names.
        points: the network's, with their facts.
        drawing: of the network.
    """
    boxes = [box.name for box in drawing.boxes]
    modules = dict(network.named_modules())
    points = list(points)
    by_name = {point.name: point for point in points}
    found = []
    for point in points:
        module = modules.get(point.name)
        box = box_of(point.name, boxes)
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta and box is not None:
            # a downsampling block may pad before its convolution
            around = by_name.get(point.of, point)
            facts = layer_facts(point if around.kernel is None else around, module)
            found.append(Kernels(name=point.name, box=box, module=module, facts=facts))
    return found


def layer_facts(point: Point, module: nn.Conv2d) -> dict[str, str]:
    """Kernel, stride, padding, true stride and channels of a convolution."""
    padding: Sequence[int] = point.padding or (0, 0, 0, 0)
    facts = {
        "kernel": _TIMES.join(map(str, module.kernel_size)),
        "stride": format_pair((module.stride[0], module.stride[1]), _TIMES),
        "padding": padding_words(padding),
    }
    if point.downscale is not None:
        facts["true stride"] = true_stride(point)
    facts["channels"] = f"{module.in_channels} \u2192 {module.out_channels}"
    return facts


def padding_words(padding: Sequence[int]) -> str:
    """Such as ``1``, or ``1 below, 1 right``; given as zeros above, below, left and right."""
    if len(set(padding)) == 1:
        return str(padding[0])
    sides = zip(padding, ("above", "below", "left", "right"), strict=True)
    return ", ".join(f"{zeros} {side}" for zeros, side in sides if zeros)


def true_stride(point: Point) -> str:
    """The distance in the network's input between neighbours in the feature map; below 1 after
    upsampling beyond the input."""
    assert point.downscale is not None
    return format_pair(point.downscale, _TIMES)


def kernel_blocks(kernels: Sequence[Kernels]) -> Iterator[tuple[str, str]]:
    """Names and texts of the data blocks of convolutions, one by one."""
    for at, one in enumerate(kernels):
        yield f"kernels-{at}", json.dumps(_content(one.module))


def _content(module: nn.Conv2d) -> dict[str, Any]:
    """Images and numbers of a convolution's weight, ``(out, in, rows, columns)``."""
    weight: Values = np.nan_to_num(module.weight.detach().float().cpu().numpy())
    norms = np.sqrt(np.square(weight).sum((2, 3)))
    largest = float(norms.max()) or 1.0
    small = downscaled(norms[None], NORM_SIDE)[0]
    top = float(small.max()) or 1.0
    outs, ins = _largest(norms.max(1)), _largest(norms.max(0))
    slices = weight[np.ix_(outs, ins)]
    found: dict[str, Any] = {
        "shape": weight.shape,
        "norms": _base64(webp(np.round(small / top * 255).astype(np.uint8), 85)),
        "normsSize": small.shape,
        "normTop": _short(top),
        "norm": _short(largest),
        "outs": outs.tolist(),
        "ins": ins.tolist(),
        "slices": _base64(_signed_bytes(slices)),
        "slicesTop": _short(float(np.abs(slices).max())),
        "profile": [[_short(float(x)) for x in row] for row in np.abs(weight).mean((0, 1))],
    }
    # images have three channels: at the first layer of an encoder, at the last of a decoder
    coloured = weight if weight.shape[1] == 3 else weight.swapaxes(0, 1)
    if coloured.shape[1] == 3 and weight.shape[2] > 1:
        coloured = coloured[:MOST_COLOURED]
        top = np.abs(coloured).max((1, 2, 3), keepdims=True)
        found["colours"] = _base64(_signed_bytes(coloured.transpose(0, 2, 3, 1), top))
        found["coloursCount"] = len(coloured)
        found["coloursOf"] = "output" if weight.shape[1] == 3 else "input"
    return found


def _largest(norms: Values) -> Values:
    """Numbers of the channels with the largest norms, in the order of their numbers."""
    return np.sort(np.argsort(-norms, kind="stable")[:SLICED])


def _signed_bytes(values: Values, top: Values | None = None) -> bytes:
    """Values from ``-top`` to ``top`` as bytes from 0 to 255, so that 127.5 is zero."""
    most = np.abs(values).max() if top is None else top
    scaled = values / np.where(most > 0, most, 1)
    return np.round(127.5 + 127.5 * scaled).astype(np.uint8).tobytes()


def _short(number: float) -> float:
    return float(f"{number:.4g}")


def _base64(data: bytes) -> str:
    return b64encode(data).decode("ascii")
