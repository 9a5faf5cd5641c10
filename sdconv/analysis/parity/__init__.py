"""Comparison with a reference, module by module."""

from sdconv.analysis.parity.check import ParityReport, check, components
from sdconv.analysis.parity.compare import ModuleDifference, compare

__all__ = ["ModuleDifference", "ParityReport", "check", "compare", "components"]
