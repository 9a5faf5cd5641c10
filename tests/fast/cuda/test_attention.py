"""The VAE's attention on CUDA with its projections folded, against float64."""

from __future__ import annotations

import pytest
import torch
from helpers.numbers import error, randn

import sdconv
from sdconv.fast import blocks
from sdconv.fast.cuda import attention, choices
from sdconv.fast.cuda import blocks as cuda
from sdconv.models.blocks import Attention

WITHIN = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU are computed like those on CUDA."""
    monkeypatch.setitem(blocks.ARITHMETIC, "cpu", cuda)


def block(dtype: torch.dtype = torch.float32) -> Attention:
    torch.manual_seed(0)
    made = Attention(16, groups=4, eps=1e-6)
    for linear in (made.to_q, made.to_k, made.to_v, made.to_out[0]):
        torch.nn.init.normal_(linear.bias)  # type: ignore[arg-type]
    return made.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", list(WITHIN), ids=str)
@pytest.mark.parametrize("variant", choices.VARIANTS["attention"])
@pytest.mark.parametrize("nhwc", [False, True])
def test_equals_float64(variant: str, dtype: torch.dtype, nhwc: bool) -> None:
    module, x = block(dtype), randn(2, 16, 7, 5).to(dtype)
    if nhwc:
        x = x.contiguous(memory_format=torch.channels_last)
    with sdconv.backend("fast"), choices.using({"attention": variant}):
        assert attention.is_folded(module, x.flatten(2).mT) == (variant == "folded")
        out = module(x)
    exact = module.double()(x.double())
    assert out.dtype is dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert error(out, exact) < WITHIN[dtype]


def test_a_wrong_fold_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = block(), randn(2, 16, 7, 5)
    exact, right = module(x), attention.fold
    faults = [
        # the product in the other order; a bias that is not projected; none at all
        lambda v, bv, o, bo: (v @ o, right(v, bv, o, bo)[1]),
        lambda v, bv, o, bo: (right(v, bv, o, bo)[0], bv + bo),
        lambda v, bv, o, bo: (right(v, bv, o, bo)[0], bo),
    ]
    with sdconv.backend("fast"):
        assert error(module(x), exact) < 2e-6
        for fault in faults:
            monkeypatch.setattr(attention, "fold", fault)
            assert error(module(x), exact) > 1e-3


def test_changed_weights_are_never_stale() -> None:
    module, x = block(), randn(1, 16, 7, 5)
    for change in (0.0, 0.5, -0.25):
        module.to_v.weight.data.add_(change)  # which no version counter shows
        with sdconv.backend("fast"):
            out = module(x)
        assert error(out, module(x)) < 2e-6


def test_not_folded() -> None:
    module, tokens = block(), randn(1, 30, 16)
    assert attention.is_folded(module, tokens)
    # fewer tokens than the product of the weights has rows
    assert not attention.is_folded(module, tokens[:, :16])
    module.to_v.requires_grad_(True)
    assert not attention.is_folded(module, tokens)
    with torch.no_grad():
        assert attention.is_folded(module, tokens)


def test_gradients() -> None:
    module, x = block().requires_grad_(True), randn(1, 16, 7, 5).requires_grad_()
    given = [x, *module.parameters()]
    with sdconv.backend("fast"):
        found = torch.autograd.grad(module(x).square().sum(), given)
    expected = torch.autograd.grad(module(x).square().sum(), given)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 2e-5 * max(float(other.abs().max()), 1.0)


# --- the softmax between two matrix products


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1 << 27, 40])
def test_by_products(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int) -> None:
    monkeypatch.setattr(attention, "SCORES", rows)
    query, key, value = (randn(2, 300, 16, seed=seed).to(dtype) for seed in range(3))
    out = attention.by_products(4 * query, key, value)
    exact = sdpa(4 * query.double(), key.double(), value.double())
    fused = sdpa(4 * query, key, value)
    assert out.dtype is dtype
    assert error(out, exact) < 2 * max(error(fused, exact), float(torch.finfo(dtype).eps))
    # the fault: queries of one part only
    wrong = attention.by_products(4 * query, key, value.roll(1, 1))
    assert error(wrong, exact) > 0.1


def sdpa(*heads: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*heads)


def test_products_only_where_they_are_exact_and_faster() -> None:
    wide = [randn(1, 4, 512).bfloat16() for _ in range(3)]
    assert not attention.uses_products(*wide)  # on a CPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_by_products_on_cuda(dtype: torch.dtype) -> None:
    query, key, value = (randn(2, 3000, 512, seed=seed).to("cuda", dtype) for seed in range(3))
    exact = sdpa(query.double(), key.double(), value.double())
    assert attention.uses_products(query, key, value)
    assert not attention.uses_products(query.float(), key.float(), value.float())
    assert not attention.uses_products(query[..., :256], key[..., :256], value[..., :256])
    assert not attention.uses_products(query.requires_grad_(), key, value)
    query = query.detach()
    out, again = (attention.by_products(query, key, value) for _ in range(2))
    assert torch.equal(out, again)
    assert error(out, exact) < 2 * error(sdpa(query, key, value), exact)
