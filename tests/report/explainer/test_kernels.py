"""The page's Winograd convolution interpolates at the fast backend's points."""

from __future__ import annotations

from dataclasses import astuple
from fractions import Fraction

from sdconv.fast.cpu.winograd import CONV3X3, toom_cook
from sdconv.report.explainer.kernels import POINTS


def test_the_points_are_the_fast_backends() -> None:
    p, q = map(Fraction, POINTS)
    assert astuple(toom_cook(Fraction(0), p, -p, q, -q)) == astuple(CONV3X3)
    other = toom_cook(Fraction(0), p, -p, Fraction(2), Fraction(-2))
    assert astuple(other) != astuple(CONV3X3)
