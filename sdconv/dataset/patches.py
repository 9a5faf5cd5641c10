"""For each channel, the places of a data set where it is largest, cut out of the images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdconv.config.facts import PIXELS_PER_LATENT
from sdconv.convolution.geometry import ReceptiveField
from sdconv.dataset.decoding import Decoded, decode
from sdconv.dataset.features import DECODING, TOP, FeatureExtractor
from sdconv.dataset.reading import Samples
from sdconv.dataset.sources import find_images
from sdconv.errors import InputError
from sdconv.features.dry_run import receptive_fields

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Patch:
    """One place: ``value`` of the channel there; ``key`` of the image; ``box``: top, left, bottom
    and right of the receptive field in the network's input, cut off at its border; ``pixels``:
    that part of it, ``(H, W, 3)``, uint8."""

    value: float
    key: str
    box: Box
    pixels: np.ndarray


@dataclass(frozen=True)
class TopPatches:
    """``channels``: for each hook point (and timestep) in the order of a run and each channel the
    patches, the largest value first, at most one of each image. ``fields``: for each the rows and
    columns of its receptive field in pixels. ``count``: how many channels each point has.
    ``images``: how many were looked at."""

    channels: Mapping[str, Mapping[int, list[Patch]]]
    fields: Mapping[str, tuple[int, int]]
    count: Mapping[str, int]
    images: int


def top_patches(
    folder: str | Path,
    source: str | Path,
    extractor: FeatureExtractor,
    patches: int,
    *,
    channels: int = 64,
    progress: Callable[[str, int, int], object] = lambda *_: None,
) -> TopPatches:
    """Finds and cuts out the places where each channel is largest.

    Args:
        folder: a data set of features, made with ``top``. source: its images.
        extractor: what made it.
        patches: of each channel.
        channels: the most channels of each point: the first ones.
        progress: called with a name, what is done and what there is.

    Raises:
        InputError: the data set does not say where channels are largest.
        SdconvError: it cannot be read.
    """
    samples = Samples(folder)
    found = _largest(samples, patches, channels, progress)
    if not found:
        raise InputError(
            "this data set does not say where channels are largest",
            where=folder,
            hint="make it with --top-patches",
        )
    geometry = _fields(extractor)
    wanted: dict[int, list[tuple[str, int, int]]] = {}
    for name, (values, places, _) in found.items():
        for channel in range(len(values)):
            for rank, index in enumerate(places[channel, :, 0].tolist()):
                if values[channel, rank] > -torch.inf:
                    wanted.setdefault(int(index), []).append((name, channel, rank))
    images = find_images(source, skip=Path(folder))
    planned = {one.key: one for shard in samples.plan.shards for one in shard}
    cut: dict[str, dict[int, dict[int, Patch]]] = {}
    for done, (index, uses) in enumerate(sorted(wanted.items())):
        progress("cutting out", done, len(wanted))
        key = samples.keys[index]
        image = decode(images.root, planned[key], samples.about["preprocessing"]["draft"])
        if not isinstance(image, Decoded):  # gone or changed since
            continue
        for name, channel, rank in uses:
            values, places, _ = found[name]
            _, row, column = places[channel, rank].tolist()
            rows, columns, scale = geometry[name.partition("@")[0]]
            box = _box(rows, columns, scale, (int(row), int(column)), image.pixels.shape)
            pixels = image.pixels[box[0] : box[2], box[1] : box[3]]
            patch = Patch(float(values[channel, rank]), key, box, pixels)
            cut.setdefault(name, {}).setdefault(channel, {})[rank] = patch
    fields = {
        name: (rows.size * scale, columns.size * scale)
        for name in cut
        for rows, columns, scale in (geometry[name.partition("@")[0]],)
    }
    points = [
        name for point in extractor.names for name in found if name.partition("@")[0] == point
    ]
    ordered = {
        name: {
            channel: [ranks[n] for n in sorted(ranks)]
            for channel, ranks in sorted(cut[name].items())
        }
        for name in points
        if name in cut
    }
    return TopPatches(ordered, fields, {name: found[name][2] for name in cut}, len(samples))


def _largest(
    samples: Samples, patches: int, channels: int, progress: Callable[[str, int, int], object]
) -> dict[str, tuple[Tensor, Tensor, int]]:
    """By point: values ``(C, K)``; the sample's number, row and column ``(C, K, 3)``; and the
    number of channels in all."""
    found: dict[str, tuple[Tensor, Tensor, int]] = {}
    for index in range(len(samples)):
        progress("looking for the largest", index, len(samples))
        for name, top in samples.sample(index).tensors.items():
            if not name.endswith(TOP):
                continue
            count = len(top)
            top = top[:channels]
            point = name.removesuffix(TOP)
            number = torch.full((len(top), 1), float(index), dtype=torch.float64)
            place = torch.cat([number, top[:, 1:].double()], 1)[:, None]
            value = top[:, :1].double()
            if point in found:
                value = torch.cat([found[point][0], value], 1)
                place = torch.cat([found[point][1], place], 1)
            # stable: of equal values the first in the data set's order
            order = value.sort(dim=1, descending=True, stable=True).indices[:, :patches]
            value = value.gather(1, order)
            place = place.gather(1, order[..., None].expand(-1, -1, 3))
            found[point] = (value, place, count)
    return found


def _fields(extractor: FeatureExtractor) -> dict[str, tuple[ReceptiveField, ReceptiveField, int]]:
    """Receptive fields of each point along rows and columns, and the pixels of one of their
    units."""
    network, vae = extractor.network, extractor.vae

    def scale(name: str) -> int:
        if network is not vae:
            return PIXELS_PER_LATENT
        return vae.downscale if name.startswith(DECODING) else 1

    fields = receptive_fields(network)
    return {name: (rows, columns, scale(name)) for name, (rows, columns) in fields.items()}


def _box(
    rows: ReceptiveField,
    columns: ReceptiveField,
    scale: int,
    place: tuple[int, int],
    shape: tuple[int, ...],
) -> Box:
    """The receptive field of one place as a part of the input, at least a pixel."""
    (top, bottom), (left, right) = rows.span(place[0]), columns.span(place[1])
    top, left = (
        min(max(0, a * scale), side - 1) for a, side in zip((top, left), shape[:2], strict=True)
    )
    bottom, right = (
        min(max((b + 1) * scale, a + 1), side)
        for a, b, side in zip((top, left), (bottom, right), shape[:2], strict=True)
    )
    return top, left, bottom, right
