"""The facts of each point match a run, on sdconv's networks and on diffusers'."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from helpers import pipelines, seeded, unets
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sdconv
from sdconv.features import Points

SMALL = seeded.kl((32, 64), 4, True, layers_per_block=1)
UNET = unets.smallest("SD1")


@cache
def listed(size: int) -> Points:
    """The points of diffusers' U-Net."""
    return sdconv.features(unets.theirs(UNET), size)


def by_name(points: Points) -> dict[str, Any]:
    return {point.name: point for point in points}


def vae_peer() -> Any:
    with torch.device("meta"):
        return diffusers.AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
        )


def test_features_is_a_function_and_a_module() -> None:
    assert sdconv.features.Points is Points
    assert isinstance(sdconv.features(seeded.network(SMALL)), Points)


def test_names_and_facts_are_the_same_on_diffusers_modules() -> None:
    peer = vae_peer()
    assert list(sdconv.features(peer, 64)) == list(sdconv.features(seeded.network(SMALL), 64))
    assert list(sdconv.features(unets.ours(unets.theirs(UNET)), 16)) == list(listed(16))


def test_tiny_autoencoders_whose_activations_are_one_module() -> None:
    """diffusers' blocks call one ReLU module twice; each call has its own hook point."""
    theirs = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(32, 32),
        decoder_block_out_channels=(32, 32),
        num_encoder_blocks=(1, 2),
        num_decoder_blocks=(2, 1),
        latent_magnitude=3,
        upsampling_scaling_factor=2,
    ).eval()
    config = sdconv.AutoencoderTinyConfig.from_json(dict(theirs.config), "config")
    ours = sdconv.AutoencoderTiny(config).eval()
    ours.load_state_dict(theirs.state_dict())
    assert list(sdconv.features(theirs, 32)) == list(sdconv.features(ours, 32))
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for network in (theirs, ours):
        with torch.no_grad(), sdconv.capture(network, "*") as maps:
            network(x)
        found.append(maps.to_dict())
    their_maps, our_maps = found
    assert {"encoder.layers.1.conv.1", "encoder.layers.1.conv.3"} <= set(their_maps)
    assert list(their_maps) == list(our_maps)
    for name, value in their_maps.items():
        assert isinstance(value, torch.Tensor), name
        assert torch.equal(value, our_maps[name]), name  # type: ignore[arg-type]


def test_the_patch_changes_nothing() -> None:
    peer = vae_peer()
    before = list(sdconv.features(peer, 64))
    assert sdconv.apply_patch(peer).replaced
    assert list(sdconv.features(peer, 64)) == before


def test_channels_sizes_and_order_match_a_run() -> None:
    network = seeded.network(SMALL)
    points = sdconv.features(network, (32, 48))
    with torch.no_grad(), sdconv.capture(network, "*") as maps:
        network(torch.zeros(1, 3, 32, 48))
    assert list(maps) == [name for name in points.names if name in maps]
    for name, point in by_name(points).items():
        if "attentions.0." in name:  # tokens, (B, N, C), but (B, C, N) where they are normalised
            assert point.channels == 64, name
            continue
        value = maps[name]
        assert isinstance(value, torch.Tensor)
        assert (point.channels, point.size) == (value.shape[1], tuple(value.shape[2:])), name


def test_points_of_a_resnet_block_in_order() -> None:
    points = listed(16)
    block = [p for p in points if p.name.startswith("up_blocks.1.resnets.0")]
    short = [(p.name.removeprefix("up_blocks.1.resnets.0"), p.kind) for p in block]
    assert short == [
        (":input", "input"),
        (":hidden", "hidden"),
        (":skip", "skip"),
        (".norm1", "norm"),
        (":silu1", "activation"),
        (".conv1", "conv"),
        (":temb", "time"),
        (".time_emb_proj", "time"),
        (".norm2", "norm"),
        (":silu2", "activation"),
        (".conv2", "conv"),
        (".conv_shortcut", "shortcut"),
        ("", "resnet"),
    ]


