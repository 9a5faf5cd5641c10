"""The fused convolutions against torch's own in float64, and what must make such a check fail."""

from __future__ import annotations

import tempfile
import threading
from dataclasses import replace
from fractions import Fraction
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import halos
from helpers.numbers import error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdconv.fast.cpu import conv as fused
from sdconv.fast.cpu import kernels as engines
from sdconv.fast.cpu.conv import After, NotFiniteError
from sdconv.fast.cpu.group_stats import Norm
from sdconv.fast.cpu.tiling import scratch
from sdconv.fast.cpu.winograd import DOUBLED, OUTPUTS, PLAIN, Scheme, through

# of the largest value; the direct kernel's own error in float32 is about a third of it
WITHIN = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}
GROUPS = 4


def expected_moments(x: Tensor, groups: int) -> Tensor:
    parts = x.double().reshape(len(x), groups, -1)
    return torch.stack([parts.mean(-1), parts.var(-1, correction=0)], dim=-1)


def in_float64(norm: Norm | None) -> Norm | None:
    if norm is None:
        return None
    return replace(norm, weight=norm.weight.double(), bias=norm.bias.double())


def after_in_float64(after: After) -> After:
    shortcut = after.shortcut
    return After(
        *(None if t is None else t.double() for t in (after.bias, after.added, after.residual)),
        None if shortcut is None else (shortcut[0].double(), shortcut[1].double()),
    )


def lying(x: Tensor, layout: str) -> Tensor:
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "every other":
        return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]
    return x


class Case:
    """A convolution with everything round it, from a seed."""

    def __init__(
        self,
        seed: int = 0,
        batch: int = 1,
        channels: int = 12,
        out_channels: int = 8,
        height: int = 11,
        width: int = 14,
        layout: str = "channels last",
        dtype: torch.dtype = torch.float32,
        normed: bool = True,
        shortcut: bool = False,
    ) -> None:
        random = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(dtype)

        self.x = lying(draw(batch, channels, height, width) + 0.5, layout)
        self.weight = draw(out_channels, channels, 3, 3) / (3 * channels**0.5)
        self.norm = None
        if normed:
            found = fused.moments(self.x, GROUPS)
            self.norm = Norm(found, 1 + draw(channels) / 4, draw(channels), 1e-6, True)
        beside = draw(batch, channels if shortcut else out_channels, height, width)
        by = (draw(out_channels, channels, 1, 1), draw(out_channels)) if shortcut else None
        self.after = After(draw(out_channels), draw(batch, out_channels), lying(beside, layout), by)

    def run(self, tile_rows: int | None = None, scheme: Scheme = PLAIN) -> tuple[Tensor, Tensor]:
        return fused.winograd_convolution(
            self.x,
            self.weight,
            self.norm,
            self.after,
            scheme=scheme,
            groups=GROUPS,
            tile_rows=tile_rows,
        )

    def expected(self) -> Tensor:
        return fused.direct(
            self.x.double(),
            self.weight.double(),
            in_float64(self.norm),
            after_in_float64(self.after),
        )


cases = st.builds(
    Case,
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 2),
    channels=st.sampled_from([4, 12, 68]),
    out_channels=st.sampled_from([4, 8, 132]),
    height=st.integers(1, 19),
    width=st.sampled_from([2, 3, 4, 5, 17, 40]),
    layout=st.sampled_from(["channels first", "channels last", "every other"]),
    dtype=st.sampled_from(list(WITHIN)),
    normed=st.booleans(),
    shortcut=st.booleans(),
)


@given(case=cases, tile_rows=st.sampled_from([None, 1, 2]))
@settings(max_examples=60)
def test_convolution_is_torchs_in_float64(case: Case, tile_rows: int | None) -> None:
    out, found = case.run(tile_rows)
    expected = case.expected()
    within = WITHIN[case.x.dtype]
    assert out.dtype == case.x.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert error(out, expected) < within
    assert error(found, expected_moments(expected, GROUPS)) < 4 * within


