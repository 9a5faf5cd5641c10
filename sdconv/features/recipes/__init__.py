"""Published methods as edits of feature maps, each a few lines on top of ``sdconv.capture``,
``edit``, ``run_until`` and ``reuse``; all for U-Nets, sdconv's or diffusers', bare or in a
pipeline."""

from __future__ import annotations

from sdconv.features.recipes.deepcache import deepcache
from sdconv.features.recipes.dift import dift, nearest_cells
from sdconv.features.recipes.freeu import freeu
from sdconv.features.recipes.gradients import feature_gradient
from sdconv.features.recipes.h_space import h_space
from sdconv.features.recipes.heat_maps import HeatMaps, heat_maps
from sdconv.features.recipes.plug_and_play import plug_and_play, plug_and_play_places

__all__ = [
    "HeatMaps",
    "deepcache",
    "dift",
    "feature_gradient",
    "freeu",
    "h_space",
    "heat_maps",
    "nearest_cells",
    "plug_and_play",
    "plug_and_play_places",
]
