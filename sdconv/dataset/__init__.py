"""Data sets as shards: the latents, or the features, of a million images.

``encode`` makes a folder of shards that can be resumed, extended and verified; ``open_latents``
reads it; ``Encoder`` is the work on a batch, for engines of your own.
"""

from __future__ import annotations

from sdconv.dataset.checking import Status, Verified, status, verify
from sdconv.dataset.encode import encode
from sdconv.dataset.encoder import Encoder, Settings
from sdconv.dataset.features import FeatureExtractor, FeatureSettings, features
from sdconv.dataset.plan import Plan, plan
from sdconv.dataset.reading import Latents, Samples, open_latents
from sdconv.dataset.run import Options, Summary

__all__ = [
    "Encoder",
    "FeatureExtractor",
    "FeatureSettings",
    "Latents",
    "Options",
    "Plan",
    "Samples",
    "Settings",
    "Status",
    "Summary",
    "Verified",
    "encode",
    "features",
    "open_latents",
    "plan",
    "status",
    "verify",
]