def test_both_ends_of_skip_connections_are_linked() -> None:
    found = by_name(listed(16))
    ends = {name: point for name, point in found.items() if point.kind == "skip"}
    assert len(ends) == 8
    for name, point in ends.items():
        assert point.skip is not None
        source = found[point.skip]
        assert source.skip == name
        same = ("channels", "size", "downscale", "receptive_field", "global_receptive_field")
        assert [getattr(point, fact) for fact in same] == [getattr(source, fact) for fact in same]
    assert ends["up_blocks.3.resnets.1:skip"].skip == "conv_in"
    assert ends["up_blocks.0.resnets.0:skip"].skip == "down_blocks.3.resnets.0"
    assert ends["up_blocks.2.resnets.0:skip"].skip == "down_blocks.1.attentions.0"


def test_downscale_and_receptive_field() -> None:
    found = by_name(listed(16))
    mid = found["mid_block.resnets.0"]
    assert (mid.size, mid.downscale, mid.channels) == ((2, 2), (8, 8), 96)
    assert found["conv_in"].receptive_field == (3, 3)
    assert not found["down_blocks.0.resnets.0"].global_receptive_field
    assert found["down_blocks.0.attentions.0"].global_receptive_field
    # a projected prompt embedding is not a feature map
    key = found["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"]
    assert (key.size, key.downscale, key.channels) == (None, None, 32)
    vae = by_name(sdconv.features(seeded.network(SMALL)))
    assert vae["decoder.conv_out"].downscale == (Fraction(1, 2), Fraction(1, 2))


def test_kernel_stride_and_padding_are_the_convolutions_own() -> None:
    network = seeded.network(SMALL)
    found = by_name(sdconv.features(network, 32))
    compared = 0
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and not name.endswith("downsamplers.0.conv"):
            point = found[name]
            rows, columns = (int(zeros) for zeros in module.padding)
            assert (point.kernel, point.stride) == (module.kernel_size, module.stride), name
            assert point.padding == (rows, rows, columns, columns), name
            compared += 1
    assert compared > 20
    assert (found["quant_conv"].kernel, found["quant_conv"].padding) == ((1, 1), (0, 0, 0, 0))


def test_up_and_downsampling_blocks_have_the_facts_of_their_convolution() -> None:
    vae = by_name(sdconv.features(seeded.network(SMALL), 32))
    unet = by_name(listed(16))
    for found, name, facts in (
        # the block puts the zeros, the convolution itself has padding 0
        (vae, "encoder.down_blocks.0.downsamplers.0", ((3, 3), (2, 2), (0, 1, 0, 1))),
        (vae, "decoder.up_blocks.0.upsamplers.0", ((3, 3), (1, 1), (1, 1, 1, 1))),
        (unet, "down_blocks.0.downsamplers.0", ((3, 3), (2, 2), (1, 1, 1, 1))),
        (unet, "up_blocks.0.upsamplers.0", ((3, 3), (1, 1), (1, 1, 1, 1))),
    ):
        for point in (found[name], found[f"{name}.conv"]):
            assert (point.kernel, point.stride, point.padding) == facts, point.name
        assert found[f"{name}:input"].kernel is None


def test_points_that_are_not_one_convolution_have_no_kernel_stride_or_padding() -> None:
    vae = sdconv.features(seeded.network(SMALL), 32)
    tiny = sdconv.features(seeded.network(seeded.tiny()), 32)
    without = {point.kind for point in (*vae, *listed(16)) if point.kernel is None}
    kinds = "input hidden skip norm activation time resnet attention probs linear block"
    assert without == set(kinds.split())
    for point in (*vae, *listed(16), *tiny):
        assert (point.kernel is None) == (point.stride is None) == (point.padding is None)
        if point.kind in kinds.split():
            assert point.kernel is None, point.name
    # nearest upsampling without a convolution
    assert by_name(tiny)["decoder.layers.5"].kind == "upsample"
    assert by_name(tiny)["decoder.layers.5"].kernel is None


