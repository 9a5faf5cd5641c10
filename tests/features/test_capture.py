"""A captured map is what the network computed there, and the network computes what it did."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import seeded
import torch
import unets
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sdconv
from sdconv.features import Maps, Series
from sdconv.features.patterns import chosen

CONFIG = seeded.kl((32, 64), 4, True, layers_per_block=1)
UNET = unets.smallest("SD1")


@cache
def vae() -> Any:
    return seeded.network(CONFIG)


@cache
def unet() -> Any:
    return unets.theirs(UNET)


def picture(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def hooks_on(network: nn.Module) -> int:
    return sum(
        len(vars(module)[kind])
        for module in network.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks")
    )


@torch.no_grad()
def run(target: Any, patterns: Any, **options: Any) -> Maps:
    """One pass of the VAE under capture; it must change no bit and leave no hook."""
    plain, before = vae()(picture()).sample, hooks_on(target)
    with sdconv.capture(target, patterns, **options) as maps:
        assert torch.equal(vae()(picture()).sample, plain)
    assert hooks_on(target) == before
    return maps


def one(maps: Maps, name: str) -> Tensor:
    value = maps[name]
    assert isinstance(value, Tensor)
    return value


def test_maps_are_what_the_modules_give_when_called_on_them() -> None:
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


def test_places_of_a_unet_that_are_no_modules_output() -> None:
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


def test_the_same_maps_on_sdconvs_network_and_under_the_patch() -> None:
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


class InPlace(nn.Module):
    """Edits a map in place after it passed, as FreeU and adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(x)
        x.mul_(2)
        return x + y


def test_later_edits_in_place_do_not_reach_a_map() -> None:
    network = InPlace().requires_grad_(False)
    naive: list[Tensor] = []
    handle = network.first.register_forward_hook(lambda _, __, y: naive.append(y))
    with sdconv.capture(network, "first") as maps:
        network(picture())
    handle.remove()
    expected = network.first(picture())
    assert torch.equal(one(maps, "first"), expected)
    assert torch.equal(naive[0], 2 * expected)  # what a hook that keeps the tensor shows


def test_changing_a_map_changes_nothing_else() -> None:
    def spoil(*_: object) -> None:
        one(maps, "decoder.conv_in").zero_()

    with torch.no_grad():
        plain = vae()(picture()).sample
        with sdconv.capture(vae(), "decoder.conv_in") as maps:
            handle = vae().decoder.mid_block.register_forward_pre_hook(spoil)
            try:
                assert torch.equal(vae()(picture()).sample, plain)
            finally:
                handle.remove()
    assert not one(maps, "decoder.conv_in").any()


def test_a_sequence_where_a_network_is_called_again() -> None:
    with torch.no_grad(), sdconv.capture(unet(), "mid_block") as maps:
        for step in (900.0, 20.0):
            unet()(*_at(step))
    series = maps["mid_block"]
    assert isinstance(series, Series)
    assert (series.timesteps, series.calls) == ((900.0, 20.0), (0, 1))
    assert not torch.equal(series[0].tensor, series[1].tensor)
    assert torch.equal(series.stack()[1], series[-1].tensor)
    assert [entry.call for entry in series[1:]] == [1]
    assert isinstance(maps.to_dict()["mid_block"], list)


def test_timesteps_that_differ_in_a_batch() -> None:
    with torch.no_grad(), sdconv.capture(unet(), "conv_in") as maps:
        unet()(*unets.inputs(unet().config))  # 999 and 13
    assert maps.series("conv_in").timesteps == ((999.0, 13.0),)


def _at(step: float) -> tuple[Any, ...]:
    sample, _, *rest = unets.inputs(unet().config)
    return sample, step, *rest


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        (None, (0, 1, 2, 3)),
        (2, (2,)),
        ([3, 0], (0, 3)),
        (slice(1, None), (1, 2, 3)),
        (slice(None, 3, 2), (0, 2)),
        (range(1, 3), (1, 2)),
        (lambda call: call.timestep < 500, (2, 3)),
    ],
)
def test_steps(steps: Any, kept: tuple[int, ...]) -> None:
    with torch.no_grad(), sdconv.capture(unet(), "conv_in", steps=steps) as maps:
        for step in (999, 600, 300, 0):
            unet()(*_at(step))
    assert maps.series("conv_in").calls == kept


@pytest.mark.parametrize("steps", [-1, [], ["a"], 1.5, slice(-2, None), slice(0, 4, -1), "all"])
def test_steps_that_are_none(steps: Any) -> None:
    with (
        pytest.raises(sdconv.InputError, match="steps"),
        sdconv.capture(vae(), "encoder", steps=steps),
    ):
        pass
    assert hooks_on(vae()) == 0


def test_channels_region_dtype_and_device() -> None:
    name = "decoder.up_blocks.0.resnets.0"
    whole = one(run(vae(), name), name)
    assert whole.shape == (2, 64, 8, 12)
    cut = one(run(vae(), name, channels=[5, 2], region=(0.5, 0, 1, 0.3)), name)
    assert torch.equal(cut, whole[:, [5, 2], 4:, :4])
    assert torch.equal(one(run(vae(), name, channels=slice(60, None)), name), whole[:, 60:])
    half = one(run(vae(), name, dtype=torch.float16, device="cpu"), name)
    assert torch.equal(half, whole.half())


