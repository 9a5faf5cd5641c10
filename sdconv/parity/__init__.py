"""Comparison with a reference, module by module."""

from sdconv.parity.check import ParityReport, check, components
from sdconv.parity.compare import ModuleDifference, compare

__all__ = ["ModuleDifference", "ParityReport", "check", "compare", "components"]
