"""The Triton kernels against float64: in Triton's interpreter, with faults planted; compiled for
GPUs; and on a GPU where there is one."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.numbers import error
from helpers.slow import first_of
from helpers.triton_interpreter import Fault, Interpreter, interpreter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from scripts.bench import kernel_resources
from sdconv.fast.cuda import attention, choices, epilogue, group_norm, upsample
from sdconv.fast.cuda.choices import TILINGS, Tiling
from sdconv.fast.cuda.epilogue import group_stats

EPS = 1e-6
# relative to the largest value; the interpreter truncates float32 to bfloat16, a GPU rounds it
WITHIN = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}

# so small that a small input has several blocks of channels, parts, and tiles in a part
SMALL = [
    Tiling(256, 4, channels=16, programs=256),
    Tiling(128, 4, channels=16, programs=4, merged=8),
    Tiling(64, 4, channels=64, programs=3, merged=16),
    Tiling(128, 4, channels=32, programs=1000, merged=8),
]


@pytest.fixture(scope="module")
def kernels() -> Iterator[Interpreter]:
    with interpreter() as running:
        yield running


class Case:
    """A convolution's output and what is added to it."""

    def __init__(
        self,
        seed: int = 0,
        batch: int = 2,
        groups: int = 4,
        size: int = 3,
        height: int = 10,
        width: int = 6,
        dtype: torch.dtype = torch.float32,
        given: str = "bias added residual residual_bias",
        mean: float = 3.0,
        subpixel: bool = False,
        strided: bool = False,
    ) -> None:
        random = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(dtype)

        self.groups, self.subpixel, self.dtype = groups, subpixel, dtype
        channels = groups * size
        shape = (batch, channels, height, width)
        if subpixel:
            height, width = 2 * (height // 2), 2 * (width // 2)
            shape = (batch, 4 * channels, height // 2 + 1, width // 2 + 1)
        x = draw(*shape[:-1], (1 + strided) * shape[-1]) + mean
        self.x = x[..., :: 1 + strided].to(dtype)
        shapes = {
            "bias": (channels,),
            "added": (batch, channels),
            "residual": (batch, channels, height, width),
            "residual_bias": (channels,),
        }
        self.terms = {
            name: draw(*own) if name in given.split() else None for name, own in shapes.items()
        }
        self.weight, self.shift = draw(channels), draw(channels)

    def __repr__(self) -> str:
        terms = [name for name, one in self.terms.items() if one is not None]
        return f"{tuple(self.x.shape)} {self.dtype} {terms} {self.groups} {self.subpixel}"

    def exact(self) -> Tensor:
        """The sum in float64."""
        terms = [None if one is None else one.double() for one in self.terms.values()]
        return epilogue.by_torch(self.x.double(), *terms, self.groups, self.subpixel)[0]

    def sum_and_stats(
        self, kernels: Interpreter, tiling: Tiling, fault: Fault | None = None
    ) -> tuple[Tensor, Tensor]:
        given = (self.x, *self.terms.values(), self.groups, self.subpixel)
        return kernels.sum_and_stats(tiling, *given, fault=fault)

    def norm(
        self, kernels: Interpreter, tiling: Tiling, silu: bool = True, fault: Fault | None = None
    ) -> Tensor:
        offset, added = self.terms["bias"], self.terms["added"]
        given = (self.x, offset, added, None, self.weight, self.shift, self.groups, EPS, silu)
        return kernels.group_norm(tiling, *given, fault=fault)

    def norm_by_group(
        self, kernels: Interpreter, silu: bool = True, fault: Fault | None = None
    ) -> Tensor:
        given = (self.x, self.terms["bias"], self.terms["added"], self.weight, self.shift)
        return kernels.norm_by_group(*given, self.groups, EPS, silu, fault=fault)

    def exact_norm(self, silu: bool = True) -> Tensor:
        x, offset, added, weight, shift = (
            None if one is None else one.double()
            for one in (self.x, self.terms["bias"], self.terms["added"], self.weight, self.shift)
        )
        return group_norm.by_torch(x, offset, added, None, weight, shift, self.groups, EPS, silu)  # type: ignore[arg-type]


cases = st.builds(
    Case,
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 2),
    groups=st.sampled_from([2, 4, 16, 32]),
    size=st.integers(1, 3),
    height=st.integers(3, 8),
    width=st.integers(2, 6),
    dtype=st.sampled_from(list(WITHIN)),
    given=st.sampled_from(
        ["", "bias", "bias added", "bias residual", "bias residual residual_bias", "residual"]
    ),
    subpixel=st.booleans(),
    strided=st.booleans(),
)


@given(case=cases, tiling=st.sampled_from(SMALL))
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sum_and_stats(kernels: Interpreter, case: Case, tiling: Tiling) -> None:
    out, stats = case.sum_and_stats(kernels, tiling)
    assert out.dtype is case.dtype and stats.dtype is torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert error(out, case.exact()) < WITHIN[case.dtype]
    # statistics of what was written
    assert error(stats, group_stats(out, case.groups)) < 2e-6


@given(case=cases, tiling=st.sampled_from(SMALL), silu=st.booleans())
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_group_norm(kernels: Interpreter, case: Case, tiling: Tiling, silu: bool) -> None:
    offset, added = (case.terms[name] if not case.subpixel else None for name in ("bias", "added"))
    channels = case.x.shape[1]
    weight, shift = (one.repeat(4)[:channels] for one in (case.weight, case.shift))
    settings_ = (weight, shift, case.groups, EPS, silu)
    out = kernels.group_norm(tiling, case.x, offset, added, None, *settings_)
    wide = [None if one is None else one.double() for one in (case.x, offset, added, None)]
    exact = group_norm.by_torch(
        *wide,
        weight.double(),
        shift.double(),
        case.groups,
        EPS,
        silu,  # type: ignore[arg-type]
    )
    assert out.dtype is case.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert error(out, exact) < 2 * WITHIN[case.dtype]


@given(case=cases, silu=st.booleans())
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_group_norm_by_group(kernels: Interpreter, case: Case, silu: bool) -> None:
    if case.subpixel:  # another size
        case = Case(size=3, height=21, width=67, dtype=case.dtype)
    out = case.norm_by_group(kernels, silu)
    assert out.dtype is case.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert error(out, case.exact_norm(silu)) < 2 * WITHIN[case.dtype]


def test_group_norm_by_group_far_from_zero(kernels: Interpreter) -> None:
    case = Case(height=16, mean=1000.0, given="bias added")
    assert error(case.norm_by_group(kernels), case.exact_norm()) < 2e-4
    case.x = torch.full_like(case.x, 3.7)  # as wide as the time embedding is far apart
    assert error(case.norm_by_group(kernels), case.exact_norm()) < 2e-6


@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 5),
    columns=st.integers(1, 200),
    block=st.sampled_from([16, 64, 256]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    spread=st.sampled_from([0.0, 1.0, 100.0]),
)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_softmax_rows(
    kernels: Interpreter,
    seed: int,
    rows: int,
    columns: int,
    block: int,
    dtype: torch.dtype,
    spread: float,
) -> None:
    random = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(rows, columns, generator=random) + 50
    weights, sums = kernels.softmax_rows(block, scores, 0.5, dtype)
    assert weights.dtype is dtype and weights.shape == scores.shape
    assert sums.dtype is torch.float32 and sums.shape == (rows, 1)
    twin, twin_sums = attention.softmax_rows(scores, 0.5, dtype)
    assert error(weights.float(), twin.float()) < WITHIN[dtype]
    assert error(sums, twin_sums) < WITHIN[dtype]
    # the sums are those of the rounded weights
    assert error(sums, weights.float().sum(1, keepdim=True)) < 2e-6
    assert error((weights / sums), (0.5 * scores.double()).softmax(1)) < 2 * WITHIN[dtype]