def test_reductions() -> None:
    name = "decoder.up_blocks.0.resnets.0"
    x = one(run(vae(), name), name)
    assert torch.equal(one(run(vae(), name, reduce="mean"), name), x.mean((2, 3)))
    assert torch.equal(one(run(vae(), name, reduce="max"), name), x.amax((2, 3)))
    std = one(run(vae(), name, reduce="std"), name)
    torch.testing.assert_close(std, x.flatten(2).var(-1, correction=0).sqrt())
    pooled = one(run(vae(), name, reduce="channel_max"), name)
    assert torch.equal(pooled[:, 0], x.max(1).values)
    own = one(run(vae(), name, reduce=lambda y: y[:1] * 2), name)
    assert torch.equal(own, x[:1] * 2)


def test_principal_components() -> None:
    name = "decoder.up_blocks.0.resnets.0"
    x = one(run(vae(), name), name)
    found = one(run(vae(), name, reduce="pca:3"), name)
    assert found.shape == (2, 3, 8, 12)
    rows = x.movedim(1, -1).reshape(-1, 64)
    _, sizes, axes = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    flat = found.movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(flat.norm(dim=0), sizes[:3], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        flat.abs(), ((rows - rows.mean(0)) @ axes[:3].mT).abs(), rtol=1e-2, atol=1e-2
    )
    # more than there are channels: zeros
    few = one(run(vae(), name, channels=[0, 1], reduce=sdconv.features.pca(3)), name)
    assert few.shape[1] == 3
    assert not few[:, 2].any()


def test_numbers_and_vectors_are_reduced_too() -> None:
    with torch.no_grad(), sdconv.capture(unet(), ["time_embedding"], reduce="std") as maps:
        unet()(*_at(5))
    assert not one(maps, "time_embedding").any()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("reduce", "median"),
        ("reduce", "pca:0"),
        ("reduce", 3),
        ("channels", 3),
        ("channels", []),
        ("channels", [64]),
        ("channels", [-1]),
        ("region", (0, 0, 0, 1)),
        ("region", (0, 0, 2, 1)),
        ("region", 0.5),
        ("dtype", "float16"),
        ("device", "nowhere"),
        ("max_memory", -1),
        ("max_memory", 0.5),
        ("patterns", []),
        ("patterns", 7),
        ("exclude", "nothing.*"),
        ("exclude", "decoder*"),
    ],
)
def test_options_that_are_none(option: str, value: Any) -> None:
    options = {"patterns": "decoder.up_blocks.0.resnets.0", option: value}
    with pytest.raises(sdconv.InputError), torch.no_grad(), sdconv.capture(vae(), **options):
        vae()(picture())
    assert hooks_on(vae()) == 0


def test_a_region_of_what_has_no_rows() -> None:
    with (
        pytest.raises(sdconv.InputError, match="rows and columns"),
        torch.no_grad(),
        sdconv.capture(unet(), "*:temb", region=(0, 0, 1, 0.5)),
    ):
        unet()(*_at(5))
    assert hooks_on(unet()) == 0


def test_a_reduction_that_gives_no_tensor() -> None:
    with (
        pytest.raises(sdconv.SdconvError, match="no tensor"),
        torch.no_grad(),
        sdconv.capture(vae(), "encoder", reduce=lambda x: None),  # type: ignore[arg-type,return-value]
    ):
        vae()(picture())
    assert hooks_on(vae()) == 0


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("decoder.up_block.0.resnets.1", "decoder.up_blocks.0.resnets.1"),
        ("*.conv3", "conv"),
        ("unet.mid_block", "mid_block"),
    ],
)
def test_unknown_names_say_the_nearest(pattern: str, nearest: str) -> None:
    with pytest.raises(sdconv.InputError) as caught, sdconv.capture(vae(), ["encoder", pattern]):
        pass
    assert pattern in str(caught.value)
    assert nearest in str(caught.value)
    assert hooks_on(vae()) == 0


@given(st.text(max_size=20))
def test_any_pattern_matches_or_is_refused(pattern: str) -> None:
    names = ("encoder.conv_in", "encoder.mid_block:input")
    try:
        found = chosen(names, pattern)
    except sdconv.InputError:
        return
    assert set(found[pattern]) <= set(names)


def test_stars_cross_dots_and_excludes_hold() -> None:
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


def test_layers_that_are_never_reached() -> None:
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
        vae()(picture())
    assert hooks_on(vae()) == 0


def test_encode_and_decode_are_seen_though_they_are_no_forward() -> None:
    with torch.no_grad(), sdconv.capture(vae(), ["encoder", "quant_conv", "decoder"]) as maps:
        vae().encode(picture())
        vae().decode(torch.zeros(1, 4, 4, 4))
        vae().decode(torch.ones(1, 4, 4, 4))
    assert one(maps, "encoder").shape == (2, 8, 8, 12)
    assert maps.series("decoder").calls == (0, 1)


