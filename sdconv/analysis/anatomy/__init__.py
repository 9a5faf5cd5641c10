"""What each operation of an autoencoder does and costs, and its receptive field."""

from sdconv.analysis.anatomy.counts import ROLES, Anatomy, Block, Operation, Total
from sdconv.analysis.anatomy.recording import LARGEST_SIDE, Recorder, TensorGeometry, dissect

__all__ = [
    "LARGEST_SIDE",
    "ROLES",
    "Anatomy",
    "Block",
    "Operation",
    "Recorder",
    "TensorGeometry",
    "Total",
    "dissect",
]