def test_softmax_rows_of_infinity_and_nan(kernels: Interpreter) -> None:
    scores = torch.zeros(4, 40)
    scores[0, 30], scores[1, 3], scores[2, 20:] = float("nan"), float("inf"), float("-inf")
    weights, sums = kernels.softmax_rows(16, scores, 1.0, torch.bfloat16)
    out, expected = weights / sums, scores.softmax(1)
    assert torch.equal(out.isnan(), expected.isnan())
    assert error(out[2:], expected[2:]) < 1e-2


@pytest.mark.parametrize("tiling", first_of(SMALL), ids=str)
def test_values_far_from_zero(kernels: Interpreter, tiling: Tiling) -> None:
    # a float32 near 1000 is exact to 3e-5; the variance as E[x^2] - E[x]^2 would be off by 1e-1
    case = Case(height=16, mean=1000.0, given="")
    _, stats = case.sum_and_stats(kernels, tiling)
    exact = group_stats(case.x, case.groups)
    assert error(stats[..., 1], exact[..., 1]) < 1e-5
    assert error(stats[..., 0], exact[..., 0]) < 1e-7


def test_a_batch_and_a_repetition_change_no_bits(kernels: Interpreter) -> None:
    case = Case(batch=3)
    whole, again = (case.norm(kernels, SMALL[1]) for _ in range(2))
    assert torch.equal(whole, again)
    case.x, case.terms["added"] = case.x[1:2], case.terms["added"][1:2]  # type: ignore[index]
    assert torch.equal(case.norm(kernels, SMALL[1]), whole[1:2])


