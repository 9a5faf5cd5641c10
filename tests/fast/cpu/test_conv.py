"""The fused convolutions against torch's own in float64, and injected faults that must show."""

from __future__ import annotations

import sys
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

from sdconv.fast.cpu import conv, group_stats, torch_kernels
from sdconv.fast.cpu.buffer_pool import scratch
from sdconv.fast.cpu.conv import Epilogue, NotFiniteError, Prologue
from sdconv.fast.cpu.tiling import Strip
from sdconv.fast.cpu.weight_cache import weight_cache
from sdconv.fast.cpu.winograd import (
    CONV3X3,
    DOWNSAMPLE_CONV,
    OUTPUT_TILE,
    UPSAMPLE_CONV,
    Scheme,
    toom_cook,
)

# relative to the largest value; the direct kernel's own error in float32 is about a third of it
WITHIN = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
GROUPS = 4


def expected_stats(x: Tensor, groups: int) -> Tensor:
    parts = x.double().reshape(len(x), groups, -1)
    return torch.stack([parts.mean(-1), parts.var(-1, correction=0)], dim=-1)


def prologue_in_float64(prologue: Prologue | None) -> Prologue | None:
    if prologue is None:
        return None
    return replace(prologue, weight=prologue.weight.double(), bias=prologue.bias.double())


def epilogue_in_float64(epilogue: Epilogue) -> Epilogue:
    added = (epilogue.bias, epilogue.temb, epilogue.residual)
    shortcut = epilogue.shortcut
    return Epilogue(
        *(None if t is None else t.double() for t in added),
        None if shortcut is None else (shortcut[0].double(), shortcut[1].double()),
    )


def lying(x: Tensor, layout: str) -> Tensor:
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "every other":
        return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]
    return x


