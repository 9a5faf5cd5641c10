"""Networks on the meta device: nothing there is initialised, and nothing elsewhere is left out."""

from __future__ import annotations

import torch
from torch import nn

from sdconv.devices import on_meta


def test_weights_have_shapes_only() -> None:
    with on_meta():
        built = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 5))
    assert all(weight.is_meta for weight in built.parameters())
    assert next(built.parameters()).shape == (4, 3, 3, 3)


def test_other_devices_are_as_ever() -> None:
    with on_meta():
        filled = torch.empty(3, device="cpu").fill_(2)
        ones = nn.init.ones_(torch.empty(3, device="cpu"))
    assert torch.equal(filled, 2 * ones) and torch.equal(ones, torch.tensor([1.0, 1.0, 1.0]))
    assert not nn.Linear(2, 2).weight.is_meta
