"""Faults injected into Winograd's convolutions, which a check against float64 must show."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import halos
from helpers.conv_cases import GROUPS, WITHIN, Case, expected_stats, in_place
from helpers.numbers import error
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu import conv, group_stats, torch_kernels
from sdconv.fast.cpu.conv import Epilogue, direct_downsample_conv, direct_upsample_conv
from sdconv.fast.cpu.tiling import Strip
from sdconv.fast.cpu.weight_cache import weight_cache
from sdconv.fast.cpu.winograd import (
    CONV3X3,
    DOWNSAMPLE_CONV,
    OUTPUT_TILE,
    UPSAMPLE_CONV,
    Scheme,
)

SCHEMES = pytest.mark.parametrize(
    "scheme",
    [CONV3X3, UPSAMPLE_CONV, DOWNSAMPLE_CONV],
    ids=["conv", "upsample", "downsample"],
)
# of the names of the schemes' kernels
PREFIX = {CONV3X3: "", UPSAMPLE_CONV: "upsample_", DOWNSAMPLE_CONV: "downsample_"}
# the output's rows that begin a strip, of two tile rows each
BORDERS = {CONV3X3: 2, UPSAMPLE_CONV: 5, DOWNSAMPLE_CONV: 1}


def bare(scheme: Scheme, **options: Any) -> tuple[Case, Tensor]:
    """A convolution without prologue and epilogue, and its output in float64."""
    case = Case(**{"normed": False, "height": 12, **options})
    case.epilogue = Epilogue()
    if scheme is CONV3X3:
        return case, case.expected()
    if scheme is UPSAMPLE_CONV:
        return case, direct_upsample_conv(case.x.double(), case.weight.double(), None)
    return case, direct_downsample_conv(case.x.double(), case.weight.double(), None)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("field", "further"), [("borders", 1), ("x", -1), ("x", 1), ("residual", 1)]
)
def test_a_wrong_row_between_bands_is_noticed(
    field: str, further: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches the kernel with the address of another row."""
    pytest.importorskip("numba", reason="without it there are no bands: pip install sdconv[fast]")
    module = import_module("sdconv.fast.cpu.numba.winograd")
    case = Case(channels=8, height=131, dtype=dtype, shortcut=field == "residual")
    assert case.epilogue.residual is not None
    below = functional.pad(case.epilogue.residual, (0, 0, 0, 1))  # a row, which is then read
    below = below.contiguous(memory_format=torch.channels_last)
    case.epilogue = replace(case.epilogue, residual=below[:, :, :-1])
    launch, changed = vars(module)["launch"], 0
    with halos.bands_of(8, 1):
        expected = in_place(case)[0]

        def wrong(kernel: Any, kind: Any, **values: int) -> None:
            nonlocal changed
            if field in values and "borders" in values:
                changed += 1
                values[field] += further * values["row"]
            launch(kernel, kind, **values)

        monkeypatch.setattr(module, "launch", wrong)
        assert error(in_place(case)[0], expected) > 1e-2
        assert changed == 1


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
