"""Prepared weights are kept, counted and bounded, and never stale."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn

from sdconv.fast.cpu.weight_cache import PreparedWeights, prepared


def doubled(weight: Tensor) -> Tensor:
    return 2 * weight


def test_kept_while_nothing_changes() -> None:
    kept, weight = PreparedWeights(1 << 20), torch.randn(4, 4, 3, 3)
    first = kept.get(weight, doubled)
    assert kept.get(weight, doubled) is first
    assert kept.memory == first.numel() * 4


def test_no_edit_goes_unseen() -> None:
    kept = PreparedWeights(1 << 20)
    parameter = nn.Parameter(torch.randn(4, 4, 3, 3))
    with torch.inference_mode():
        unversioned = torch.randn(4, 4, 3, 3)

    for weight in (parameter, unversioned):
        kept.get(weight, doubled)
        for change in (
            lambda w: w.data.add_(1),
            lambda w: w.data[3, 3, 2, 2].mul_(1.001),
            lambda w: w.data.copy_(w.data.flip(0)),
        ):
            with torch.inference_mode(weight.is_inference()), torch.no_grad():
                change(weight)
                assert torch.equal(kept.get(weight, doubled), 2 * weight)
    parameter.data = parameter.data.double()
    assert kept.get(parameter, doubled).dtype is torch.float64


def test_freed_with_its_weight() -> None:
    kept, weight = PreparedWeights(1 << 20), torch.randn(4, 4, 3, 3)
    kept.get(weight, doubled)
    del weight
    gc.collect()
    assert kept.memory == 0


def test_what_passes_the_limit_has_no_room() -> None:
    weights = torch.randn(2, 4, 4, 3, 3).unbind()
    kept = PreparedWeights(4 * 144)
    assert kept.has_room(weights[0], doubled, 4 * 144)
    kept.get(weights[0], doubled)
    assert kept.has_room(weights[0], doubled, 4 * 144)
    assert not kept.has_room(weights[1], doubled, 4 * 144)
    kept.clear()
    assert kept.has_room(weights[1], doubled, 4 * 144)


def test_the_package_has_one_with_a_limit() -> None:
    assert 0 < prepared.limit < 1 << 50


def test_borrowed_is_what_is_kept_and_keeps_nothing() -> None:
    kept, weight = PreparedWeights(1 << 20), torch.randn(4, 4, 3, 3)
    borrowed = kept.borrow(weight, doubled)
    assert torch.equal(borrowed, 2 * weight) and kept.memory == 0
    first = kept.get(weight, doubled)
    assert kept.borrow(weight, doubled) is first
    weight.data += 1
    assert torch.equal(kept.borrow(weight, doubled), 2 * weight)
