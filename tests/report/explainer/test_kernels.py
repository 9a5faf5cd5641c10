"""The page's Winograd convolution interpolates at the fast backend's points."""

from __future__ import annotations

from fractions import Fraction

from sdconv.fast.cpu.winograd import CONV3X3, toom_cook
from sdconv.report.explainer.kernels import POINTS


def test_the_points_are_the_fast_backends() -> None:
    p, q = map(Fraction, POINTS)
    assert toom_cook(Fraction(0), p, -p, q, -q) == CONV3X3
    assert toom_cook(Fraction(0), p, -p, Fraction(2), Fraction(-2)) != CONV3X3
