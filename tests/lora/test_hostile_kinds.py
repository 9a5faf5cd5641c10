"""Tensors of any shape and size in place of those that fit: an error, or a merge; nothing half."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from helpers.loras import assert_equal, state
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sdconv
from sdconv.errors import SdconvError

Shapes = Mapping[str, tuple[int, ...]]

_HADA = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 4), "hada_w2_a": (8, 2), "hada_w2_b": (2, 4)}
# valid files, by kind: the layer, and the shapes of its tensors
FILES: Mapping[str, tuple[str, Shapes]] = {
    "LoRA": ("a", {"lora_down.weight": (2, 4), "lora_up.weight": (8, 2), "alpha": ()}),
    "mid": (
        "b",
        {
            "lora_down.weight": (2, 4, 1, 1),
            "lora_mid.weight": (3, 2, 3, 3),
            "lora_up.weight": (8, 3, 1, 1),
        },
    ),
    "bias": ("a", {"lora_A.weight": (2, 4), "lora_B.weight": (8, 2), "lora_B.bias": (8,)}),
    "DoRA": (
        "b",
        {"lora_down.weight": (2, 4, 3, 3), "lora_up.weight": (8, 2), "dora_scale": (8, 1, 1, 1)},
    ),
    "LoHa": ("a", _HADA | {"alpha": (), "scalar": ()}),
    "Tucker": (
        "b",
        {
            "hada_t1": (2, 2, 3, 3),
            "hada_w1_a": (2, 8),
            "hada_w1_b": (2, 4),
            "hada_t2": (2, 2, 3, 3),
            "hada_w2_a": (2, 8),
            "hada_w2_b": (2, 4),
        },
    ),
    "LoKr": ("b", {"lokr_w1": (4, 2), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 18), "alpha": ()}),
    "LoKr, whole": ("b", {"lokr_w1": (2, 2), "lokr_w2": (4, 2, 3, 3)}),
    "LoKr, Tucker": (
        "b",
        {
            "lokr_w1_a": (4, 1),
            "lokr_w1_b": (1, 2),
            "lokr_w2_a": (1, 2),
            "lokr_w2_b": (1, 2),
            "lokr_t2": (1, 1, 3, 3),
        },
    ),
    "GLoRA": (
        "b",
        {"a1.weight": (4, 2, 1, 1), "a2.weight": (2, 4, 1, 1), "b1.weight": (8, 2, 1, 1)}
        | {"b2.weight": (2, 4, 3, 3)},
    ),
    "OFT": ("b", {"oft_blocks": (2, 4, 4), "rescale": (8, 1, 1, 1), "alpha": ()}),
    "BOFT": ("a", {"oft_blocks": (3, 4, 2, 2), "rescale": (8, 1)}),
    "PEFT's BOFT": ("b", {"boft_R": (2, 6, 6, 6), "boft_s": (1, 8)}),
    "(IA)3": ("b", {"weight": (1, 4, 1, 1), "on_input": ()}),
    "PEFT's (IA)3": ("a", {"ia3_l": (8, 1)}),
    "difference": ("b", {"diff": (8, 4, 3, 3), "diff_b": (8,)}),
    "norm": ("c", {"w_norm": (8,), "b_norm": (8,)}),
}


def model() -> nn.ModuleDict:
    torch.manual_seed(41)
    return nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Conv2d(4, 8, 3), "c": nn.GroupNorm(2, 8)})


def tensors_of(kind: str) -> dict[str, Tensor]:
    layer, shapes = FILES[kind]
    return {f"{layer}.{role}": torch.full(shape, 0.5) for role, shape in shapes.items()}


def test_tensors_that_do_not_fit() -> None:
    network = model()
    before = state(network)
    outcomes: dict[type | None, int] = {}

    @settings(max_examples=400, deadline=None)
    @given(
        kind=st.sampled_from(sorted(FILES)),
        which=st.integers(0, 5),
        shape=st.one_of(st.none(), st.lists(st.sampled_from([0, 1, 2, 3, 4, 8]), max_size=5)),
        value=st.sampled_from([0.0, 0.5, -1.0, 1e30, math.inf, math.nan]),
        other=st.sampled_from(sorted(FILES)),
        mixed=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.float16, torch.int64, torch.complex64]),
    )
    @example(
        kind="LoRA",
        which=0,
        shape=[2, 4],
        value=0.5,
        other="LoRA",
        mixed=False,
        dtype=torch.float32,
    )
    def merge(
        kind: str,
        which: int,
        shape: list[int] | None,
        value: float,
        other: str,
        mixed: bool,
        dtype: torch.dtype,
    ) -> None:
        tensors = tensors_of(kind) | (tensors_of(other) if mixed else {})
        name = sorted(tensors)[which % len(tensors)]
        if shape is None:
            del tensors[name]
        elif dtype == torch.int64 and not math.isfinite(value):
            return
        else:
            tensors[name] = torch.full(shape, value).to(dtype)
        try:
            merged = sdconv.merge_lora(network, tensors)
        except SdconvError as error:
            outcomes[type(error)] = outcomes.get(type(error), 0) + 1
            assert_equal(network.state_dict(), before)
            assert any(f"{layer}" in str(error) for layer in "abc")
        else:
            outcomes[None] = outcomes.get(None, 0) + 1
            assert all(bool(torch.isfinite(one).all()) for one in network.state_dict().values())
            merged.unmerge()
            assert_equal(network.state_dict(), before)

    merge()
    assert len(outcomes) >= 4 and outcomes[None] > 10, outcomes


def test_a_failure_in_the_last_layer_leaves_the_first() -> None:
    network = model().half()
    before = state(network)
    good = tensors_of("LoRA")
    merged = sdconv.merge_lora(network, good)
    merged.unmerge()
    for bad in ({"c.w_norm": torch.full((8,), 7e4)}, {"c.w_norm": torch.ones(7)}):
        try:
            sdconv.merge_lora(network, good | bad)
        except SdconvError as error:
            assert "c.weight" in str(error)
        else:
            raise AssertionError("merged")
        assert_equal(network.state_dict(), before)


def test_valid_files_are_valid() -> None:
    for kind in FILES:
        network = model()
        before = state(network)
        merged = sdconv.merge_lora(network, tensors_of(kind))
        assert merged.layers == (FILES[kind][0],)
        assert any(not torch.equal(v, before[k]) for k, v in network.state_dict().items()), kind