def test_nan_and_infinity(kernels: Interpreter) -> None:
    for value in (float("nan"), float("inf")):
        case = Case(given="bias")
        case.x[0, 4, 3, 2] = value
        out, expected = case.norm(kernels, SMALL[1]), case.exact_norm()
        assert torch.equal(out.isnan(), expected.isnan())
        finite = expected.isfinite()
        assert finite.any() and not finite.all()
        assert error(out[finite], expected[finite]) < 2e-6


@given(
    seed=st.integers(0, 2**16),
    shape=st.tuples(st.sampled_from([1, 3, 33, 40]), st.sampled_from([1, 5, 32, 35])),
    dtype=st.sampled_from(list(WITHIN)),
    transposed=st.booleans(),
    nhwc=st.booleans(),
)
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_add_taps(
    kernels: Interpreter,
    seed: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    transposed: bool,
    nhwc: bool,
) -> None:
    weight = torch.randn(*shape, 3, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if nhwc:
        weight = weight.contiguous(memory_format=torch.channels_last)
    out = kernels.add_taps(weight, transposed)
    assert out.is_contiguous(memory_format=torch.channels_last)
    exact = taps(weight.double(), transposed)
    assert error(out, exact) < WITHIN[dtype]


def taps(weight: Tensor, transposed: bool) -> Tensor:
    return upsample.transposed_kernel(weight) if transposed else upsample.subpixel_kernel(weight)


# --- faults in the kernels' source are noticed

STATS_FAULTS: dict[str, Fault] = {
    "parts combined without their distances": (
        "squares + about * about * counts, 0)\n    to = stats",
        "squares, 0)\n    to = stats",
    ),
    "positions of a tile combined without their distances": (
        "squares + about * about * counts, 0), mask",
        "squares, 0), mask",
    ),
    "parts combined as if all were full": (
        "tl.minimum(pixels - part * rows, rows)",
        "rows + 0 * part",
    ),
    "the last chunk of parts skipped": (
        "range(0, count, MERGED)",
        "range(0, count - MERGED, MERGED)",
    ),
    "the last tile of a part skipped": (
        "range(first, last, PIXELS)",
        "range(first, last - PIXELS + 1, PIXELS)",
    ),
    "the mean not updated": ("(value - updated)", "(value - mean)"),
}
SUM_FAULTS: dict[str, Fault] = {
    "a neighbour's bias": ("tl.load(bias + c,", "tl.load(bias + c // 2,"),
    "the first sample's time embedding": ("added + sample * channels + c", "added + c"),
    "no bias of the residual": ("if residual_bias is not None", "if False"),
    "the residual of the first sample": ("residual + at", "residual + at % (pixels * channels)"),
}
SUBPIXEL_FAULTS: dict[str, Fault] = {
    "even and odd exchanged": ("odd_row * 2 + odd_column", "odd_column * 2 + odd_row"),
    "odd rows read one row early": ("row // 2 + odd_row", "row // 2"),
}


@pytest.mark.parametrize("fault", STATS_FAULTS)
def test_wrong_statistics_are_noticed(kernels: Interpreter, fault: str) -> None:
    case, tiling = Case(given="bias", height=9, width=7), Tiling(64, 4, 8, programs=8, merged=8)
    # several tiles in a part, the last one not full, and several chunks of parts
    exact = group_stats(case.exact(), case.groups)
    assert error(case.sum_and_stats(kernels, tiling)[1], exact) < 2e-6
    wrong = case.sum_and_stats(kernels, tiling, STATS_FAULTS[fault])[1]
    assert error(wrong, exact) > 1e-4


@pytest.mark.parametrize("fault", SUM_FAULTS)
def test_wrong_sums_are_noticed(kernels: Interpreter, fault: str) -> None:
    case = Case()
    assert error(case.sum_and_stats(kernels, SMALL[0])[0], case.exact()) < 2e-6
    wrong = case.sum_and_stats(kernels, SMALL[0], SUM_FAULTS[fault])[0]
    assert error(wrong, case.exact()) > 1e-2


@pytest.mark.parametrize("fault", SUBPIXEL_FAULTS)
def test_wrong_interleaving_is_noticed(kernels: Interpreter, fault: str) -> None:
    case = Case(given="bias", subpixel=True)
    assert error(case.sum_and_stats(kernels, SMALL[0])[0], case.exact()) < 2e-6
    wrong = case.sum_and_stats(kernels, SMALL[0], SUBPIXEL_FAULTS[fault])[0]
    assert error(wrong, case.exact()) > 1e-2


def test_wrong_normalisations_are_noticed(kernels: Interpreter) -> None:
    case = Case(given="bias added")
    assert error(case.norm(kernels, SMALL[1]), case.exact_norm()) < 2e-6
    faults = [
        ("less -= tl.load(bias", "less += tl.load(bias"),
        ("sample * groups + c // size", "c // size"),
        ("1 + tl.exp(-value)", "1 + tl.exp(value)"),
    ]
    for fault in faults:
        assert error(case.norm(kernels, SMALL[1], fault=fault), case.exact_norm()) > 1e-2


def test_wrong_normalisations_by_group_are_noticed(kernels: Interpreter) -> None:
    case = Case(given="bias added", height=31, width=47)  # several tiles, the last one not full
    assert error(case.norm_by_group(kernels), case.exact_norm()) < 2e-6
    faults = [
        ("added + sample * channels + c, mask=exists", "added + c, mask=exists"),
        ("total += tl.where(inside, about * about, 0)", "total += about * about"),
        ("mean = pivot + tl.sum(tl.sum(total, 1), 0) / size", "mean = pivot"),
    ]
    for fault in faults:
        assert error(case.norm_by_group(kernels, fault=fault), case.exact_norm()) > 1e-4


def test_wrong_softmaxes_are_noticed(kernels: Interpreter) -> None:
    scores = 10 * torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    exact = scores.softmax(1)
    for fault, least in (
        (None, 0.0),
        (("(value - most) * scale", "value * scale - most"), 1e-2),
        (("total += tl.where(inside, weight", "total = tl.where(inside, weight"), 1e-2),
        (("scores + row * columns", "scores"), 1e-2),
    ):
        weights, sums = kernels.softmax_rows(16, 2 * scores, 0.5, torch.float16, fault=fault)
        wrong = not error(weights / sums, exact) < 2e-3
        assert wrong == (fault is not None), fault
        assert not wrong or not error(weights / sums, exact) < least


@pytest.mark.parametrize("transposed", [False, True])
def test_wrong_taps_are_noticed(kernels: Interpreter, transposed: bool) -> None:
    weight = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    exact = taps(weight.double(), transposed)
    assert error(kernels.add_taps(weight, transposed), exact) < 2e-6
    fault = ("i + a * (2 - i) + 1", "1 + a * (2 - i)")
    assert error(kernels.add_taps(weight, transposed, fault=fault), exact) > 1e-2


# --- enough programs


def test_large_gpus_are_filled() -> None:
    triton_kernels = pytest.importorskip("sdconv.fast.cuda.triton_kernels")
    tiling = TILINGS["2048 values, 4 warps"]
    for channels, side in ((512, 64), (512, 128), (512, 512), (256, 512), (128, 1024), (128, 2048)):
        by = triton_kernels.divide(channels, side * side, tiling)
        # an H200 has 132 multiprocessors; of one program each, memory would wait
        assert 7 * 132 < by.parts * by.blocks <= 2 * 2048
        assert by.parts * by.rows >= side * side > (by.parts - 1) * by.rows
    # one program for each group would be 32
    small = triton_kernels.divide(512, 64 * 64, Tiling(2048, 4, programs=4))
    assert small.parts * small.blocks < 132


# --- the kernels compiled for NVIDIA's GPUs


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [*((one, "bf16") for one in kernel_resources.ARCHITECTURES), (90, "fp16"), (90, "fp32")],
)
def test_kernels_compile(architecture: int, dtype: str) -> None:
    pytest.importorskip(
        "triton", "3.3", reason="compiling without a GPU needs triton 3.3 or newer, on Linux"
    )
    if platform.machine() != "x86_64":
        pytest.skip("Triton brings NVIDIA's assembler for x86-64 only")
    for used in kernel_resources.resources(architecture, dtype):
        # programs of 128 threads, four of them in a multiprocessor's 65536 registers
        assert 0 < used.registers <= 128, used
        assert used.spilled == 0, used
        assert used.shared <= 48 * 1024, used


