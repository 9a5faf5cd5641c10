"""The anatomy of U-Nets agrees with a real run: counts, sizes, receptive fields."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

import pytest
import torch
from helpers import commands, unets
from helpers.slow import marked_slow
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sdconv
from sdconv.analysis.anatomy import Anatomy, dissect
from sdconv.models.dummy_inputs import Noise, inputs_for
from sdconv.report.plots import draw_anatomy

FAMILIES = ("SDXL", "SD1", "LCM", "x4 upscaler", "SD2 unCLIP", "SDXL refiner", "no transformers")
SMALL = unets.smallest("SD1")


def anatomy(family: str = "SD1", size: int | tuple[int, int] = 128) -> Anatomy:
    return dissect(unets.on_meta(unets.smallest(family)).config, size)


@pytest.mark.parametrize("family", marked_slow(FAMILIES, but=("SD1", "SDXL")))
def test_counts_are_those_of_the_network_and_of_torch(family: str) -> None:
    network = unets.on_meta(unets.smallest(family))
    found = dissect(network.config, (128, 64))
    assert found.parameters == sum(one.numel() for one in network.parameters())
    noise = Noise(1, 0, torch.float32, torch.device("meta"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs_for(network, (16, 8), noise)["forward"])
    assert 2 * found.macs == counter.get_total_flops()
    assert sum(total.parameters for total in found.totals) == found.parameters
    assert 2 * dissect(network.config, (128, 72)).macs > counter.get_total_flops()


def test_feature_map_sizes_are_those_of_a_run() -> None:
    network, ran = unets.on_meta(SMALL), Counter[tuple[str, tuple[int, ...]]]()
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _, args, y, name=name: ran.update(
                    [(name, tuple(args[0].shape[1:2]) + tuple(y.shape[1:]))]
                )
            )
    noise = Noise(1, 0, torch.float32, torch.device("meta"))
    with torch.no_grad():
        network(*inputs_for(network, (11, 9), noise)["forward"])
    found = Counter(
        (one.name, (one.in_channels, one.out_channels, *one.out_size))
        for one in dissect(network.config, (88, 72)).operations
        if one.role == "convolution"
    )
    assert found == ran


def test_the_receptive_field_is_what_gradients_reach() -> None:
    """Of a network without attention whose weights and biases are all positive; GroupNorm, which is
    global, is replaced."""
    network = unets.ours(unets.theirs(unets.smallest("no transformers"))).double()
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.GroupNorm):
            parent = network.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.Identity())
    for parameter in network.parameters():
        parameter.data = torch.full_like(parameter, 1 / prod(parameter.shape[1:]))
    found = anatomy("no transformers", 8 * 96)
    x = torch.ones(1, 4, 96, 96, dtype=torch.float64, requires_grad=True)
    y = network(x, 500, torch.zeros(1, 3, 24, dtype=torch.float64)).sample
    reached = []
    for shift in range(2):  # neighbours differ after downsampling by two
        (gradient,) = torch.autograd.grad(y[0, 0, 48 + shift, 48], x, retain_graph=True)
        rows = gradient[0].abs().sum((0, 2)).nonzero()
        reached.append(int(rows.max() - rows.min()) + 1)
    last = found.operations[-1]
    assert last.receptive_field is not None
    assert (max(reached), last.global_receptive_field) == (last.receptive_field[0], False)


def test_what_depends_on_the_prompt_or_the_timestep_has_no_receptive_field() -> None:
    layers = {one.name: one for one in anatomy().operations}
    for name in ("time_embedding.linear_1", "down_blocks.0.resnets.0.time_emb_proj"):
        assert layers[name].receptive_field is None and layers[name].role == "embedding"
    inside = "down_blocks.0.attentions.0.transformer_blocks.0"
    prompt = layers[f"{inside}.attn2.to_k"]
    assert prompt.receptive_field is None and prompt.out_size == (77, 1)
    assert layers[f"{inside}.attn2.to_q"].receptive_field is not None
    assert layers[f"{inside}.ff.net.2"].role == "feed-forward"
    assert layers[f"{inside}.attn1.to_q"].role == "attention"
    assert not layers["down_blocks.0.resnets.0.conv2"].global_receptive_field
    assert layers["conv_out"].global_receptive_field
    assert layers["down_blocks.0.downsamplers.0.conv"].downscale == (2, 2)
    assert layers["conv_out"].downscale == (1, 1)


@pytest.mark.slow
def test_the_command_shows_them(tmp_path: Path) -> None:
    shown = commands.run("anatomy", "tiny-unet", "--size", "128x64", "--depth", 1)
    assert shown.exit_code == 0, shown.stderr
    assert "latents of 16x8, of an image of 128x64" in shown.stdout
    rows = commands.run("anatomy", "tiny-unet", "--size", 64, "--all", "--csv").stdout
    head, *lines = rows.splitlines()
    named = [dict(zip(head.split(","), line.split(","), strict=True)) for line in lines]
    conv = next(one for one in named if one["name"] == "down_blocks.0.downsamplers.0.conv")
    facts = ("kernel", "stride", "padding", "downscale", "receptive_field", "out_rows")
    assert [conv[fact] for fact in facts] == ["3x3", "2", "1", "2", "9", "4"]
    draw_anatomy(anatomy(), tmp_path / "unet.png")
    assert (tmp_path / "unet.png").read_bytes().startswith(b"\x89PNG")


def test_of_several_networks_the_command_takes_the_vae_and_says_so(tmp_path: Path) -> None:
    for name in ("vae", "unet"):
        sdconv.load(f"tiny-{name}").save_pretrained(tmp_path / name)
    shown = commands.run("anatomy", tmp_path, "--size", 64)
    assert "the vae is shown (see --component)" in shown.stderr
    assert shown.stdout.startswith("AutoencoderKL ")
    unet = commands.run("anatomy", tmp_path, "--size", 64, "--component", "unet")
    assert unet.stdout.startswith("UNet2DConditionModel") and not unet.stderr