def test_multiplies_match_torchs_count() -> None:
    network = unets.theirs(UNET).to("meta")
    given = [
        torch.empty(1, 4, 16, 16, device="meta"),
        torch.tensor(5, device="meta"),
        torch.empty(1, 77, 24, device="meta"),
    ]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*given)
    counts = counter.get_flop_counts()
    compared = 0
    for point in listed(16):
        if point.kind in ("conv", "shortcut", "linear") and ":" not in point.name:
            theirs = sum(counts[f"UNet2DConditionModel.{point.name}"].values())
            assert 2 * point.multiplies == theirs, point.name
            compared += 1
    assert compared > 90


def test_parameters_are_the_modules_own() -> None:
    network = seeded.network(SMALL)
    found = by_name(sdconv.features(network, 32))
    own = sum(weight.numel() for weight in network.encoder.parameters())
    assert found["encoder"].parameters == own
    assert found["encoder:input"].parameters == 0


def test_unknown_networks_have_names_but_no_facts() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ModuleList([nn.ReLU()])[0], nn.Dropout())
    points = sdconv.features(network)
    assert [(p.name, p.kind, p.channels) for p in points] == [
        ("0", "conv", None),
        ("1", "activation", None),
    ]


def test_a_pipeline_is_listed_by_component() -> None:
    points = sdconv.features(pipelines.pipeline("text"), 32)
    assert {p.channels for p in points if p.name.startswith("text_encoder.")} == {None}
    firsts = {name.partition(".")[0] for name in points.names}
    assert firsts == {"vae", "text_encoder", "unet"}
    assert by_name(points)["unet.up_blocks.2.resnets.1:skip"].skip == "unet.conv_in"


def test_table_and_json() -> None:
    points = sdconv.features(seeded.network(SMALL), 32)
    with io.StringIO() as written:
        Console(file=written, width=120).print(points.table())
        text = written.getvalue()
        assert "decoder.up_blocks.0.upsamplers.0.conv " in text
        assert "* the whole input, through attention" in text
        assert "s: stride, p: padding" in text
    with io.StringIO() as written:  # no name is folded
        Console(file=written, width=140).print(points.table())
        rows = {line.split()[0]: line for line in written.getvalue().splitlines() if line.strip()}
        assert " 3x3 s2 p0,1 " in rows["encoder.down_blocks.0.downsamplers.0.conv"]
        assert " 1x1 s1 p0 " in rows["quant_conv"]
    with io.StringIO() as written:  # in a narrow terminal only names are folded
        Console(file=written, width=90).print(points.table())
        assert all(word in written.getvalue() for word in ("activation ", "parameters ", "177.6 M"))
    read = json.loads(json.dumps(points.to_json()))
    assert [one["name"] for one in read] == list(points.names)
    assert read[-1]["downscale"] == ["1/2", "1/2"]
    sampler = read[points.names.index("encoder.down_blocks.0.downsamplers.0")]
    assert (sampler["kernel"], sampler["stride"]) == ([3, 3], [2, 2])
    assert sampler["padding"] == [0, 1, 0, 1]


def test_other_hooks_stay_and_are_not_called() -> None:
    network = seeded.network(SMALL)

    def fails(*_: object) -> None:
        raise AssertionError("a dry run must not call this")

    handle = network.encoder.conv_in.register_forward_hook(fails)
    assert sdconv.features(network, 32)[1].channels == 32
    assert len(network.encoder.conv_in._forward_hooks) == 1
    handle.remove()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused() -> None:
    traced = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.zeros(1, 3, 2, 2))
    with pytest.raises(sdconv.InputError, match="TorchScript"):
        sdconv.features(traced)


@pytest.mark.parametrize("target", [object(), "vae", None])
def test_targets_without_feature_maps_are_refused(target: object) -> None:
    with pytest.raises(sdconv.InputError, match="no feature maps"):
        sdconv.features(target)


@pytest.mark.parametrize("size", [0, "8", (1, 2, 3)])
def test_invalid_sizes_are_refused(size: Any) -> None:
    with pytest.raises(sdconv.InputError, match="size"):
        sdconv.features(seeded.network(SMALL), size)
