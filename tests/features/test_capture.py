"""Captured feature maps are what the network computes, and a capture does not change the
network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import unets
from helpers.capturing import UNET, at, hooks_on, image, one, run, unet, vae
from helpers.paths import TINY_VAE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sdconv
from sdconv.features import Series
from sdconv.features.selection import match_patterns


def test_captured_maps_are_the_modules_outputs() -> None:
    maps = run(vae(), ["*.resnets.*", "decoder.conv_*"])
    for name in ("encoder.down_blocks.1.resnets.0", "decoder.mid_block.resnets.1"):
        block = vae().get_submodule(name)
        x = one(maps, f"{name}:input")
        with torch.no_grad():
            assert torch.equal(block.norm1(x), one(maps, f"{name}.norm1"))
            assert torch.equal(block.nonlinearity(block.norm1(x)), one(maps, f"{name}:silu1"))
            assert torch.equal(block.conv1(one(maps, f"{name}:silu1")), one(maps, f"{name}.conv1"))
            assert torch.equal(block.conv2(one(maps, f"{name}:silu2")), one(maps, f"{name}.conv2"))
            assert torch.equal(block(x), one(maps, name))


def test_hook_points_between_modules_of_a_unet() -> None:
    inputs = unets.inputs(unet().config)
    with torch.no_grad(), sdconv.capture(unet(), ["*", "time_embedding"], exclude="*attn*") as maps:
        unet()(*inputs)
    up = "up_blocks.1.resnets.0"
    block = unet().get_submodule(up)
    parts = [one(maps, f"{up}:hidden"), one(maps, f"{up}:skip")]
    assert torch.equal(torch.cat(parts, dim=1), one(maps, f"{up}:input"))
    skips = {p.name: p.skip for p in sdconv.features(unet(), 8) if p.skip and p.kind == "skip"}
    assert len(skips) == 8
    for name, source_name in skips.items():
        assert torch.equal(one(maps, name), one(maps, source_name)), name
    with torch.no_grad():
        time = block.time_emb_proj(nn.functional.silu(one(maps, "time_embedding")))
    assert torch.equal(one(maps, f"{up}:temb"), time)
    assert hooks_on(unet()) == 0


def test_maps_are_in_the_order_of_the_points() -> None:
    with torch.no_grad(), sdconv.capture(unet(), "*") as maps:
        unet()(*unets.inputs(unet().config))
    names = tuple(n for n in sdconv.features(unet(), 8).names if not n.endswith(":probs"))
    assert tuple(maps) == names
    assert names != tuple(sorted(names))


def test_sdconvs_network_and_a_patched_one_give_the_same_maps() -> None:
    inputs = unets.inputs(unet().config)
    patched = unets.theirs(UNET)
    assert sdconv.apply_patch(patched).replaced
    found = []
    for network in (unet(), unets.ours(unet()), patched):
        with torch.no_grad(), sdconv.capture(network, "*", exclude="*attn*") as maps:
            network(*inputs)
        found.append(maps.to_dict())
    theirs, *others = found
    assert len(theirs) > 200
    for other in others:
        assert list(other) == list(theirs)
        for name, value in theirs.items():
            assert isinstance(value, Tensor)
            assert torch.equal(value, other[name]), name  # type: ignore[arg-type]


def test_blocks_of_the_fast_backend_are_captured_without_changing_it() -> None:
    network = sdconv.load(TINY_VAE, dtype=torch.float32, backend="fast")
    x = image(1).repeat(1, 1, 4, 4)
    with torch.no_grad():
        plain = network(x).sample  # type: ignore[operator]
        with sdconv.capture(network, ["*.resnets.?", "*samplers.?", "*:input"]) as maps:
            assert torch.equal(network(x).sample, plain)  # type: ignore[operator]
        # a fused block has no hook points inside, so it falls back to the reference
        with sdconv.capture(network, "*:silu2") as inside:
            found = network(x).sample  # type: ignore[operator]
    assert len(maps) > 40 and len(inside) > 15
    assert not torch.equal(found, plain)
    assert (found - plain).abs().max() < 2e-5 * plain.abs().max()


class InPlace(nn.Module):
    """Changes a feature map in place after the hook, as FreeU and adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(x)
        x.mul_(2)
        return x + y


