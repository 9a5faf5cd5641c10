"""Synthetic feature maps for the page's tests: no network is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdconv.features.rendering import Values
from sdconv.report.features.drawing import Box, Branch, Drawing, lay_out
from sdconv.report.features.feature_maps import FeatureMap, Snapshot
from sdconv.report.features.write import Page, write_page

DRAWING = lay_out(
    [
        Box(name="conv_in", kind="conv", branch=Branch.down, level=0),
        Box(name="down.0", kind="resnet", branch=Branch.down, level=0),
        Box(name="down.1", kind="downsample", branch=Branch.down, level=1),
        Box(name="mid", kind="attention", branch=Branch.mid, level=1),
        Box(name="up.0", kind="upsample", branch=Branch.up, level=0),
        Box(name="up.1", kind="resnet", branch=Branch.up, level=0),
        Box(name="conv_out", kind="conv", branch=Branch.up, level=0),
    ],
    [("down.0", "up.1")],
)
TIMESTEPS = (901.0, 601.0, 301.0, 1.0)
CHANNELS = {"conv_in": 4, "down.0": 24, "down.0:silu1": 24, "down.1": 48, "mid": 2560, "up.1": 24}
HALVES = ("conditional", "unconditional")
SIZES = {"mid": (8, 8), "up.1": (16, 24)}
"""Rows and columns of those feature maps that are not 16 x 16."""


def values(name: str, step: int, half: str | None) -> Values:
    """Noise whose standard deviation grows with the channel, from 1 to 5."""
    channels, size = CHANNELS[name], SIZES.get(name, (16, 16))
    random = np.random.default_rng([len(name), step, half == "unconditional"])
    maps = random.standard_normal((channels, *size)) * np.linspace(1, 5, channels)[:, None, None]
    return np.asarray(maps + step, np.float32)


def maps_of(steps: bool = True) -> list[FeatureMap]:
    """Feature maps of all boxes but ``up.0`` and ``conv_out``; with ``steps``, at four timesteps in
    two halves."""
    calls: list[tuple[int, float | None, str | None]] = [(0, None, None)]
    if steps:
        calls = [(at, t, half) for at, t in enumerate(TIMESTEPS) for half in HALVES]
    found = []
    for name, channels in CHANNELS.items():
        snapshots = [
            Snapshot(
                read=lambda name=name, step=step, half=half: values(name, step, half),  # type: ignore[misc]
                shape=(channels, *SIZES.get(name, (16, 16))),
                step=step,
                timestep=timestep,
                half=half,
            )
            for step, timestep, half in calls
        ]
        box = name.partition(":")[0]
        facts = {"upscale": "2"}
        found.append(FeatureMap(name=name, box=box, snapshots=snapshots, facts=facts))
    return found


def page(path: Path, maps: list[FeatureMap], drawing: Drawing = DRAWING, **more: Any) -> Page:
    """Write a page that shows them."""
    texts = {"title": "A network", "facts": {"input": "noise"}}
    return write_page(path, maps, drawing, **texts | more)


IMAGE = Image.new("RGB", (40, 30), "teal")