@given(case=cases, rows=st.sampled_from([None, 1, 2]))
@settings(max_examples=40)
def test_doubled_convolution_is_torchs_in_float64(case: Case, rows: int | None) -> None:
    bias = case.after.bias
    out, found = fused.winograd_convolution(
        case.x, case.weight, None, After(bias), scheme=DOUBLED, groups=GROUPS, tile_rows=rows
    )
    expected = fused.direct_doubled(case.x.double(), case.weight.double(), bias.double())
    within = WITHIN[case.x.dtype]
    assert out.dtype == case.x.dtype
    assert error(out, expected) < within
    assert error(found, expected_moments(expected, GROUPS)) < 4 * within


def test_moments_of_values_far_from_zero() -> None:
    x = torch.randn(2, 8, 33, 21, generator=torch.Generator().manual_seed(0)) + 1000
    assert error(fused.moments(x, 4), expected_moments(x, 4)) < 1e-9


def test_written_over_its_input() -> None:
    case = Case(channels=8, height=30)
    expected, moments = case.run()
    spoilt = case.x.clone(memory_format=torch.channels_last)
    out, found = fused.winograd_convolution(
        spoilt,
        case.weight,
        case.norm,
        case.after,
        groups=GROUPS,
        in_place=True,
        tile_rows=2,
    )
    assert out is spoilt
    assert error(out, expected) < 1e-6
    assert error(found, moments) < 1e-6


def test_same_bits_each_time_and_for_any_strip() -> None:
    case = Case(height=40, width=33, channels=68)
    once, found = case.run(2)
    again, found_again = case.run(2)
    assert torch.equal(once, again)
    assert torch.equal(found, found_again)
    for tile_rows in (1, 3, 10):
        assert error(case.run(tile_rows)[0], once) < 1e-6


def test_several_threads_at_once() -> None:
    case = Case(height=40, width=33, channels=68)
    expected = case.run(2)[0]
    found: list[Tensor] = []

    def work() -> None:
        for _ in range(10):
            found.append(case.run(2)[0])
        scratch.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_is_not_finite_is_not_spread(value: float) -> None:
    case = Case(normed=False)
    case.x[0, 3, 5, 6] = value
    with pytest.raises(NotFiniteError):
        case.run()
    with pytest.raises(NotFiniteError):
        fused.winograd_convolution(case.x, 4 * case.weight, scheme=DOUBLED)


def test_the_points_lose_half_as_much_to_rounding_as_the_usual_ones() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 256, 32, 32, generator=random)
    weight = torch.randn(32, 256, 3, 3, generator=random)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    # by the plain transforms, which take any scheme
    lost = []
    for scheme in (PLAIN, through(*map(Fraction, (0, 1, -1, 2, -2)))):
        rows = torch.nn.functional.pad(x[0].permute(1, 2, 0), (0, 0, 1, 1, 1, 1))
        kernel = scheme.kernel_transform(weight)
        out = scheme.output_transform(scheme.input_transform(rows) @ kernel, 8)
        lost.append((out.permute(2, 0, 1) - exact[0]).square().mean().sqrt())
    assert 0.3 < float(lost[0] / lost[1]) < 0.6


# What a check against float64 must notice.


SCHEMES = pytest.mark.parametrize("scheme", [PLAIN, DOUBLED], ids=["plain", "doubled"])


def bare(scheme: Scheme, **options: Any) -> tuple[Case, Tensor]:
    """A convolution with nothing round it, and its truth."""
    case = Case(**{"normed": False, **options})
    case.after = After()
    if scheme is PLAIN:
        return case, case.expected()
    return case, fused.direct_doubled(case.x.double(), case.weight.double(), None)


@pytest.mark.parametrize("matrix", ["input", "kernel", "output"])
def test_a_wrong_constant_is_noticed(matrix: str) -> None:
    case = Case(dtype=torch.float64)
    assert error(case.run()[0], case.expected()) < 1e-12
    wrong = [list(row) for row in getattr(PLAIN, matrix)]
    wrong[1][2] += 1e-3
    assert error(case.run(scheme=replace(PLAIN, **{matrix: wrong}))[0], case.expected()) > 1e-5