def test_stopping_early() -> None:
    ran: list[str] = []
    handle = vae().decoder.conv_out.register_forward_hook(lambda *_: ran.append("conv_out"))
    with torch.no_grad():
        plain = vae()(picture())
        with sdconv.capture(vae(), "decoder.mid_block*", stop_early=True) as maps:
            vae()(picture())
            ran.append("the block went on")
        found = sdconv.run_until(vae(), "decoder.mid_block*", picture())
    handle.remove()
    assert plain.sample.shape[0] == 2
    assert ran == ["conv_out"]  # of the plain run only
    assert list(found) == list(maps)
    assert torch.equal(one(found, "decoder.mid_block"), one(maps, "decoder.mid_block"))
    assert hooks_on(vae()) == 0


def test_stopping_at_the_last_of_some_steps() -> None:
    asked: list[float] = []
    with torch.no_grad(), sdconv.capture(unet(), "conv_in", steps=[1], stop_early=True) as maps:
        for step in (9.0, 5.0, 1.0):
            asked.append(step)
            unet()(*_at(step))
    assert maps.series("conv_in").timesteps == (5.0,)
    assert asked == [9.0, 5.0]
    with (
        pytest.raises(sdconv.InputError, match="last one"),
        sdconv.capture(unet(), "conv_in", steps=slice(1, None), stop_early=True),
    ):
        pass


def test_run_until_an_unknown_layer() -> None:
    with pytest.raises(sdconv.InputError, match="no layer"):
        sdconv.run_until(vae(), "decoder.mid_blok", picture())


def test_of_outputs_the_first_tensor() -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"no": None, "yes": [x + 1, x + 2]}

    network = nn.Sequential(Several())
    with sdconv.capture(network, "0") as maps:
        network(torch.zeros(2))
    assert one(maps, "0").tolist() == [1, 1]


def test_memory_is_asked_for_before_anything_runs() -> None:
    maps = run(vae(), "*.resnets.*")
    needed = sum(one(maps, name).nbytes for name in maps)
    ran: list[int] = []
    handle = vae().encoder.conv_in.register_forward_hook(lambda *_: ran.append(1))
    try:
        with (
            pytest.raises(sdconv.SdconvError, match=f"{needed:,} bytes in all") as caught,
            torch.no_grad(),
            sdconv.capture(vae(), "*.resnets.*", max_memory=needed - 1),
        ):
            vae()(picture())
        assert "store=" in str(caught.value)
        assert ran == []
        # and as much as there is to be
        assert len(run(vae(), "*.resnets.*", max_memory=needed)) == len(maps)
        assert len(ran) == 2
    finally:
        handle.remove()


def test_memory_of_what_is_kept_not_of_what_passes() -> None:
    sizes = {"reduce": "mean", "dtype": torch.float16, "channels": [0]}
    maps = run(vae(), "*.resnets.0", max_memory=100, **sizes)
    assert all(value.nbytes == 4 for value in maps.values() if isinstance(value, Tensor))


def test_memory_where_a_dry_run_is_not_possible() -> None:
    class AsksForValues(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else x + 1

    network = nn.Sequential(nn.Conv2d(3, 4, 1), AsksForValues())
    with (
        pytest.raises(sdconv.SdconvError, match="bytes so far"),
        torch.no_grad(),
        sdconv.capture(network, "*", max_memory=100) as maps,
    ):
        network(picture())
    assert len(maps) == 0
    assert hooks_on(network) == 0


def test_weights_that_are_elsewhere_until_they_are_needed() -> None:
    accelerate = pytest.importorskip("accelerate", reason="offloading is accelerate's")
    network = unets.theirs(UNET)
    inputs = unets.inputs(network.config)
    with torch.no_grad(), sdconv.capture(network, "*.conv2") as plain:
        network(*inputs)
    accelerate.cpu_offload(network, execution_device="cpu")
    needed = sum(one(plain, name).nbytes for name in plain)
    with torch.no_grad(), sdconv.capture(network, "*.conv2", max_memory=needed) as maps:
        network(*inputs)
    assert all(torch.equal(one(maps, name), one(plain, name)) for name in plain)
    with (
        pytest.raises(sdconv.SdconvError, match=f"{needed:,} bytes in all"),
        torch.no_grad(),
        sdconv.capture(network, "*.conv2", max_memory=needed - 1),
    ):
        network(*inputs)


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


@pytest.mark.gpu
def test_off_the_gpu_while_it_computes() -> None:
    network = unets.theirs(UNET).cuda()
    inputs = [x.cuda() if isinstance(x, Tensor) else x for x in unets.inputs(network.config)]
    names = ["*.resnets.0", "*:skip"]
    with torch.no_grad():
        with sdconv.capture(network, names) as there:
            network(*inputs)
        with sdconv.capture(network, names, device="cpu") as here:
            network(*inputs)
            early = [here[name].clone() for name in here]  # type: ignore[union-attr]
    for name, x in zip(there, early, strict=True):
        assert one(there, name).is_cuda
        assert torch.equal(one(there, name).cpu(), one(here, name))
        assert torch.equal(x, one(here, name))
