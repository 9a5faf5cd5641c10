"""The linear layers and the attention of diffusers' transformers in a fast U-Net."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.numbers import error, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import sdconv
from sdconv.fast.cpu import processor
from sdconv.fast.cpu.kernels import numba_kernels
from sdconv.models.unet_blocks import run_transformer

pytest.importorskip("numba", reason="the compiled loops need numba: pip install sdconv[fast]")


class Transformer(nn.Module):
    """Calls a function as a U-Net's transformer calls its layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.function(x),)


def run(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Runs a function on ``x`` inside a transformer of the backend in force."""
    return run_transformer(Transformer(function), x, {})


@given(
    rows=st.integers(256, 700),
    depth=st.integers(1, 150),
    columns=st.sampled_from([16, 48, 64, 144, 208]),
    bias=st.booleans(),
)
@settings(max_examples=25)
def test_linear_layers(rows: int, depth: int, columns: int, bias: bool) -> None:
    x, weight = randn(1, rows, depth), randn(columns, depth, seed=1)
    added = randn(columns, seed=2) if bias else None
    out = numba_kernels()[0].linear(x, weight, added)
    expected = functional.linear(
        x.double(), weight.double(), None if added is None else added.double()
    )
    assert out is not None
    assert error(out, expected) <= 1e-5
    shifted = functional.linear(x.double(), weight.double().roll(1, 0))
    assert error(out, shifted) > 0.1


def test_only_fast_networks_without_gradients_use_the_compiled_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    compiled = numba_kernels()[0]
    plain = compiled.linear
    monkeypatch.setattr(compiled, "linear", lambda *given: calls.append(1) or plain(*given))
    layer, x = nn.Linear(32, 64), randn(1, 1, 300, 32)
    with torch.no_grad():
        expected = run(layer, x)
        assert not calls
        with sdconv.backend("fast"):
            assert torch.allclose(run(layer, x), expected, atol=1e-5)
            assert len(calls) == 1
            run(layer, x.transpose(1, 2).expand(1, 300, 2, 32).transpose(1, 2))  # not dense
            assert len(calls) == 1
    with sdconv.backend("fast"):
        run(layer, x).sum().backward()
    assert len(calls) == 1
    assert layer.weight.grad is not None


@pytest.mark.parametrize("kernel", [1, 3])
def test_1x1_convolutions_in_channels_last(kernel: int) -> None:
    x = randn(2, 32, 20, 30).contiguous(memory_format=torch.channels_last)
    conv = nn.Conv2d(32, 48, kernel)
    with torch.no_grad(), sdconv.backend("fast"):
        out = run(conv, x)
    expected = nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double())
    assert out.shape == expected.shape
    assert (out - expected).abs().max() < 1e-5
    assert (out.roll(1, 1) - expected).abs().max() > 0.1


def test_attention_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    compiled = numba_kernels()[0]
    plain = compiled.attention
    monkeypatch.setattr(compiled, "attention", lambda *given: calls.append(1) or plain(*given))
    query, key, value = (
        randn(2, 3, length, 8, seed=seed) for seed, length in enumerate((30, 40, 40))
    )
    attend: Any = functional.scaled_dot_product_attention
    doubles = (query.double(), key.double(), value.double())
    mask = randn(30, 40) > 0

    def absolute_error(*args: Any, **options: Any) -> float:
        with torch.no_grad(), sdconv.backend("fast"):
            out = run(lambda query: attend(query, key, value, *args, **options), query)
        return float((out - attend(*doubles, *args, **options)).abs().max())

    assert absolute_error() < 1e-5
    assert absolute_error(scale=0.7) < 1e-5
    assert len(calls) == 2
    assert absolute_error(mask) < 1e-5
    assert absolute_error(is_causal=True) < 1e-5
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_of_16_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matrix units it is computed in float32 and rounded; with them (an injected fault),
    torch's kernel is called."""
    lengths = enumerate((30, 40, 40))
    query, key, value = (randn(2, 3, length, 8, seed=seed).to(dtype) for seed, length in lengths)
    attend: Any = functional.scaled_dot_product_attention
    calls, compiled = [], numba_kernels()[0]
    plain = compiled.attention
    wide = (query.float(), key.float(), value.float())
    with torch.no_grad():
        expected = plain(*wide, 8**-0.5)
        assert expected is not None
        monkeypatch.setattr(compiled, "attention", lambda *given: calls.append(1) or plain(*given))
        for units in (frozenset(), frozenset({"amx_bf16", "amx_fp16"})):
            monkeypatch.setattr(processor, "features", lambda units=units: units)
            calls.clear()
            with sdconv.backend("fast"):
                out = run(lambda query: attend(query, key, value), query)
            assert bool(calls) is not bool(units)
            assert out.dtype is dtype and error(out, attend(*wide)) < 2 * torch.finfo(dtype).eps
            assert units or torch.equal(out, expected.to(dtype))