def test_later_in_place_changes_do_not_reach_a_captured_map() -> None:
    network = InPlace().requires_grad_(False)
    naive: list[Tensor] = []
    handle = network.first.register_forward_hook(lambda _, __, y: naive.append(y))
    with sdconv.capture(network, "first") as maps:
        network(image())
    handle.remove()
    expected = network.first(image())
    assert torch.equal(one(maps, "first"), expected)
    assert torch.equal(naive[0], 2 * expected)  # a hook that keeps the tensor itself


def test_writing_to_a_captured_map_does_not_change_the_network() -> None:
    def spoil(*_: object) -> None:
        one(maps, "decoder.conv_in").zero_()

    with torch.no_grad():
        plain = vae()(image()).sample
        with sdconv.capture(vae(), "decoder.conv_in") as maps:
            handle = vae().decoder.mid_block.register_forward_pre_hook(spoil)
            try:
                assert torch.equal(vae()(image()).sample, plain)
            finally:
                handle.remove()
    assert not one(maps, "decoder.conv_in").any()


def test_several_calls_give_a_series() -> None:
    with torch.no_grad(), sdconv.capture(unet(), "mid_block") as maps:
        for step in (900.0, 20.0):
            unet()(*at(step))
    series = maps["mid_block"]
    assert isinstance(series, Series)
    assert (series.timesteps, series.calls) == ((900.0, 20.0), (0, 1))
    assert not torch.equal(series[0].tensor, series[1].tensor)
    assert torch.equal(series.stack()[1], series[-1].tensor)
    assert [captured.call for captured in series[1:]] == [1]
    assert isinstance(maps.to_dict()["mid_block"], list)


def test_timesteps_that_differ_in_a_batch() -> None:
    with torch.no_grad(), sdconv.capture(unet(), "conv_in") as maps:
        unet()(*unets.inputs(unet().config))  # 999 and 13
    assert maps.series("conv_in").timesteps == ((999.0, 13.0),)


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("decoder.up_block.0.resnets.1", "decoder.up_blocks.0.resnets.1"),
        ("*.conv3", "conv"),
        ("unet.mid_block", "mid_block"),
    ],
)
def test_an_unknown_name_suggests_the_closest(pattern: str, nearest: str) -> None:
    with pytest.raises(sdconv.InputError) as caught, sdconv.capture(vae(), ["encoder", pattern]):
        pass
    assert pattern in str(caught.value)
    assert nearest in str(caught.value)
    assert hooks_on(vae()) == 0


@given(st.text(max_size=20))
def test_any_pattern_matches_or_is_refused(pattern: str) -> None:
    names = ("encoder.conv_in", "encoder.mid_block:input")
    try:
        found = match_patterns(names, pattern)
    except sdconv.InputError:
        return
    assert set(found[pattern]) <= set(names)


def test_stars_match_dots_and_excluded_names_are_left_out() -> None:
    maps = run(vae(), ["decoder*conv1", "encoder.*.conv2"], exclude=["*mid*"])
    assert set(maps) == {
        "encoder.down_blocks.0.resnets.0.conv2",
        "encoder.down_blocks.1.resnets.0.conv2",
        *(f"decoder.up_blocks.{level}.resnets.{n}.conv1" for level in (0, 1) for n in (0, 1)),
    }


def test_a_name_that_was_not_captured() -> None:
    maps = run(vae(), "encoder.mid_block*")
    with pytest.raises(KeyError, match=r"encoder\.mid_block\.resnets\.0"):
        maps["encoder.mid_block.resnet.0"]
    with pytest.raises(sdconv.SdconvError):
        maps["encoder"]
    assert "encoder" not in maps
    assert maps.get("encoder") is None


