"""Packed weights are kept, counted and bounded, and never stale."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn

from sdconv.fast.cpu.weight_cache import WeightCache, weight_cache


def twice(weight: Tensor) -> Tensor:
    return 2 * weight


def test_kept_while_nothing_changes() -> None:
    kept, weight = WeightCache(1 << 20), torch.randn(4, 4, 3, 3)
    first = kept.get(weight, twice)
    assert kept.get(weight, twice) is first
    assert kept.memory == first.numel() * 4


def test_every_edit_is_noticed() -> None:
    kept = WeightCache(1 << 20)
    parameter = nn.Parameter(torch.randn(4, 4, 3, 3))
    with torch.inference_mode():
        unversioned = torch.randn(4, 4, 3, 3)

    for weight in (parameter, unversioned):
        kept.get(weight, twice)
        for change in (
            lambda w: w.data.add_(1),
            lambda w: w.data[3, 3, 2, 2].mul_(1.001),
            lambda w: w.data.copy_(w.data.flip(0)),
        ):
            with torch.inference_mode(weight.is_inference()), torch.no_grad():
                change(weight)
                assert torch.equal(kept.get(weight, twice), 2 * weight)
    parameter.data = parameter.data.double()
    assert kept.get(parameter, twice).dtype is torch.float64


def test_an_entry_is_freed_with_its_weight() -> None:
    kept, weight = WeightCache(1 << 20), torch.randn(4, 4, 3, 3)
    kept.get(weight, twice)
    del weight
    gc.collect()
    assert kept.memory == 0


def test_a_weight_beyond_the_limit_has_no_room() -> None:
    weights = torch.randn(2, 4, 4, 3, 3).unbind()
    kept = WeightCache(4 * 144)
    assert kept.has_room(weights[0], twice, 4 * 144)
    kept.get(weights[0], twice)
    assert kept.has_room(weights[0], twice, 4 * 144)
    assert not kept.has_room(weights[1], twice, 4 * 144)
    kept.clear()
    assert kept.has_room(weights[1], twice, 4 * 144)


def test_the_shared_cache_has_a_limit() -> None:
    assert 0 < weight_cache.limit < 1 << 50


def test_borrowing_returns_an_entry_and_keeps_none() -> None:
    kept, weight = WeightCache(1 << 20), torch.randn(4, 4, 3, 3)
    borrowed = kept.borrow(weight, twice)
    assert torch.equal(borrowed, 2 * weight) and kept.memory == 0
    first = kept.get(weight, twice)
    assert kept.borrow(weight, twice) is first
    weight.data += 1
    assert torch.equal(kept.borrow(weight, twice), 2 * weight)
