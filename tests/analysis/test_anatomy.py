"""The anatomy agrees with a real run: sizes, counts, receptive fields, shares."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from math import prod
from pathlib import Path

import pytest
import torch
from helpers import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sdconv
from sdconv.analysis.anatomy import LARGEST_SIDE, ROLES, dissect
from sdconv.config import Config
from sdconv.report.plots import draw_anatomy

SMALL = seeded.kl((32, 64, 32), 4, True, layers_per_block=1)
TAESD = seeded.tiny(
    encoder_block_out_channels=(8, 8, 8),
    decoder_block_out_channels=(8, 8, 8),
    num_encoder_blocks=(1, 1, 1),
    num_decoder_blocks=(1, 1, 1),
)
ALL = {**seeded.WITH_PEER, **seeded.WITHOUT_PEER}


@pytest.mark.parametrize("name", ALL)
def test_parameters_are_the_networks_own(name: str) -> None:
    network = seeded.network(ALL[name])
    own = sum(parameter.numel() for parameter in network.parameters())
    assert dissect(ALL[name], 64).parameters == own


@pytest.mark.parametrize("name", ALL)
def test_multiplies_are_those_that_torch_counts(name: str) -> None:
    found = dissect(ALL[name], (64, 96))
    with torch.device("meta"):
        network = seeded.BUILD[ALL[name].class_name](ALL[name])
        image = torch.empty(1, 3, 64, 96)
        latents = torch.empty(
            1, network.config.latent_channels, 64 // network.downscale, 96 // network.downscale
        )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.encode(image)
        network.decode(latents)
    ours = sum(t.multiplies for t in found.totals if t.role in ("convolution", "attention"))
    assert 2 * ours == counter.get_total_flops()  # a multiply-accumulate is two of theirs


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_macs_of_each_block_are_those_that_torch_counts(depth: int) -> None:
    network = seeded.network(SMALL)
    found = dissect(SMALL, 64).at_depth(depth)
    with FlopCounterMode(display=False, depth=None) as counter, torch.no_grad():
        network.encoder(torch.zeros(1, 3, 64, 64, device="cpu"))
    theirs = counter.get_flop_counts()
    compared = 0
    for block in found.blocks_of("encode"):
        inside = block.name.removeprefix("encoder").removeprefix(".")
        if block.name.startswith("encoder") and "attentions" not in inside:
            if "mid_block" in inside and inside.count(".") < 2:
                continue  # torch does not count attention on every device
            key = f"Encoder.{inside}".removesuffix(".")
            if key in theirs and key != "Encoder":
                assert 2 * block.macs == sum(theirs[key].values()), key
                compared += 1
    assert compared or depth == 1
    assert found.macs == dissect(SMALL, 64).macs
    assert sum(block.parameters for block in found.blocks) == found.parameters


def test_memory_of_weights_and_activations() -> None:
    found = dissect(SMALL, 64)
    rows = list(found.to_rows(itemsize=2))
    parameters = sum(one.numel() for one in seeded.network(SMALL).parameters())
    assert sum(row["weight_bytes"] for row in rows) == 2 * parameters
    first = next(iter(found.to_rows(every=True)))
    assert first["name"] == "encoder.conv_in"
    assert first["activation_bytes"] == 4 * 32 * 64 * 64
    block = next(one for one in found.blocks if one.name == "encoder.down_blocks.0.resnets.0")
    # norm, SiLU and convolution, twice
    assert block.activations == 6 * 32 * 64 * 64
    assert not any(one.macs for one in found.operations if one.role == "normalisation")
    blocks = found.to_json(itemsize=2)["blocks"]
    for memory in ("weight_bytes", "activation_bytes"):
        assert [block[memory] for block in blocks] == [row[memory] for row in rows]
    assert blocks[0]["operations"][0]["activation_bytes"] == 2 * 32 * 64 * 64


@settings(max_examples=8)
@given(rows=st.integers(8, 30), columns=st.integers(8, 30))
def test_feature_map_sizes_are_those_of_a_run(rows: int, columns: int) -> None:
    network, ran = seeded.network(SMALL), Counter[tuple[str, tuple[int, ...]]]()
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _, args, y, name=name: ran.update(
                    [(name, tuple(args[0].shape[1:2]) + tuple(y.shape[1:]))]
                )
            )
    with torch.no_grad():
        network.decode(network.encode(torch.zeros(1, 3, rows, columns)).latent_dist.mode())
    found = Counter(
        (one.name, (one.in_channels, one.out_channels, *one.out_size))
        for one in dissect(SMALL, (rows, columns)).operations
        if one.role == "convolution"
    )
    assert found == ran


def reached(y: torch.Tensor, x: torch.Tensor, row: int, column: int) -> tuple[int, int]:
    """Rows and columns of ``x`` that ``y[0, 0, row, column]`` depends on."""
    (gradient,) = torch.autograd.grad(y[0, 0, row, column], x, retain_graph=True)
    positions = gradient[0].abs().sum(0).nonzero()
    rows, columns = (positions.max(0).values - positions.min(0).values + 1).tolist()
    return rows, columns


def test_receptive_fields_are_what_gradients_reach() -> None:
    network = seeded.network(TAESD).double()
    for parameter in network.parameters():
        # all positive, so that no ReLU cuts a path
        parameter.data = torch.full_like(parameter, 1 / prod(parameter.shape[1:]))
    found = dissect(TAESD, 256)
    x = torch.ones(1, 3, 256, 256, dtype=torch.float64, requires_grad=True)
    z = torch.ones(1, 4, 64, 64, dtype=torch.float64, requires_grad=True)
    last = {path: found.blocks_of(path)[-1].last for path in ("encode", "decode")}
    assert reached(network.encode(x).latents, x, 32, 32) == last["encode"].receptive_field
    image = network.decode(z).sample
    # after upsampling neighbours differ: the widest of one period of four
    widest = max(reached(image, z, 128 + shift, 128) for shift in range(4))
    assert widest[0] == last["decode"].receptive_field[0]
    assert (last["encode"].downscale, last["decode"].downscale) == ((4, 4), (Fraction(1, 4),) * 2)


def test_stride_padding_and_global_attention() -> None:
    layers = {one.name: one for one in dissect(SMALL, 64).operations}
    downsample = layers["encoder.down_blocks.0.downsamplers.0.conv"]
    assert (downsample.kernel, downsample.stride, downsample.padding) == (
        (3, 3),
        (2, 2),
        (0, 1, 0, 1),
    )
    assert (downsample.in_size, downsample.out_size) == ((64, 64), (32, 32))
    assert layers["encoder.conv_in"].padding == (1, 1, 1, 1)
    assert not layers["encoder.mid_block.resnets.0.conv2"].global_receptive_field
    assert layers["encoder.mid_block.resnets.1.conv1"].global_receptive_field
    # a shortcut has a smaller receptive field than the block around it
    shortcut = layers["encoder.down_blocks.1.resnets.0.conv_shortcut"]
    assert shortcut.receptive_field == downsample.receptive_field


@pytest.mark.parametrize("name", ALL)
def test_shares_add_up(name: str) -> None:
    found = dissect(ALL[name], 64)
    assert sum(total.multiply_share for total in found.totals) == pytest.approx(1)
    assert sum(total.parameters for total in found.totals) == found.parameters
    assert {total.role for total in found.totals} <= set(ROLES)
    assert sum(len(block.operations) for block in found.blocks) == len(found.operations)
    assert json.loads(json.dumps(found.to_json()))["multiplies"] == found.multiplies


def test_convolutions_cost_more_on_larger_images_and_attention_more_than_that() -> None:
    small, large = (
        {total.role: total for total in dissect(SMALL, size).totals} for size in (64, 128)
    )
    assert large["convolution"].multiplies == 4 * small["convolution"].multiplies
    assert large["attention"].multiplies > 4 * small["attention"].multiplies
    assert large["convolution"].parameters == small["convolution"].parameters


def test_a_decoder_alone() -> None:
    alone = seeded.tiny(encoder_block_out_channels=(), num_encoder_blocks=())
    found = dissect(alone, 64)
    assert not found.blocks_of("encode")
    assert found.blocks_of("decode")[-1].out_size == (64, 64)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (3, "the image is too small"),
        ((64, 3), "the image is too small"),
        (4, "GroupNorm"),  # 32 channels in 32 groups on a feature map of one value
        (LARGEST_SIDE + 1, "the image is too large"),
        (0, "size"),
        ((8, 8, 8), "size"),
        ("8", "size"),
    ],
)
def test_invalid_sizes_are_refused(size: object, words: str) -> None:
    with pytest.raises(sdconv.InputError, match=words):
        dissect(SMALL, size)  # type: ignore[arg-type]


def test_the_largest_image_takes_no_memory() -> None:
    assert dissect(SMALL, LARGEST_SIDE).multiplies > 10**15


@pytest.mark.parametrize(
    ("config", "suffix"),
    [
        (SMALL, "png"),
        (TAESD, "svg"),
        (seeded.tiny(encoder_block_out_channels=(), num_encoder_blocks=()), "pdf"),
    ],
)
def test_every_format_is_drawn(config: Config, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    draw_anatomy(dissect(config, 64), path)
    magic = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(magic)
    assert list(tmp_path.iterdir()) == [path]