def test_layers_that_are_never_reached_are_an_error() -> None:
    with (
        pytest.raises(sdconv.SdconvError, match=r"'encoder\.\*'.*reached"),
        torch.no_grad(),
        sdconv.capture(vae(), ["decoder.conv_in", "encoder.*"]) as maps,
    ):
        vae().decode(torch.zeros(1, 4, 4, 4))
    assert list(maps) == ["decoder.conv_in"]
    with pytest.raises(sdconv.SdconvError, match="reached"), sdconv.capture(vae(), "encoder"):
        pass
    with (
        pytest.raises(sdconv.SdconvError, match="steps"),
        torch.no_grad(),
        sdconv.capture(vae(), "encoder", steps=1),
    ):
        vae()(image())
    assert hooks_on(vae()) == 0


def test_encode_and_decode_are_captured_without_a_forward() -> None:
    with torch.no_grad(), sdconv.capture(vae(), ["encoder", "quant_conv", "decoder"]) as maps:
        vae().encode(image())
        vae().decode(torch.zeros(1, 4, 4, 4))
        vae().decode(torch.ones(1, 4, 4, 4))
    assert one(maps, "encoder").shape == (2, 8, 8, 12)
    assert maps.series("decoder").calls == (0, 1)


def test_stopping_early() -> None:
    ran: list[str] = []
    handle = vae().decoder.conv_out.register_forward_hook(lambda *_: ran.append("conv_out"))
    with torch.no_grad():
        plain = vae()(image())
        with sdconv.capture(vae(), "decoder.mid_block*", stop_early=True) as maps:
            vae()(image())
            ran.append("the block went on")
        found = sdconv.run_until(vae(), "decoder.mid_block*", image())
    handle.remove()
    assert plain.sample.shape[0] == 2
    assert ran == ["conv_out"]  # from the plain run only
    assert list(found) == list(maps)
    assert torch.equal(one(found, "decoder.mid_block"), one(maps, "decoder.mid_block"))
    assert hooks_on(vae()) == 0


def test_stopping_at_the_last_of_some_steps() -> None:
    asked: list[float] = []
    with torch.no_grad(), sdconv.capture(unet(), "conv_in", steps=[1], stop_early=True) as maps:
        for step in (9.0, 5.0, 1.0):
            asked.append(step)
            unet()(*at(step))
    assert maps.series("conv_in").timesteps == (5.0,)
    assert asked == [9.0, 5.0]
    with (
        pytest.raises(sdconv.InputError, match="last one"),
        sdconv.capture(unet(), "conv_in", steps=slice(1, None), stop_early=True),
    ):
        pass


def test_run_until_an_unknown_layer() -> None:
    with pytest.raises(sdconv.InputError, match="no layer"):
        sdconv.run_until(vae(), "decoder.mid_blok", image())


def test_the_first_tensor_of_an_output_is_captured() -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"no": None, "yes": [x + 1, x + 2]}

    network = nn.Sequential(Several())
    with sdconv.capture(network, "0") as maps:
        network(torch.zeros(2))
    assert one(maps, "0").tolist() == [1, 1]


def test_lora_layers_are_points_too() -> None:
    peft = pytest.importorskip("peft", reason="LoRA layers are peft's")
    network = unets.theirs(UNET)
    network.add_adapter(peft.LoraConfig(target_modules=["conv1"], init_lora_weights=False))
    name = "mid_block.resnets.0.conv1"
    kinds = {p.name: p.kind for p in sdconv.features(network, 16) if p.name.startswith(name)}
    assert (kinds[name], kinds[f"{name}.base_layer"]) == ("conv", "conv")
    with torch.no_grad(), sdconv.capture(network, f"{name}*") as maps:
        network(*unets.inputs(network.config))
    whole, base = one(maps, name), one(maps, f"{name}.base_layer")
    torch.testing.assert_close(whole, base + one(maps, f"{name}.lora_B.default"))
