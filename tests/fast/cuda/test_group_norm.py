"""Fused GroupNorm and SiLU: torch's operations, and the Triton kernels in Triton's interpreter,
compiled for GPUs, and on a GPU where there is one."""

from __future__ import annotations

import importlib
import multiprocessing
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from helpers.numbers import error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdconv.fast.cuda import group_norm

KERNELS = "sdconv.fast.cuda.group_norm_triton"
GROUPS, EPS = 4, 1e-6
# relative to the largest value; the interpreter truncates float32 to bfloat16, a GPU rounds it
WITHIN = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}

Function = Callable[..., Tensor]


def drawn(
    seed: int = 0,
    batch: int = 1,
    channels: int = 12,
    height: int = 9,
    width: int = 7,
    dtype: torch.dtype = torch.float32,
    added: bool = True,
    mean: float = 3.0,
    strided: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(dtype)

    x = draw(batch, channels, height, (1 + strided) * width) + mean
    more = draw(batch, channels) if added else None
    return x[..., :: 1 + strided], more, draw(channels), draw(channels)


def exact(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    more = None if added is None else added.double()
    return group_norm.by_torch(x.double(), more, weight.double(), bias.double(), GROUPS, EPS)


cases = st.builds(
    drawn,
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 2),
    channels=st.sampled_from([8, 12, 40]),
    # of fewer values the deviation can be small compared with the mean
    height=st.integers(3, 9),
    width=st.integers(2, 8),
    dtype=st.sampled_from(list(WITHIN)),
    added=st.booleans(),
    strided=st.booleans(),
)


@given(case=cases)
@settings(max_examples=40)
def test_by_torch(case: Any) -> None:
    out = group_norm.norm_silu(*case, GROUPS, EPS)
    assert out.dtype == case[0].dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    # the sum with `added` is rounded to the dtype of x, with an error as large as the deviation
    assert error(out, exact(*case)) < (4 * WITHIN[out.dtype] if case[1] is not None else 1e-2)


def test_the_operator() -> None:
    case = tuple(None if t is None else t.requires_grad_() for t in drawn())
    torch.library.opcheck(group_norm.operator, (*case, GROUPS, EPS))


# --- the kernels in Triton's interpreter; in a separate process, as importing Triton chooses it


def in_parts(values: int, channels: int, parts: int, *arguments: Any) -> Tensor:
    """The kernels' result with small blocks, so that a small input has several parts."""
    kernels: Any = importlib.import_module(KERNELS)
    kernels._VALUES, kernels._CHANNELS, kernels._PARTS = values, channels, parts
    return kernels.norm_silu(*arguments, GROUPS, EPS)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Function]:
    pytest.importorskip("triton", reason="Triton's kernels need it: pip install triton, on Linux")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(importlib.import_module, "triton").exception()  # starts the process
        yield lambda *arguments: pool.submit(in_parts, *arguments).result()


@given(case=cases, how=st.sampled_from([(256, 16, 256), (128, 8, 2), (64, 64, 3)]))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_kernels(interpreted: Function, case: Any, how: tuple[int, int, int]) -> None:
    out = interpreted(*how, *case)
    assert out.dtype == case[0].dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert error(out, exact(*case)) < WITHIN[out.dtype]


def test_values_far_from_zero(interpreted: Function) -> None:
    # a float32 near 1000 is exact to 3e-5; the variance as E[x^2] - E[x]^2 would be off by 1e-1
    case = drawn(height=16, mean=1000.0, added=False)
    assert error(interpreted(64, 4, 8, *case), exact(*case)) < 1e-5


def test_nan_and_infinity(interpreted: Function) -> None:
    for value in (float("nan"), float("inf")):
        case = drawn(added=False)
        case[0][0, 4, 3, 2] = value
        out, expected = interpreted(64, 16, 4, *case), exact(*case)
        assert torch.equal(out.isnan(), expected.isnan())
        finite = expected.isfinite()
        assert finite.any() and not finite.all()
        assert error(out[finite], expected[finite]) < 2e-6


def test_statistics_of_a_part_of_the_input_are_noticed(interpreted: Function) -> None:
    case = drawn(height=8, added=False)
    whole = interpreted(64, 16, 8, *case)
    halves = [interpreted(64, 16, 8, half, *case[1:]) for half in case[0].split(4, dim=2)]
    assert error(whole, exact(*case)) < 2e-6
    assert error(torch.cat(halves, 2), exact(*case)) > 1e-2


# --- the kernels compiled for NVIDIA's GPUs

MAP = {"x": "*{}", "added": "*{}", "weight": "*{}", "bias": "*{}", "out": "*{}"}
SUMS = {"parts": "*fp32", "stats": "*fp32", "eps": "fp32"}
BLOCK = {"HAS_ADDED": True, "PIXELS": 32, "CHANNELS": 128}


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("pixels", ["i32", "constexpr"])
def test_kernels_compile(architecture: int, dtype: str, pixels: str) -> None:
    triton = pytest.importorskip(
        "triton", reason="Triton's kernels need it: pip install triton, on Linux"
    )
    if platform.machine() != "x86_64":
        pytest.skip("Triton brings NVIDIA's assembler for x86-64 only")
    backends = importlib.import_module("triton.backends.compiler")
    target = backends.GPUTarget("cuda", architecture, 32)
    kernels: Any = importlib.import_module(KERNELS)
    types = {name: kind.format(dtype) for name, kind in MAP.items()} | SUMS
    for kernel, constants in (
        (kernels.part_stats, BLOCK),
        (kernels.group_stats, {"SIZE": 10, "WIDTH": 16, "MERGED": 32}),
        (kernels.normalise, BLOCK),
    ):
        # Triton specialises an integer argument of 1 as a constant
        own = constants | ({"pixels": 1} if pixels == "constexpr" else {})
        signature = {
            name: "constexpr" if name in own else types.get(name, "i32")
            for name in kernel.arg_names
        }
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=own)
        assert len(triton.compile(source, target=target).asm["cubin"]) > 1000


# --- a real GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(WITHIN), ids=str)
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (33, 21), (512, 512)])
def test_on_cuda(dtype: torch.dtype, size: tuple[int, int]) -> None:
    for channels in (32, 320):
        case = drawn(0, 2, channels, *size, dtype)
        on_cuda = tuple(None if t is None else t.cuda() for t in case)
        once, again = (group_norm.norm_silu(*on_cuda, GROUPS, EPS) for _ in range(2))
        assert torch.equal(once, again)
        assert once.is_contiguous(memory_format=torch.channels_last)
        assert error(once.cpu(), exact(*case)) < WITHIN[dtype]
