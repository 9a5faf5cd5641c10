"""What weights contain: networks, all other tensors, and unusual values."""

from sdconv.analysis.inspection.contents import (
    Amount,
    InspectedNetwork,
    InspectedSource,
    Inspection,
    OtherTensors,
    inspect,
)
from sdconv.analysis.inspection.values import ValueReport, check_values

__all__ = [
    "Amount",
    "InspectedNetwork",
    "InspectedSource",
    "Inspection",
    "OtherTensors",
    "ValueReport",
    "check_values",
    "inspect",
]
