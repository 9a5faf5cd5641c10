"""Maps made up for the page's tests: no network is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdconv.report.features.drawing import Arm, Block, Drawing, drawn
from sdconv.report.features.views import FeatureMap, Shot, Values
from sdconv.report.features.write import Page, write_page

DRAWING = drawn(
    [
        Block(name="conv_in", kind="conv", arm=Arm.down, level=0),
        Block(name="down.0", kind="resnet", arm=Arm.down, level=0),
        Block(name="down.1", kind="downsample", arm=Arm.down, level=1),
        Block(name="mid", kind="attention", arm=Arm.base, level=1),
        Block(name="up.0", kind="upsample", arm=Arm.up, level=0),
        Block(name="up.1", kind="resnet", arm=Arm.up, level=0),
        Block(name="conv_out", kind="conv", arm=Arm.up, level=0),
    ],
    [("down.0", "up.1")],
)
TIMESTEPS = (901.0, 601.0, 301.0, 1.0)
CHANNELS = {"conv_in": 4, "down.0": 24, "down.0:silu1": 24, "down.1": 48, "mid": 2560, "up.1": 24}
HALVES = ("conditional", "unconditional")


def values(name: str, step: int, half: str | None) -> Values:
    """Channel ``c`` varies the more the smaller ``c`` is from the last one."""
    channels, side = CHANNELS[name], 8 if name == "mid" else 16
    random = np.random.default_rng([len(name), step, half == "unconditional"])
    maps = (
        random.standard_normal((channels, side, side)) * np.linspace(1, 5, channels)[:, None, None]
    )
    return np.asarray(maps + step, np.float32)


def maps_of(steps: bool = True) -> list[FeatureMap]:
    """Of all blocks but ``up.0`` and ``conv_out``; with ``steps``, four timesteps in two halves."""
    calls: list[tuple[int, float | None, str | None]] = [(0, None, None)]
    if steps:
        calls = [(at, t, half) for at, t in enumerate(TIMESTEPS) for half in HALVES]
    found = []
    for name, channels in CHANNELS.items():
        side = 8 if name == "mid" else 16
        shots = [
            Shot(
                read=lambda name=name, step=step, half=half: values(name, step, half),  # type: ignore[misc]
                shape=(channels, side, side),
                step=step,
                timestep=timestep,
                half=half,
            )
            for step, timestep, half in calls
        ]
        block = name.partition(":")[0]
        found.append(FeatureMap(name=name, block=block, shots=shots, facts={"stride": "1/2"}))
    return found


def page(path: Path, maps: list[FeatureMap], drawing: Drawing = DRAWING, **more: Any) -> Page:
    """A page of these."""
    given = {"title": "A network", "facts": {"input": "noise"}, **more}
    return write_page(path, maps, drawing, **given)


PICTURE = Image.new("RGB", (40, 30), "teal")
