"""The role of each convolution: its kernel, its share of the work, what it sees of the picture."""

from sdconv.analysis.anatomy.counts import ROLES, Anatomy, Block, Layer, Total
from sdconv.analysis.anatomy.recording import LARGEST_SIDE, Recorder, View, dissect

__all__ = [
    "LARGEST_SIDE",
    "ROLES",
    "Anatomy",
    "Block",
    "Layer",
    "Recorder",
    "Total",
    "View",
    "dissect",
]
