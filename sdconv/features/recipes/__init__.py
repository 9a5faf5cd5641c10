"""Published methods as edits of feature maps, each a few lines on top of ``sdconv.capture``,
``edit``, ``run_until`` and ``reuse``; all for U-Nets, sdconv's or diffusers', bare or in a
pipeline."""

from __future__ import annotations

from sdconv.features.recipes.deepcache import deepcache
from sdconv.features.recipes.dift import dift, nearest_cells
from sdconv.features.recipes.freeu import freeu
from sdconv.features.recipes.h_space import h_space
from sdconv.features.recipes.plug_and_play import plug_and_play, plug_and_play_places

__all__ = [
    "deepcache",
    "dift",
    "freeu",
    "h_space",
    "nearest_cells",
    "plug_and_play",
    "plug_and_play_places",
]
