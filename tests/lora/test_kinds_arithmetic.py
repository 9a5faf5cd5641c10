"""What no peer tells: scales, several adapters at a time, mixtures in one layer, and old forms."""

from __future__ import annotations

import pytest
import torch
from helpers.loras import assert_equal, largest_error, state
from helpers.numbers import error, randn
from torch import Tensor, nn

import sdconv
from sdconv.errors import CheckpointError


def layers() -> nn.ModuleDict:
    torch.manual_seed(31)
    return nn.ModuleDict(
        {"linear": nn.Linear(8, 8), "conv": nn.Conv2d(8, 8, 3), "norm": nn.GroupNorm(2, 8)}
    )


LORA = {"linear.lora_down.weight": randn(2, 8, seed=1), "linear.lora_up.weight": randn(8, 2)}
DORA = LORA | {"linear.dora_scale": 1 + randn(8, 1, seed=2).abs()}
OFT = {"linear.oft_blocks": randn(2, 4, 4, seed=3), "linear.alpha": torch.tensor(0.0)}
BOFT = {
    "linear.oft_blocks": randn(3, 4, 2, 2, seed=4),
    "linear.rescale": 1 + randn(8, 1, seed=5).abs(),
}
IA3 = {"linear.weight": randn(8, seed=6), "linear.on_input": torch.tensor(1)}
GLORA = {
    "linear.a1.weight": randn(8, 2, seed=1),
    "linear.a2.weight": randn(2, 8, seed=2),
    "linear.b1.weight": randn(8, 2, seed=3),
    "linear.b2.weight": randn(2, 8, seed=4),
}
FILES = {"LoRA": LORA, "DoRA": DORA, "OFT": OFT, "BOFT": BOFT, "(IA)3": IA3, "GLoRA": GLORA}


def change(tensors: dict[str, Tensor], scale: float) -> Tensor:
    model = layers()
    before = model["linear"].weight.detach().clone()
    sdconv.merge_lora(model, tensors, scale)
    return model["linear"].weight.detach() - before


@pytest.mark.parametrize("kind", FILES)
def test_which_kinds_are_linear_in_the_scale(kind: str) -> None:
    full, half = change(FILES[kind], 1.0), change(FILES[kind], 0.5)
    assert full.abs().max() > 0.1
    assert change(FILES[kind], 0.0).abs().max() < 1e-6
    assert (error(2 * half, full) < 1e-5) == (kind != "BOFT")


def test_the_constraint_is_not_a_strength() -> None:
    expected = change(OFT, 1.0)
    assert torch.equal(change({k: v for k, v in OFT.items() if "alpha" not in k}, 1.0), expected)
    less = change(OFT | {"linear.alpha": torch.tensor(1e-3)}, 1.0)
    assert 0 < less.norm() < expected.norm() / 10


def test_kohyas_prefix_of_oft() -> None:
    assert torch.equal(change({f"oft_unet_{k}": v for k, v in OFT.items()}, 1.0), change(OFT, 1.0))


def test_rotations_are_orthogonal() -> None:
    for tensors in (OFT, {k: v for k, v in BOFT.items() if "rescale" not in k}):
        model = layers()
        before = model["linear"].weight.detach().clone()
        sdconv.merge_lora(model, tensors)
        after = model["linear"].weight.detach()
        assert error(after.T @ after, before.T @ before) < 1e-5
        assert error(after, before) > 0.1


def test_several_kinds_at_a_time() -> None:
    """Each is computed from the original weight, so the order does not matter."""
    model = layers()
    before = state(model)
    merged = [sdconv.merge_lora(model, tensors, 0.5) for tensors in FILES.values()]
    together = state(model)
    sdconv.unmerge_lora(model)
    assert_equal(model.state_dict(), before)
    for tensors in reversed(FILES.values()):
        sdconv.merge_lora(model, tensors, 0.5)
    assert largest_error(model.state_dict(), together) < 1e-6
    sdconv.unmerge_lora(model)
    expected = sum(change(tensors, 0.5) for tensors in FILES.values())
    assert error(together["linear.weight"] - before["linear.weight"], expected) < 1e-5
    assert len(merged) == len(FILES)


