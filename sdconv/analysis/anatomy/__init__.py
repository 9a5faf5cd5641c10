"""What each operation of a network does and costs, and its receptive field."""

from sdconv.analysis.anatomy.counts import PATHS, ROLES, Anatomy, Block, Operation, Total
from sdconv.analysis.anatomy.recording import LARGEST_SIDE, Recorder, TensorGeometry, dissect

__all__ = [
    "LARGEST_SIDE",
    "PATHS",
    "ROLES",
    "Anatomy",
    "Block",
    "Operation",
    "Recorder",
    "TensorGeometry",
    "Total",
    "dissect",
]
