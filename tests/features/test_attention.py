"""Attention probabilities as hook points: they are those that the network computes with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from helpers import capturing, unets
from torch import Tensor, nn

import sdconv
from sdconv.features import Context
from sdconv.features.attention import probabilities

UNETS: dict[str, Any] = {
    "diffusers": capturing.unet(),
    "sdconv": unets.ours(unets.theirs(capturing.UNET)),
}
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0"


@torch.no_grad()
def run(network: nn.Module) -> Tensor:
    output: Tensor = network(*capturing.at(500)).sample
    return output


def one(maps: Any, name: str) -> Tensor:
    value = maps[name]
    assert isinstance(value, Tensor)
    return value


@pytest.mark.parametrize("network", UNETS.values(), ids=UNETS)
@pytest.mark.parametrize("layer", ["attn1", "attn2"])
def test_they_are_what_the_layer_computes_with(network: nn.Module, layer: str) -> None:
    name = f"{LAYER}.{layer}"
    plain = run(network)
    forwards = [vars(module).get("forward") for module in network.modules()]
    parts = [f"{name}.to_v", f"{name}.to_out.0", f"{name}:probs"]
    with sdconv.capture(network, parts) as maps:
        assert torch.equal(run(network), plain)
    assert [vars(module).get("forward") for module in network.modules()] == forwards
    probs = one(maps, f"{name}:probs")
    heads = network.get_submodule(name).heads
    queries, keys = 8 * 12, 8 * 12 if layer == "attn1" else 7
    assert probs.shape == (2, heads, queries, keys)
    assert torch.allclose(probs.sum(-1), torch.ones(()), atol=1e-5)
    value = one(maps, f"{name}.to_v").unflatten(-1, (heads, -1)).transpose(1, 2)
    mixed = (probs @ value).transpose(1, 2).flatten(2)
    projected = network.get_submodule(f"{name}.to_out.0")(mixed)
    found = one(maps, f"{name}.to_out.0")
    assert torch.allclose(projected, found, atol=1e-5)
    uniform = torch.full_like(probs, 1 / keys) @ value  # other probabilities do not fit
    other = network.get_submodule(f"{name}.to_out.0")(uniform.transpose(1, 2).flatten(2))
    assert not torch.allclose(other, found, atol=1e-3)


def test_a_processor_without_the_fused_kernel() -> None:
    network = unets.theirs(capturing.UNET)
    with sdconv.capture(network, "*:probs") as fused:
        run(network)
    network.set_attn_processor(AttnProcessor())
    plain = run(network)
    with sdconv.capture(network, "*:probs") as maps:
        assert torch.equal(run(network), plain)
    assert list(maps) == list(fused) and len(maps) > 4
    for name in maps:
        assert torch.allclose(one(maps, name), one(fused, name), atol=1e-5)


def test_a_processor_that_hides_them_is_refused() -> None:
    class Opaque:
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden_states

    network = unets.theirs(capturing.UNET)
    for processor, hint in (
        (SlicedAttnProcessor(1), "disable_attention_slicing"),
        (Opaque(), "set_default_attn_processor"),
    ):
        network.set_attn_processor(processor)
        with pytest.raises(sdconv.SdconvError, match="cannot be read") as raised:
            with sdconv.capture(network, f"{LAYER}.attn2:probs"):
                run(network)
        assert hint in str(raised.value)
        with sdconv.capture(network, f"{LAYER}.attn2"):
            run(network)


def test_only_patterns_that_name_them_match() -> None:
    network = UNETS["diffusers"]
    with sdconv.capture(network, f"{LAYER}.*") as maps:
        run(network)
    assert f"{LAYER}.attn2" in maps
    assert not [name for name in maps if name.endswith(":probs")]
    with sdconv.capture(network, f"{LAYER}.*:probs", exclude="*attn1*") as maps:
        run(network)
    assert list(maps) == [f"{LAYER}.attn2:probs"]
    points = sdconv.features(network)
    assert f"{LAYER}.attn2:probs" in points.names
    at = points.names.index(f"{LAYER}.attn2:probs")
    assert points[at + 1].name == f"{LAYER}.attn2"


@pytest.mark.parametrize("network", UNETS.values(), ids=UNETS)
def test_they_can_be_edited(network: nn.Module) -> None:
    plain = run(network)

    def first_token(x: Tensor, _: Context) -> Tensor:
        x[..., 0], x[..., 1:] = 1, 0
        return x

    name = f"{LAYER}.attn2"
    with sdconv.edit(network, {f"{name}:probs": first_token}):
        with sdconv.capture(network, [f"{name}.to_v", f"{name}.to_out.0", f"{name}:probs"]) as maps:
            edited = run(network)
    assert not torch.allclose(edited, plain)
    probs = one(maps, f"{name}:probs")  # a capture inside an edit reads what it made
    assert (probs[..., 0] == 1).all() and (probs[..., 1:] == 0).all()
    value = one(maps, f"{name}.to_v")[:, :1]
    expected = network.get_submodule(f"{name}.to_out.0")(value)
    found = one(maps, f"{name}.to_out.0")
    assert torch.allclose(found, expected.expand_as(found), atol=1e-5)
    with sdconv.edit(network, {f"{name}:probs": lambda x, _: x}):
        assert torch.allclose(run(network), plain, atol=1e-5)
    assert torch.equal(run(network), plain)


def test_the_fast_backend_has_them_too() -> None:
    network = UNETS["sdconv"]
    with sdconv.capture(network, "*attn2:probs") as maps:
        run(network)
    with sdconv.backend("fast"), sdconv.capture(network, "*attn2:probs") as fast:
        run(network)
    assert list(fast) == list(maps)
    for name in maps:
        assert torch.allclose(one(fast, name), one(maps, name), atol=1e-4)


def test_masks_leave_keys_out() -> None:
    q, k = torch.randn(2, 1, 3, 5, 8)
    mask = torch.tensor([True, False, True, True, False])
    found = probabilities(q, k, mask)
    assert (found[..., ~mask] == 0).all()
    added = torch.zeros(5).masked_fill(~mask, float("-inf"))
    assert torch.allclose(found, probabilities(q, k, added))
    assert not torch.allclose(found, probabilities(q, k))
    v = torch.randn(1, 3, 5, 8)
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask.expand(5, 5))
    assert torch.allclose(found @ v, mixed, atol=1e-5)