class Case:
    """A convolution with prologue and epilogue, drawn from a seed."""

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
        self.prologue = None
        if normed:
            stats = group_stats.group_stats(self.x, GROUPS)
            self.prologue = Prologue(stats, 1 + draw(channels) / 4, draw(channels), 1e-6, True)
        residual = draw(batch, channels if shortcut else out_channels, height, width)
        by = (draw(out_channels, channels, 1, 1), draw(out_channels)) if shortcut else None
        bias, temb = draw(out_channels), draw(batch, out_channels)
        self.epilogue = Epilogue(bias, temb, lying(residual, layout), by)

    def run(self, scheme: Scheme = CONV3X3) -> tuple[Tensor, Tensor]:
        return conv.winograd_conv(self.x, self.weight, scheme, self.prologue, self.epilogue, GROUPS)

    def expected(self) -> Tensor:
        return conv.direct_conv(
            self.x.double(),
            self.weight.double(),
            prologue_in_float64(self.prologue),
            epilogue_in_float64(self.epilogue),
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
def test_winograd_agrees_with_torch_in_float64(case: Case, tile_rows: int | None) -> None:
    with halos.strips_of(tile_rows):
        out, found = case.run()
    expected = case.expected()
    within = WITHIN[case.x.dtype]
    assert out.dtype == case.x.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert error(out, expected) < within
    assert error(found, expected_stats(expected, GROUPS)) < 4 * within


@given(case=cases, tile_rows=st.sampled_from([None, 1, 2]))
@settings(max_examples=40)
def test_winograd_after_upsampling_agrees_with_torch_in_float64(
    case: Case, tile_rows: int | None
) -> None:
    bias = case.epilogue.bias
    with halos.strips_of(tile_rows):
        out, found = conv.winograd_conv(
            case.x, case.weight, UPSAMPLE_CONV, None, Epilogue(bias), GROUPS
        )
    expected = conv.direct_upsample_conv(case.x.double(), case.weight.double(), bias.double())
    within = WITHIN[case.x.dtype]
    assert out.dtype == case.x.dtype
    assert error(out, expected) < within
    assert error(found, expected_stats(expected, GROUPS)) < 4 * within


@given(
    case=cases,
    rows=st.integers(1, 12),
    columns=st.sampled_from([1, 2, 7, 20]),
    tile_rows=st.sampled_from([None, 1, 2]),
)
@settings(max_examples=40)
def test_winograd_at_stride_2_agrees_with_torch_in_float64(
    case: Case, rows: int, columns: int, tile_rows: int | None
) -> None:
    size, bias = (2 * rows, 2 * columns), case.epilogue.bias
    x = torch.randn(*case.x.shape[:2], *size, generator=torch.Generator().manual_seed(0))
    x = x.to(case.x.dtype)
    with halos.strips_of(tile_rows):
        out, found = conv.winograd_conv(
            x, case.weight, DOWNSAMPLE_CONV, None, Epilogue(bias), GROUPS
        )
    padded = torch.nn.functional.pad(x.double(), (0, 1, 0, 1))
    expected = torch.nn.functional.conv2d(padded, case.weight.double(), bias.double(), stride=2)
    within = WITHIN[x.dtype]
    assert out.dtype == x.dtype
    assert error(out, expected) < within
    assert error(found, expected_stats(expected, GROUPS)) < 4 * within


@pytest.mark.parametrize("size", [(12, 14), (13, 14), (12, 15), (2, 2), (3, 3)])
def test_a_strided_convolution_is_exact_for_odd_sizes_too(size: tuple[int, int]) -> None:
    case = Case(height=size[0], width=size[1], channels=128, out_channels=128)
    out, _ = conv.downsample_conv(case.x, case.weight, case.epilogue.bias, groups=GROUPS)
    padded = torch.nn.functional.pad(case.x.double(), (0, 1, 0, 1))
    expected = torch.nn.functional.conv2d(
        padded, case.weight.double(), case.epilogue.bias.double(), stride=2
    )
    assert error(out, expected) < WITHIN[torch.float32]
    method = conv.plan_for("downsample_conv", case.x, case.weight, False).method
    if size[0] % 2 or size[1] % 2:
        assert method == "direct"


def test_statistics_of_values_far_from_zero() -> None:
    x = torch.randn(2, 8, 33, 21, generator=torch.Generator().manual_seed(0)) + 1000
    assert error(group_stats.group_stats(x, 4), expected_stats(x, 4)) < 1e-9


def test_in_place_the_input_is_overwritten_with_the_output() -> None:
    case = Case(channels=8, height=30)
    expected, stats = case.run()
    x = case.x.clone(memory_format=torch.channels_last)
    around = CONV3X3, case.prologue, case.epilogue, GROUPS
    with halos.strips_of(2):
        out, found = conv.winograd_conv(x, case.weight, *around, in_place=True)
    assert out is x
    assert error(out, expected) < 1e-6
    assert error(found, stats) < 1e-6


def test_same_bits_each_time_and_nearly_so_for_other_strips() -> None:
    case = Case(height=40, width=33, channels=68)
    with halos.strips_of(2):
        once, found = case.run()
        again, found_again = case.run()
    assert torch.equal(once, again)
    assert torch.equal(found, found_again)
    for tile_rows in (1, 3, 10):
        with halos.strips_of(tile_rows):
            assert error(case.run()[0], once) < 1e-6


@given(
    case=st.builds(
        Case,
        seed=st.integers(0, 2**16),
        batch=st.integers(1, 2),
        channels=st.sampled_from([8, 68]),
        out_channels=st.sampled_from([4, 8, 132]),
        height=st.integers(1, 90),
        width=st.sampled_from([2, 5, 17, 70]),
        normed=st.booleans(),
        shortcut=st.booleans(),
    ),
    count=st.integers(1, 9),
    tile_rows=st.integers(1, 3),
    scheme=st.sampled_from([CONV3X3, UPSAMPLE_CONV, DOWNSAMPLE_CONV]),
)
@settings(max_examples=60)
def test_bands_have_the_bits_of_strips(
    case: Case, count: int, tile_rows: int, scheme: Scheme
) -> None:
    if scheme is not CONV3X3:
        case.prologue, case.epilogue = None, Epilogue(case.epilogue.bias)
    if scheme is DOWNSAMPLE_CONV:
        case.x = case.x.repeat(1, 1, 2, 2).contiguous(memory_format=torch.channels_last)
    with halos.strips_of(1):
        expected, stats = case.run(scheme)
    with halos.bands_of(count, tile_rows):
        out, found = case.run(scheme)
    assert torch.equal(out, expected) and torch.equal(found, stats)


@pytest.mark.parametrize("height", [9, 130])
def test_the_default_dtype_makes_no_difference(height: int) -> None:
    case = Case(height=height, shortcut=True)
    expected, stats = case.run()
    weight_cache.clear()
    torch.set_default_dtype(torch.float64)
    try:
        out, found = case.run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(out, expected) and torch.equal(found, stats)


def in_place(case: Case) -> tuple[Tensor, Tensor]:
    x = case.x.clone(memory_format=torch.channels_last)
    around = CONV3X3, case.prologue, case.epilogue, GROUPS
    return conv.winograd_conv(x, case.weight, *around, in_place=True)


@pytest.mark.parametrize(("count", "tile_rows"), [(1, 1), (2, 3), (8, 2), (40, 1)])
@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("height", [1, 4, 30, 32, 33, 131])
def test_bands_in_place_have_the_bits_of_strips(
    height: int, shortcut: bool, count: int, tile_rows: int
) -> None:
    case = Case(channels=8, height=height, shortcut=shortcut)
    with halos.strips_of(1):
        expected, stats = case.run()
    with halos.bands_of(count, tile_rows):
        out, found = in_place(case)
    assert torch.equal(out, expected) and torch.equal(found, stats)


@pytest.mark.parametrize(("field", "further"), [("borders", 1), ("x", -1), ("x", 1)])
def test_a_wrong_row_between_bands_is_noticed(
    field: str, further: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches the kernel with the address of another row."""
    pytest.importorskip("numba", reason="without it there are no bands: pip install sdconv[fast]")
    case, module = Case(channels=8, height=131), import_module("sdconv.fast.cpu.numba.winograd")
    launch, changed = vars(module)["launch"], 0
    with halos.bands_of(8, 1):
        expected = in_place(case)[0]

        def wrong(kernel: Any, kind: Any, **values: int) -> None:
            nonlocal changed
            if field in values and "borders" in values:
                changed += 1
                values[field] += further * 4 * values["row"]
            launch(kernel, kind, **values)

        monkeypatch.setattr(module, "launch", wrong)
        assert error(in_place(case)[0], expected) > 1e-2
        assert changed == 1


def test_several_threads_at_once() -> None:
    case = Case(height=40, width=33, channels=68)
    found: list[Tensor] = []

    def work() -> None:
        for _ in range(10):
            found.append(case.run()[0])
        scratch.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    with halos.strips_of(2):
        expected = case.run()[0]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 40
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_an_output_that_is_not_finite_is_an_error(value: float) -> None:
    case = Case(normed=False)
    case.x[0, 3, 5, 6] = value
    with pytest.raises(NotFiniteError):
        case.run()
    with pytest.raises(NotFiniteError):
        conv.winograd_conv(case.x, 4 * case.weight, UPSAMPLE_CONV, None, Epilogue(), GROUPS)
    with pytest.raises(NotFiniteError):
        even = case.x[:, :, :10].clone()
        even[0, 3, 6, 6] = value
        conv.winograd_conv(even, 4 * case.weight, DOWNSAMPLE_CONV, None, Epilogue(), GROUPS)


def test_the_points_lose_half_as_much_to_rounding_as_the_usual_ones() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 256, 32, 32, generator=random)
    weight = torch.randn(32, 256, 3, 3, generator=random)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    # by the transforms in torch operations, which take any scheme
    lost = []
    for scheme in (CONV3X3, toom_cook(*map(Fraction, (0, 1, -1, 2, -2)))):
        rows = torch.nn.functional.pad(x[0].permute(1, 2, 0), (0, 0, 1, 1, 1, 1))
        kernel = scheme.kernel_transform(weight)
        out = scheme.output_transform(scheme.input_transform(rows) @ kernel, 8)
        lost.append((out.permute(2, 0, 1) - exact[0]).square().mean().sqrt())
    assert 0.3 < float(lost[0] / lost[1]) < 0.6


# Injected faults, which a check against float64 must show.


SCHEMES = pytest.mark.parametrize(
    "scheme",
    [CONV3X3, UPSAMPLE_CONV, DOWNSAMPLE_CONV],
    ids=["conv", "upsample", "downsample"],
)
# the output's rows that begin a strip, of two tile rows each
# of the names of the schemes' kernels
PREFIX = {CONV3X3: "", UPSAMPLE_CONV: "upsample_", DOWNSAMPLE_CONV: "downsample_"}
BORDERS = {CONV3X3: 2, UPSAMPLE_CONV: 5, DOWNSAMPLE_CONV: 1}


def bare(scheme: Scheme, **options: Any) -> tuple[Case, Tensor]:
    """A convolution without prologue and epilogue, and its output in float64."""
    case = Case(**{"normed": False, "height": 12, **options})
    case.epilogue = Epilogue()
    if scheme is CONV3X3:
        return case, case.expected()
    if scheme is UPSAMPLE_CONV:
        return case, conv.direct_upsample_conv(case.x.double(), case.weight.double(), None)
    return case, conv.direct_downsample_conv(case.x.double(), case.weight.double(), None)


def by_torch_kernels(scheme: Scheme, case: Case) -> Tensor:
    """A bare convolution by any scheme, in float64."""
    rows, weight = case.x[0].permute(1, 2, 0).double(), case.weight.double()
    height, width = (size * OUTPUT_TILE // scheme.step for size in rows.shape[:2])
    strip = Strip(scheme, height, width, 0, -(-height // OUTPUT_TILE))
    tiles = rows.new_empty(1, scheme.positions, strip.tiles, rows.shape[2])
    torch_kernels.input_transform(strip, rows, 0, None, None, False, tiles)
    out = rows.new_empty(height, width, len(weight))
    kernels, bias = scheme.kernel_transform(weight), rows.new_zeros(len(weight))
    products = tiles[0] @ (kernels if scheme.order is None else kernels[scheme.order])
    torch_kernels.output_transform(strip, products, bias, None, False, out, GROUPS)
    return out.permute(2, 0, 1)[None]


@SCHEMES
@pytest.mark.parametrize("matrix", ["input", "kernel", "output"])
def test_a_wrong_constant_is_noticed(scheme: Scheme, matrix: str) -> None:
    case, expected = bare(scheme)
    assert error(by_torch_kernels(scheme, case), expected) < 1e-12
    wrong = [list(row) for row in getattr(scheme, matrix)]
    wrong[1][2] += 1e-3
    faulty = replace(scheme, **{matrix: wrong})
    assert error(by_torch_kernels(faulty, case), expected) > 1e-5


@cache
def miscompiled() -> Any:
    """The transforms compiled again with three of the schemes' points off by a hundredth. They are
    kept, since a thread finds its jobs by a kernel's id."""
    source = Path(transforms().__file__)
    code, right = source.with_name("transform_code.py").read_text("utf-8"), "\nVectors = "
    assert code.count(right) == 1
    code = code.replace(right, f"\n_P, _R, _S = 1.01 * _P, 1.01 * _R, 1.01 * _S\n{right}")
    kernels, own = source.read_text("utf-8"), "from sdconv.fast.cpu.numba.transform_code import"
    assert kernels.count(own) == 1
    with tempfile.TemporaryDirectory() as folder:
        compiled(Path(folder) / "miscompiled_code.py", code)
        name = "miscompiled"
        kernels = kernels.replace(own, f"from {name}_code import")
        return compiled(Path(folder) / f"{name}.py", kernels)


def compiled(file: Path, source: str) -> Any:
    """A module of this source, which others can import."""
    file.write_text(source, "utf-8")
    spec = spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[file.stem] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def transforms() -> Any:
    pytest.importorskip("numba", reason="compiles the kernels: pip install sdconv[fast]")
    return import_module("sdconv.fast.cpu.numba.transforms")


@cache
def mispacking() -> Any:
    """The packing of weights compiled again with one of the schemes' factors off by a hundredth."""
    source = Path(import_module("sdconv.fast.cpu.numba.packing").__file__ or "")
    code, right = source.read_text("utf-8"), "packing(one) for one"
    assert code.count(right) == 1
    wrong = """
def _off(scheme: Scheme) -> Scheme:
    first, second, *others = scheme.kernel
    return replace(scheme, kernel=(first, (*second[:2], 1.01 * second[2]), *others))
"""
    before = "\n_body, _upsample_body"
    assert code.count(before) == 1
    code = code.replace(right, "packing(_off(one)) for one")
    code = code.replace(before, wrong + before)
    code = code.replace("from typing", "from dataclasses import replace\nfrom typing", 1)
    with tempfile.TemporaryDirectory() as folder:
        return compiled(Path(folder) / "mispacking.py", code)


@pytest.mark.slow
@SCHEMES
def test_a_wrong_constant_of_the_weights_is_noticed(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    transforms()
    case, expected = bare(scheme)
    assert error(case.run(scheme)[0], expected) < WITHIN[torch.float32]
    kernel = f"pack_{PREFIX[scheme]}kernels"
    in_use = vars(import_module("sdconv.fast.cpu.numba.winograd"))["_PACK"]
    monkeypatch.setitem(in_use, scheme, getattr(mispacking(), kernel))
    weight_cache.clear()
    assert error(case.run(scheme)[0], expected) > 20 * WITHIN[torch.float32]
    weight_cache.clear()


@pytest.mark.slow
@SCHEMES
@pytest.mark.parametrize("direction", ["input", "output"])
def test_a_wrong_constant_of_the_kernels_is_noticed(
    scheme: Scheme, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, expected = bare(scheme)
    kernel = f"{PREFIX[scheme]}{direction}_transform"
    wrong = getattr(miscompiled(), kernel)
    module = import_module("sdconv.fast.cpu.numba.winograd")
    in_use = vars(module)[f"_{direction.upper()}_TRANSFORM"]
    assert in_use[scheme] is getattr(transforms(), kernel)
    assert error(case.run(scheme)[0], expected) < WITHIN[torch.float32]
    monkeypatch.setitem(in_use, scheme, wrong)
    assert error(case.run(scheme)[0], expected) > 100 * WITHIN[torch.float32]


def test_upsampling_without_one_of_its_tile_positions_is_noticed() -> None:
    case, expected = bare(UPSAMPLE_CONV)
    assert error(by_torch_kernels(UPSAMPLE_CONV, case), expected) < 1e-12
    short = replace(
        UPSAMPLE_CONV,
        input=UPSAMPLE_CONV.input[:-1],
        kernel=UPSAMPLE_CONV.kernel[:-1],
        kernel_rows=UPSAMPLE_CONV.kernel_rows[:-1],
        output=tuple(row[:-1] for row in UPSAMPLE_CONV.output),
    )
    assert error(by_torch_kernels(short, case), expected) > 1e-2


@pytest.mark.parametrize(
    ("scheme", "layout", "fault"),
    [
        (scheme, layout, fault)
        for scheme in BORDERS
        for layout, faults in (("channels last", halos.IN_PLACE), ("channels first", halos.COPIED))
        for fault in faults
        # at stride 2, no strip reads a row above its own
        if not (scheme is DOWNSAMPLE_CONV and fault is halos.top_of_the_map)
    ],
)
def test_a_missing_row_between_strips_is_noticed(
    scheme: Scheme, layout: str, fault: halos.Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, expected = bare(scheme, height=22, layout=layout)
    borders = halos.border_rows(fault, 2 * OUTPUT_TILE, expected.shape[2])
    assert len(borders) == BORDERS[scheme]

    def errors() -> Tensor:
        """The error of each row of the output."""
        with halos.strips_of(2):
            out = case.run(scheme)[0]
        return ((out.double() - expected).abs() / expected.abs().max()).amax(dim=(0, 1, 3))

    assert errors().max() < WITHIN[torch.float32]
    fault(monkeypatch)
    found = errors()
    assert found[borders].min() > 1e-2
    found[borders] = 0
    assert found.max() < WITHIN[torch.float32], "the border alone shows it"


def test_statistics_of_one_strip_alone_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(height=40)
    expected, prologue = case.expected(), case.prologue
    assert prologue is not None

    def errors() -> list[float]:
        """The errors of an input's statistics, of an output's, and of a convolution by them."""
        own = group_stats.group_stats(case.x, GROUPS)
        with halos.strips_of(2):
            out, found = case.run()
            case.prologue = replace(prologue, stats=own)
            normalised = error(case.run()[0], expected)
        own_error = error(own, expected_stats(case.x, GROUPS))
        return [own_error, error(found, expected_stats(out, GROUPS)), normalised]

    assert max(errors()) < WITHIN[torch.float32]
    right = group_stats.combine
    for module in (group_stats, conv):
        # the parts of the first rows, as if there were no others
        monkeypatch.setattr(module, "combine", lambda sums, counts: right(sums[:2], counts[:2]))
    assert min(errors()) > 1e-3
