"""What weights hold: networks, whatever lies beside them, and on request the values themselves."""

from sdconv.analysis.inspection.contents import (
    Amount,
    Inspection,
    NetworkFound,
    Part,
    Unused,
    inspect,
)
from sdconv.analysis.inspection.values import ValueReport, check_values

__all__ = [
    "Amount",
    "Inspection",
    "NetworkFound",
    "Part",
    "Unused",
    "ValueReport",
    "check_values",
    "inspect",
]