@SCHEMES
def test_a_wrong_constant_of_the_weights_is_noticed(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, expected = bare(scheme)
    assert error(case.run(scheme=scheme)[0], expected) < WITHIN[torch.float32]
    right = Scheme.kernel_transform

    def wrong(self: Scheme, weight: Tensor, dtype: torch.dtype) -> Tensor:
        kernel = [list(row) for row in self.kernel]
        kernel[1][2] *= 1.01
        return right(replace(self, kernel=kernel), weight, dtype)

    monkeypatch.setattr(Scheme, "kernel_transform", wrong)
    assert error(case.run(scheme=scheme)[0], expected) > 20 * WITHIN[torch.float32]


@cache
def miscompiled() -> Any:
    """The kernels compiled anew with two of the schemes' points a hundredth off. They are kept: a
    thread knows its jobs by a kernel's id."""
    source = Path(kernels().__file__)
    right, where = source.read_text("utf-8"), "_PP, _QQ, _RR = "
    assert right.count(where) == 1
    wrong = right.replace(where, f"_P, _R = f32(1.01) * _P, f32(1.01) * _R\n{where}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "miscompiled.py"
        file.write_text(wrong, "utf-8")
        spec = spec_from_file_location("miscompiled", file)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def kernels() -> Any:
    pytest.importorskip("numba", reason="compiles the kernels: pip install sdconv[fast]")
    return import_module("sdconv.fast.cpu.numba.transforms")


@SCHEMES
@pytest.mark.parametrize("direction", ["load", "store"])
def test_a_wrong_constant_of_the_kernels_is_noticed(
    scheme: Scheme, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, expected = bare(scheme)
    kernel = direction if scheme is PLAIN else f"{direction}_doubled"
    wrong, engine = getattr(miscompiled(), kernel), engines.compiled()[0]
    in_use = vars(engine)[f"_{direction.upper()}"]
    assert in_use[scheme] is getattr(kernels(), kernel)
    assert error(case.run(scheme=scheme)[0], expected) < WITHIN[torch.float32]
    monkeypatch.setitem(in_use, scheme, wrong)
    assert error(case.run(scheme=scheme)[0], expected) > 100 * WITHIN[torch.float32]


def test_a_doubled_map_without_one_of_its_places_is_noticed() -> None:
    case = Case(dtype=torch.float64, normed=False)
    case.after = After()
    expected = fused.direct_doubled(case.x, case.weight, None)
    assert error(case.run(scheme=DOUBLED)[0], expected) < 1e-12
    short = replace(
        DOUBLED,
        input=DOUBLED.input[:-1],
        kernel=DOUBLED.kernel[:-1],
        output=tuple(row[:-1] for row in DOUBLED.output),
    )
    assert error(case.run(scheme=short)[0], expected) > 1e-2


@SCHEMES
@pytest.mark.parametrize(
    ("layout", "fault"),
    [
        *(("channels last", fault) for fault in halos.WHERE_THEY_LIE),
        *(("channels first", fault) for fault in halos.COPIED),
    ],
)
def test_a_missing_row_between_strips_is_noticed(
    scheme: Scheme, layout: str, fault: halos.Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, expected = bare(scheme, height=22, layout=layout)
    borders = halos.border_rows(fault, 2 * OUTPUTS, expected.shape[2])
    assert len(borders) == (2 if scheme is PLAIN else 5)

    def errors() -> Tensor:
        """Of each row of the output."""
        off = (case.run(2, scheme)[0].double() - expected).abs() / expected.abs().max()
        return off.amax(dim=(0, 1, 3))

    assert errors().max() < WITHIN[torch.float32]
    fault(monkeypatch)
    found = errors()
    assert found[borders].min() > 1e-2
    found[borders] = 0
    assert found.max() < WITHIN[torch.float32], "and it is the border that shows it"


def test_moments_of_a_strip_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(height=40)
    expected, norm = case.expected(), case.norm
    assert norm is not None

    def errors() -> list[float]:
        """Of a map's moments, of those that come with a convolution, and of what is normalised."""
        out, found = case.run(2)
        own = fused.moments(case.x, GROUPS)
        case.norm = replace(norm, moments=own)
        normalised = error(case.run(2)[0], expected)
        own_error = error(own, expected_moments(case.x, GROUPS))
        return [own_error, error(found, expected_moments(out, GROUPS)), normalised]

    assert max(errors()) < WITHIN[torch.float32]
    right = fused.combined
    # the parts of the first rows, as if there were no others
    monkeypatch.setattr(fused, "combined", lambda sums, counts: right(sums[:2], counts[:2]))
    assert min(errors()) > 1e-3
