"""Parity with diffusers for every module of every kind of autoencoder, and faults that it must
detect."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded, unets
from helpers.differences import first_failure
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import sdconv
from sdconv.analysis.parity import ParityReport, check, compare, components
from sdconv.checkpoint.save import original_tensors
from sdconv.cli import app
from sdconv.config import Config
from sdconv.integrations.peers import peer
from sdconv.models.blocks import Downsample2D

ODD = (29, 37)
SMALL = seeded.kl((32, 32, 32), 4, True, layers_per_block=1)
# the family that VAEs of 4 and of 16 latent channels leave open; no number depends on it
FAMILY = {4: "sd1", 16: "flux1"}


def family(config: Config) -> str | None:
    return FAMILY.get(config["latent_channels"]) if config.class_name == "AutoencoderKL" else None


def checked(config: Config, layout: str = "diffusers", **options: Any) -> ParityReport:
    tensors = seeded.tensors(config)
    if layout == "original":
        tensors = original_tensors(tensors, config)
    return check(tensors, family=family(config), **options)


def pair(
    config: Config = SMALL, rename: Callable[[str], str] = lambda name: name
) -> tuple[nn.Module, nn.Module]:
    """Our network and diffusers', from the same tensors in the original layout; ours from renamed
    ones."""
    tensors = original_tensors(seeded.tensors(config), config)
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    return sdconv.load(renamed, family=family(config)), peer(config, None, tensors, "original")[0]


def inputs(size: tuple[int, int] = (40, 56), dtype: torch.dtype = torch.float32) -> Any:
    random = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, *size, generator=random).to(dtype)
    return {
        "encode": (image,),
        "decode": (torch.randn(1, 4, 5, 7, generator=random).to(dtype),),
    }


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("kind", seeded.WITH_PEER)
def test_every_module_is_equal_bit_for_bit(kind: str, layout: str) -> None:
    config = seeded.WITH_PEER[kind]
    report = checked(config, layout, size=ODD, batch=2)
    assert report.passed and report.tolerance == 0
    assert report.first_difference is None
    assert all(row.equal and row.max_abs == row.relative == row.ulps == 0 for row in report.rows)
    containers = (nn.ModuleList, nn.BatchNorm2d)  # lists are not called; bn is the pipelines'
    modules = seeded.network(config).named_modules()
    called = {name for name, module in modules if name and not isinstance(module, containers)}
    assert {row.name for row in report.rows} == called | {"encode", "decode"}


def test_large_batches_are_equal() -> None:
    """From 64 images on, diffusers uses another memory layout."""
    report = checked(SMALL, size=(8, 8), batch=64)
    assert report.passed


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("images", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_layouts_are_equal(
    training: bool, weights: torch.memory_format, images: torch.memory_format
) -> None:
    sides = pair(seeded.kl((32, 64), 4, True, layers_per_block=1))
    for network in sides:
        network.train(training).to(memory_format=weights)
    given = {method: (x.to(memory_format=images),) for method, (x,) in inputs().items()}
    assert first_failure(compare(*sides, given)) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["sd1", "flux2", "taesd"])
def test_other_dtypes_are_within_the_derived_tolerance(kind: str, dtype: torch.dtype) -> None:
    report = checked(seeded.WITH_PEER[kind], dtype=dtype, size=(24, 24))
    assert report.passed
    if dtype == torch.float64:
        assert report.tolerance == 0
    else:
        # errors grow with depth, from a rounding unit to a few dozen
        unit = torch.finfo(dtype).eps
        assert all(unit <= row.tolerance < 64 * unit for row in report.rows)


def test_report_says_what_was_compared() -> None:
    report = checked(SMALL, "original", size=(24, 32), batch=3)
    assert report.label == "state dict in memory"
    assert (report.component, report.class_name) == ("vae", "AutoencoderKL")
    assert report.against.startswith("diffusers 0.")
    assert "convert_ldm_vae_checkpoint" in report.conversion
    assert report.input_shapes == {"encode": (3, 3, 24, 32), "decode": (3, 4, 6, 8)}
    assert [row.name for row in report.rows[:2]] == [
        "encoder.conv_in",
        "encoder.down_blocks.0.resnets.0.norm1",
    ]
    read = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert read["passed"] is True
    assert read["rows"][0]["shape"] == [3, 32, 24, 32]
    assert (read["dtype"], read["device"]) == ("float32", "cpu")


def test_the_seed_decides_the_input() -> None:
    rows = [checked(SMALL, size=(8, 8), dtype=torch.float16, seed=s).rows for s in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


# --- controls: each injects a fault that must be detected


def test_control_eps() -> None:
    ours, theirs = pair()
    for module in ours.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-5
    rows = compare(ours, theirs, inputs())
    assert first_failure(rows) == "encoder.down_blocks.0.resnets.0.norm1"


@pytest.mark.parametrize("size", [(40, 56), (41, 57)])
def test_control_symmetric_padding(size: tuple[int, int]) -> None:
    ours, theirs = pair()
    for block in ours.encoder.down_blocks:
        if block.downsamplers is not None:
            symmetric = Downsample2D(32)
            symmetric.load_state_dict(block.downsamplers[0].state_dict())
            block.downsamplers[0] = symmetric
    rows = compare(ours, theirs, inputs(size))
    assert first_failure(rows) == "encoder.down_blocks.0.downsamplers.0.conv"


def test_control_levels_of_the_decoder_not_reversed() -> None:
    def rename(name: str) -> str:
        for level in range(3):
            if name.startswith(f"decoder.up.{level}.block."):
                return name.replace(f"up.{level}.", f"up.{2 - level}.", 1)
        return name

    ours, theirs = pair(rename=rename)
    assert first_failure(compare(ours, theirs, inputs())) == "decoder.up_blocks.0.resnets.0.norm1"


@pytest.mark.parametrize(
    ("one", "other", "first"),
    [
        ("attn_1.q", "attn_1.k", "encoder.mid_block.attentions.0.to_q"),
        ("norm1", "norm2", "encoder.down_blocks.0.resnets.0.norm1"),
    ],
)
def test_control_swapped_names(one: str, other: str, first: str) -> None:
    def rename(name: str) -> str:
        for a, b in ((one, other), (other, one)):
            if f".{a}." in name:
                return name.replace(f".{a}.", f".{b}.")
        return name

    ours, theirs = pair(rename=rename)
    rows = compare(ours, theirs, inputs())
    assert first_failure(rows) == first
    assert max(row.relative for row in rows) > 1e-3


def test_without_a_fault_the_controls_pass() -> None:
    assert first_failure(compare(*pair(), inputs())) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_control_in_half_precision(dtype: torch.dtype) -> None:
    ours, theirs = pair()
    truth, faulty = copy.deepcopy(theirs.to(dtype)).double(), ours.to(dtype)
    given = inputs(dtype=dtype)
    assert first_failure(compare(faulty, theirs, given, truth=truth)) is None
    first, second = faulty.decoder.mid_block.resnets
    first.norm1, second.norm1 = second.norm1, first.norm1
    rows = compare(faulty, theirs, given, truth=truth)
    assert first_failure(rows) == "decoder.mid_block.resnets.0.norm1"


def test_weights_with_nan_do_not_pass() -> None:
    tensors = seeded.tensors(SMALL)
    tensors["encoder.mid_block.resnets.1.conv2.bias"] = torch.full((32,), math.nan)
    report = check(tensors, family="sd1", size=(8, 8))
    assert not report.passed
    assert report.first_difference == "encoder.mid_block.resnets.1.conv2"
    assert report.worst.name == "encoder.mid_block.resnets.1.conv2"
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["worst"]["max_abs"] == "nan"


# --- what files can look like


def test_a_folder_of_diffusers_own(tmp_path: Path) -> None:
    theirs = peer(SMALL, None, seeded.tensors(SMALL), "diffusers")[0]
    theirs.half().save_pretrained(tmp_path)
    report = check(tmp_path, size=(16, 16))
    assert report.passed and report.label == str(tmp_path)


def test_within_a_whole_checkpoint() -> None:
    tensors = original_tensors(seeded.tensors(SMALL), SMALL)
    whole = {f"first_stage_model.{name}": tensor.half() for name, tensor in tensors.items()}
    whole |= {
        "first_stage_model.loss.logvar": torch.zeros(()),
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4),
        "cond_stage_model.transformer.weight": torch.zeros(2, 2),
        "betas": torch.zeros(10),
    }
    assert check(whole, component="vae", family="sd1", size=(16, 16)).passed


@pytest.mark.parametrize("layout", ["folder", "file"])
def test_of_several_networks_the_command_takes_the_vae(layout: str, tmp_path: Path) -> None:
    unet = unets.ours(unets.theirs(unets.small("one level")))
    vae = seeded.network(SMALL)
    where = tmp_path / "whole"
    if layout == "folder":
        vae.save_pretrained(where / "vae")
        unet.save_pretrained(where / "unet")
    else:
        parts = {"first_stage_model.": vae, "model.diffusion_model.": unet}
        save_file(
            {
                f"{prefix}{name}": tensor
                for prefix, network in parts.items()
                for name, tensor in original_tensors(network.state_dict(), network.config).items()
            },
            where := tmp_path / "whole.safetensors",
        )
    assert components(where) == ("unet", "vae")
    command = ["check", str(where), "--size=16", "--family=sd1"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    assert (
        result.stderr
        == "note: the weights hold unet and vae; the vae is compared (see --component)\n"
    )
    assert "vae: AutoencoderKL" in result.stdout
    chosen = CliRunner().invoke(app, [*command, "--component=unet"])
    assert chosen.exit_code == 0 and chosen.stderr == ""
    assert "unet: UNet2DConditionModel" in chosen.stdout
    # called from Python, the choice is asked for in Python's words
    with pytest.raises(sdconv.UnknownNetworkError, match="pass component='unet' or component="):
        check(where, size=(16, 16))


def test_a_single_network_needs_no_choice(tmp_path: Path) -> None:
    sdconv.save(seeded.network(SMALL), tmp_path / "vae.safetensors")
    assert components(tmp_path / "vae.safetensors") == ("vae",)
    result = CliRunner().invoke(app, ["check", str(tmp_path / "vae.safetensors"), "--size=16"])
    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize("size", ["2x2", "3x3"])
def test_an_image_too_small_ends_the_command_with_a_message(size: str, tmp_path: Path) -> None:
    config = seeded.kl((32, 32), 4, True, layers_per_block=1)
    sdconv.save(seeded.network(config), tmp_path / "vae.safetensors")
    result = CliRunner().invoke(app, ["check", str(tmp_path / "vae.safetensors"), "--size", size])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: AutoencoderKL: too small for this network")


@pytest.mark.parametrize("axes", [2, 4])
def test_older_names_of_the_attention(axes: int) -> None:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in seeded.tensors(SMALL).items():
        for new, old in names.items():
            if f".{new}." in name:
                name = name.replace(f".{new}.", f".{old}.")
                if axes == 4 and tensor.ndim == 2:
                    tensor = tensor[:, :, None, None]
        tensors[name] = tensor
    assert check(tensors, family="sd1", size=(16, 16)).passed


def test_two_files_of_a_tiny_autoencoder(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = original_tensors(seeded.tensors(seeded.tiny()), seeded.tiny())
    files = []
    for half in ("decoder", "encoder"):
        files.append(tmp_path / f"{half}.safetensors")
        own = {n.removeprefix(f"{half}."): t for n, t in tensors.items() if n.startswith(half)}
        save_file(own, files[-1])
    assert check(files, size=ODD).passed
    with pytest.raises(sdconv.SdconvError, match="nothing to compare with"):
        check(files[0])


# --- what is refused


@pytest.mark.parametrize("kind", seeded.WITHOUT_PEER)
def test_networks_that_diffusers_lacks(kind: str) -> None:
    with pytest.raises(
        sdconv.SdconvError, match=r"diffusers cannot build this network(.|\n)*author"
    ):
        checked(seeded.WITHOUT_PEER[kind])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"against": "comfyui"}, "against: unknown reference"),
        ({"device": "tpu"}, "device: no such device"),
        ({"device": "meta"}, "device: no such device"),
        ({"dtype": torch.int32}, "dtype"),
        ({"device": None}, "device: no such device"),
        ({"size": 8}, "not a batch of images"),
        ({"size": (8.0, 8)}, "not a batch of images"),
        ({"size": (0, 8)}, "not a batch of images"),
        ({"size": (8, 8, 8)}, "not a batch of images"),
        ({"batch": 0}, "not a batch of images"),
        ({"size": (3, 8)}, "images have the wrong shape"),
    ],
)
def test_invalid_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sdconv.InputError, match=message):
        checked(SMALL, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(sdconv.InputError, match="device: no such device here"):
        checked(SMALL, device="cuda")


# --- full size, with random weights: what scripts/bench/parity_table.py prints


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(seeded.kl((128, 256, 512, 512), 4, True), id="sd1"),
        pytest.param(seeded.kl((128, 256, 512, 512), 16, False), id="sd3"),
        pytest.param(seeded.flux2((128, 256, 512, 512)), id="flux2"),
        pytest.param(seeded.tiny(), id="taesd"),
    ],
)
def test_full_size(config: Config, layout: str) -> None:
    report = checked(config, layout, size=(72, 104))
    assert report.passed and report.tolerance == 0