def test_a_lora_and_differences_of_biases_and_norms_in_one_file() -> None:
    bias, norm = randn(8, seed=8), randn(8, seed=9)
    model = layers()
    before = state(model)
    merged = sdconv.merge_lora(
        model, LORA | {"linear.diff_b": bias, "norm.diff": norm, "norm.b_norm": bias}, 0.5
    )
    assert merged.layers == ("linear", "norm")
    after = state(model)
    assert torch.allclose(after["linear.bias"], before["linear.bias"] + bias / 2)
    assert torch.allclose(after["norm.weight"], before["norm.weight"] + norm / 2)
    assert torch.allclose(after["norm.bias"], before["norm.bias"] + bias / 2)
    assert error(after["linear.weight"] - before["linear.weight"], change(LORA, 0.5)) < 1e-5
    merged.unmerge()
    assert_equal(model.state_dict(), before)


def test_biases_of_a_lora_have_its_alpha() -> None:
    bias = randn(8, seed=8)
    model = layers()
    before = state(model)
    tensors = LORA | {"linear.lora_up.bias": bias, "linear.alpha": torch.tensor(1.0)}
    sdconv.merge_lora(model, tensors, 0.5)
    assert torch.allclose(model["linear"].bias, before["linear.bias"] + bias / 4)


def test_the_axis_of_a_magnitude() -> None:
    model = layers()
    weight = (
        model["linear"].weight.detach()
        + LORA["linear.lora_up.weight"] @ (LORA["linear.lora_down.weight"])
    )
    magnitude = 1 + randn(8, seed=2).abs()
    rows = magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
    columns = magnitude * weight / weight.norm(dim=0, keepdim=True)
    for name, shape, expected in (
        ("dora_scale", (8, 1), rows),
        ("dora_scale", (1, 8), columns),
        ("dora_scale", (8,), rows),
        ("lora_magnitude_vector", (8,), rows),
        ("lora_magnitude_vector.weight", (8,), rows),
        ("lora_magnitude_vector", (1, 8), rows),
    ):
        sdconv.merge_lora(model, LORA | {f"linear.{name}": magnitude.view(shape)})
        assert error(model["linear"].weight, expected) < 1e-5, (name, shape)
        sdconv.unmerge_lora(model)
    assert error(rows, columns) > 0.1


def test_a_row_of_zeros_stays_one() -> None:
    model = layers()
    with torch.no_grad():
        model["linear"].weight[0] = 0
    up = LORA["linear.lora_up.weight"].clone()
    up[0] = 0
    sdconv.merge_lora(model, DORA | {"linear.lora_up.weight": up})
    assert torch.equal(model["linear"].weight[0], torch.zeros(8))


def test_glora_in_its_first_form() -> None:
    first = {
        "linear.a1.weight": GLORA["linear.a2.weight"],
        "linear.a2.weight": GLORA["linear.a1.weight"],
        "linear.b1.weight": GLORA["linear.b2.weight"],
        "linear.b2.weight": GLORA["linear.b1.weight"],
        "linear.alpha": torch.tensor(1.0),
    }
    expected = change(GLORA, 0.5)
    assert torch.equal(change(first, 1.0), expected)
    w = layers()["linear"].weight.detach()
    a1, a2, b1, b2 = GLORA.values()
    assert error(expected, (w @ a1 @ a2 + b1 @ b2) / 2) < 1e-5


def test_glora_with_a_kernel_in_the_middle() -> None:
    a1, a2, b1, b2 = GLORA.values()
    model, mid = layers(), randn(2, 2, 3, 3)
    w = model["conv"].weight.detach().clone()
    tensors = {k.replace("linear", "conv"): v for k, v in GLORA.items()}
    sdconv.merge_lora(model, tensors | {"conv.bm.weight": mid})
    mixed = torch.einsum("oihw,ij->ojhw", w, a1 @ a2)
    expected = w + mixed + torch.einsum("or,rshw,si->oihw", b1, mid, b2)
    assert error(model["conv"].weight, expected) < 1e-5


@pytest.mark.parametrize("kind", FILES)
def test_a_scalar_multiplies_products(kind: str) -> None:
    tensors = FILES[kind] | {"linear.scalar": torch.tensor(0.5)}
    if kind in ("LoRA", "GLoRA"):
        assert error(change(tensors, 1.0), change(FILES[kind], 0.5)) < 1e-6
    elif kind == "DoRA":
        assert error(change(tensors, 1.0), change(DORA, 1.0)) > 0.01
    else:
        with pytest.raises(CheckpointError, match="scalar, which mean nothing"):
            change(tensors, 1.0)