# --- a real GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(WITHIN), ids=str)
@pytest.mark.parametrize("size", [(3, 4), (8, 8), (33, 21), (512, 512)])
def test_on_cuda(dtype: torch.dtype, size: tuple[int, int]) -> None:
    for channels in (32, 320):
        case = Case(0, 2, 32, channels // 32, *size, dtype)

        def on_cuda(*tensors: Tensor | None) -> list[Any]:
            return [None if one is None else one.cuda() for one in tensors]

        x, *terms = on_cuda(case.x, *case.terms.values())
        once, again = (epilogue.epilogue(x, *terms, 32, False) for _ in range(2))
        assert all(torch.equal(*both) for both in zip(once, again, strict=True))
        assert error(once[0].cpu(), case.exact()) < WITHIN[dtype]
        assert error(once[1].cpu(), group_stats(once[0].cpu(), 32)) < 1e-5
        weight, shift = on_cuda(case.weight, case.shift)
        known = (x, terms[0], terms[1], None, weight, shift, 32, EPS, True)
        out = group_norm.group_norm(*known)
        assert torch.equal(out, group_norm.group_norm(*known))
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert error(out.cpu(), case.exact_norm()) < 2 * WITHIN[dtype]
        for variant in choices.VARIANTS["norm"]:
            table = {key: variant for key in choices.SHIPPED if key.split()[0] == "norm"}
            with choices.using(table):
                out = group_norm.group_norm(*known)
            assert error(out.cpu(), case.exact_norm()) < 2 * WITHIN[dtype]
    weight = case.weight.repeat(9).view(-1, 32, 3, 3).cuda()
    for transposed in (False, True):
        exact = taps(weight.double(), transposed)
        assert error(upsample.summed(weight, transposed=transposed), exact) < WITHIN[dtype]
