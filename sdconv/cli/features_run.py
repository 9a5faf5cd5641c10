"""What `sdconv features` does: list a network's layers, run it under capture, write the page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdconv.cli.common import Dtype, counting
from sdconv.cli.running import running
from sdconv.sizes import parse_size

if TYPE_CHECKING:
    from torch import Tensor

    from sdconv.config import Config
    from sdconv.features import Maps, Points
    from sdconv.features.drivers import Run
    from sdconv.report.features.write import Page

DETAILED = 16  # as in sdconv.report.features.content, which is imported late
MAPS, PAGE = "maps.zarr", "report.html"
IN_MEMORY = 1 << 30
"""Bytes of feature maps that stay in memory, so that they need not be read from the disk again."""


def list_points(
    config: Config,
    size: str | None,
    layers: list[str] | None,
    exclude: list[str] | tuple[()],
) -> Points:
    """The points of a network that has a config but no weights."""

    from sdconv.devices import on_meta
    from sdconv.features import Points
    from sdconv.features import features as points_of
    from sdconv.features.conditions import latent_sides
    from sdconv.features.selection import match_patterns, match_points
    from sdconv.loading import build
    from sdconv.models.unet import UNet2DConditionModel

    pixels = None if size is None else parse_size(size)
    with on_meta():
        network = build(config)
    sides = latent_sides(network, pixels) if isinstance(network, UNet2DConditionModel) else pixels
    points = points_of(network, sides)
    match = match_points if layers else match_patterns
    kept = match(points.names, layers or "*", exclude)
    names = {name for some in kept.values() for name in some}
    return Points([point for point in points if point.name in names])


def capture_run(
    run: Run,
    layers: list[str] | None,
    exclude: list[str] | tuple[()],
    kept: list[int],
    store: Path,
) -> tuple[Points, Maps]:
    """Run the network under capture, up to the last call that is kept. Feature maps are kept in
    float16, unless values are too large for it, as in SDXL's VAE."""
    from sdconv.config.facts import PIXELS_PER_LATENT
    from sdconv.features import capture
    from sdconv.features import features as points_of
    from sdconv.features.reduction import float16_where_it_fits
    from sdconv.report.features.drawing import block_outputs

    points = points_of(run.network, run.size)
    single = len(run.calls) == 1
    calls = run.calls if single else run.calls[: max(kept) + 1]
    rows, columns = run.size
    pixels = run.size if run.methods else (PIXELS_PER_LATENT * rows, PIXELS_PER_LATENT * columns)

    def small(x: Tensor) -> Tensor:
        return float16_where_it_fits(x if run.reduce is None else run.reduce(x))

    with (
        capture(
            run.network,
            layers or _of_methods(block_outputs(points), run.methods),
            exclude=exclude,
            steps=None if single else kept,
            reduce=small,
            store=store,
            max_memory=IN_MEMORY,
        ) as maps,
        running("computing", run.network, pixels, run.methods or ["denoise"] * len(calls)),
    ):
        for call in calls:
            call()
    return points, maps


@dataclass(frozen=True)
class Shown:
    """How much the page shows: channels in detail and bytes in all; the dtype of the run."""

    detail: int
    limit: int
    dtype: Dtype


def other_runs(folders: list[Path]) -> dict[str, Maps]:
    """The feature maps of other runs, by the names of their folders."""
    from sdconv.features import open_maps
    from sdconv.report.features.feature_maps import THIS_RUN

    found: dict[str, Maps] = {}
    for folder in folders:
        name = folder.resolve().name
        while name in found or name == THIS_RUN:
            name += "'"
        found[name] = open_maps(folder / MAPS if (folder / MAPS).is_dir() else folder)
    return found


def write_run_page(
    run: Run,
    points: Points,
    maps: Maps,
    others: dict[str, Maps],
    path: Path,
    weights: str,
    shown: Shown,
) -> Page:
    from sdconv.report.features.drawing import drawing_of
    from sdconv.report.features.feature_maps import feature_maps
    from sdconv.report.features.kernels import kernels_of
    from sdconv.report.features.write import write_page

    drawing = drawing_of(points, maps)
    with counting("drawing") as progress:
        return write_page(
            path,
            feature_maps(maps, points, drawing, others),
            drawing,
            title=f"{run.network.config.class_name} \u00b7 {weights}",
            facts={**run.facts, "computed in": shown.dtype.value},
            sizes={point.name: point.size for point in points if point.size is not None},
            image=run.image,
            kernels=kernels_of(run.network, points, drawing),
            store=MAPS,
            limit=shown.limit,
            detailed=shown.detail,
            progress=progress,
        )


def _of_methods(names: list[str], methods: tuple[str, ...]) -> list[str]:
    """The blocks that an autoencoder's methods run; all blocks of other networks."""
    inside = {"encode": ("encoder.", "quant_conv"), "decode": ("decoder.", "post_quant_conv")}
    if not methods:
        return names
    starts = tuple(start for name in methods for start in inside[name])
    return [name for name in names if name.startswith(starts)]
