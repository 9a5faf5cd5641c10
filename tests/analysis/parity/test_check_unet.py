"""Parity with diffusers for every module of U-Nets in both layouts, and faults that it must
detect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded, unets
from helpers.differences import first_failure
from helpers.slow import first_of
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import sdconv
from sdconv.analysis.parity import ParityReport, check, compare
from sdconv.checkpoint.save import original_tensors
from sdconv.cli import app
from sdconv.config import UNet2DConditionConfig
from sdconv.integrations.peers import peer
from sdconv.models.dummy_inputs import Noise, inputs_for
from sdconv.models.unet import UNet2DConditionModel
from sdconv.report.tables import parity_report

Tensors = dict[str, Tensor]
SIZE = (5, 7)
# a family for each kind of input, and its name if the small network leaves it open
KINDS = {
    "SD1": "sd1",
    "SDXL": "sdxl",
    "SDXL refiner": "sdxl-refiner",
    "x4 upscaler": "x4-upscaler",
    "SD2 unCLIP": "sd2",
    "LCM": "sd1",
}


def made(config: dict[str, Any], layout: str = "diffusers") -> Tensors:
    """A U-Net's tensors as a file in this layout names them."""
    network = unets.on_meta(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    tensors = seeded.weights(shapes)
    return original_tensors(tensors, network.config) if layout == "original" else tensors


@pytest.mark.parametrize("layout", first_of(["original", "diffusers"]))
@pytest.mark.parametrize("kind", KINDS)
def test_every_module_is_equal_bit_for_bit(kind: str, layout: str) -> None:
    tensors = made(unets.smallest(kind), layout)
    report = check(tensors, family=KINDS[kind], size=SIZE, batch=2)
    assert report.passed and report.tolerance == 0 and report.first_difference is None
    assert (report.component, report.class_name) == ("unet", "UNet2DConditionModel")
    assert report.input_shapes["forward"][2:] == SIZE
    assert ("convert_ldm_unet_checkpoint" in report.conversion) == (layout == "original")
    names = {row.name for row in report.rows}
    assert {"conv_in", "time_embedding", "down_blocks.0", "up_blocks.0", "forward"} <= names
    inner = {row.name for row in report.rows if ".transformer_blocks.0.attn2.to_k" in row.name}
    assert inner == {
        module
        for module, _ in unets.on_meta(unets.smallest(kind)).named_modules()
        if module.endswith(".transformer_blocks.0.attn2.to_k")
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    report = check(made(unets.smallest("SDXL")), family="sdxl", dtype=dtype, size=SIZE)
    assert report.passed
    assert (report.tolerance == 0) == (dtype == torch.float64)


def test_within_a_whole_checkpoint() -> None:
    vae = seeded.kl((32, 32), 4, True, layers_per_block=1)
    whole = {f"first_stage_model.{n}": t for n, t in seeded.tensors(vae).items()}
    unet = made(unets.smallest("SD1"), "original")
    whole |= {f"model.diffusion_model.{name}": t.half() for name, t in unet.items()}
    whole |= {f"model_ema.diffusion_model{n.replace('.', '')}": t + 1 for n, t in unet.items()}
    assert check(whole, component="unet", family="sd1", size=SIZE).passed


def test_the_seed_decides_the_input() -> None:
    tensors = made(unets.smallest("SD1"))
    given: dict[str, Any] = {"family": "sd1", "size": SIZE, "dtype": torch.bfloat16}
    rows = [check(tensors, seed=seed, **given).rows for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_two_networks_take_the_memory_of_one() -> None:
    """From a file that each side converts. Two copies of SDXL's U-Net would be 20 GB."""
    from sdconv.analysis.parity.check import reference_network

    tensors = {name: t.half() for name, t in made(unets.smallest("SD1"), "original").items()}
    ours = sdconv.load(tensors, dtype=torch.float32, family="sd1")
    theirs = reference_network(tensors, ours).network.state_dict()
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == torch.float32
        assert tensor.data_ptr() == theirs[name].data_ptr(), name


# --- what the command prints


def test_command(tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    save_file(made(unets.smallest("SD1"), "original"), path)
    command = ["check", str(path), "--family", "sd1", "--size", "5x7"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "bit for bit" in shown.stdout
    for block in ("conv_in", "down_blocks.0 ", "mid_block ", "up_blocks.3 ", "conv_out"):
        assert block in shown.stdout
    assert "down_blocks.0.resnets" not in shown.stdout
    answer = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert answer["passed"] is True
    assert answer["input_shapes"] == {"forward": [1, 4, 5, 7]}


def test_table_fits_a_terminal() -> None:
    report = check(made(unets.smallest("SD1")), family="sd1", size=SIZE)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(parity_report(report, every=False))
    lines = capture.get().splitlines()
    assert len(lines) < 50
    assert any(line.split()[0] == "down_blocks.0" and "equal" in line for line in lines if line)


# --- controls: each injects a fault that must be detected


def pair(
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors,
) -> tuple[UNet2DConditionModel, nn.Module, Any]:
    """Our network from changed tensors in the original layout, diffusers' from the tensors, and
    what both take."""
    tensors = made(unets.smallest("SD1"), "original")
    ours = sdconv.load(change(dict(tensors)), family="sd1")
    assert isinstance(ours, UNet2DConditionModel)
    theirs = peer(ours.config, None, tensors, "original")[0]
    noise = Noise(2, 0, torch.float32, torch.device("cpu"))
    return ours, theirs, inputs_for(ours, SIZE, noise)


def swapped(first: str, second: str) -> Callable[[Tensors], Tensors]:
    """Two groups of tensors under each other's names: a mistake in a key map."""

    def change(tensors: Tensors) -> Tensors:
        names = {name: name for name in tensors}
        for name in tensors:
            for a, b in ((first, second), (second, first)):
                if name.startswith(a):
                    names[name] = b + name.removeprefix(a)
        return {names[name]: tensor for name, tensor in tensors.items()}

    return change


def test_without_a_change_it_passes() -> None:
    assert first_failure(compare(*pair())) is None


@pytest.mark.parametrize(
    ("first", "second", "place"),
    [
        ("input_blocks.1.0.in_layers.0.", "input_blocks.1.0.out_layers.0.", "resnets.0.norm1"),
        ("middle_block.0.", "middle_block.2.", "mid_block.resnets.0.norm1"),
        (
            "middle_block.1.transformer_blocks.0.norm1.",
            "middle_block.1.transformer_blocks.0.norm3.",
            "mid_block.attentions.0.transformer_blocks.0.norm1",
        ),
    ],
)
def test_control_names(first: str, second: str, place: str) -> None:
    failed = first_failure(compare(*pair(swapped(first, second))))
    assert failed is not None and failed.endswith(place)


def test_control_eps() -> None:
    ours, theirs, given = pair()
    for module in ours.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-6  # right in the transformers alone
    assert first_failure(compare(ours, theirs, given)) == "down_blocks.0.resnets.0.norm1"


def test_control_skips() -> None:
    ours, theirs, given = pair()
    block: Any = ours.up_blocks[-1]
    honest = block.forward
    block.forward = lambda x, temb, skips, *rest: honest(x, temb, skips[::-1], *rest)
    assert first_failure(compare(ours, theirs, given)) == "up_blocks.3.resnets.0.norm1"


def test_control_half_precision() -> None:
    """The tolerance for float16 does not hide a fault."""
    ours, theirs, given = pair()
    truth = pair()[1].double()
    ours.half()
    theirs.half()
    given = {"forward": tuple(_half(x) for x in given["forward"])}
    truth.load_state_dict({name: t.double() for name, t in theirs.state_dict().items()})
    assert first_failure(compare(ours, theirs, given, truth=truth)) is None
    assert ours.mid_block is not None
    ours.mid_block.resnets[0].time_emb_proj = None  # type: ignore[union-attr]
    failed = first_failure(compare(ours, theirs, given, truth=truth))
    assert failed == "mid_block.resnets.0.norm2"


def _half(value: Any) -> Any:
    return value.half() if isinstance(value, Tensor) and value.is_floating_point() else value


# --- what is refused


def test_what_diffusers_cannot_convert() -> None:
    with pytest.raises(
        sdconv.SdconvError, match=r"cannot convert these tensor names(.|\n)*sdconv conv"
    ):
        check(made(unets.small("uneven layers"), "original"), family="sd1", size=SIZE)


def test_a_projection_without_room_for_the_sizes() -> None:
    config = unets.smallest("SDXL") | {"projection_class_embeddings_input_dim": 256}
    with pytest.raises(sdconv.SdconvError, match="no room for the sizes"):
        check(made(config), family="sdxl", size=SIZE)


# --- full size, with random weights: what scripts/bench/parity_table.py prints


@pytest.mark.slow
def test_full_size() -> None:
    own = {**UNet2DConditionConfig.assumed, "sample_size": 64, "cross_attention_dim": 768}
    report: ParityReport = check(made(own, "original"), size=(16, 16))
    assert report.passed and report.tolerance == 0
    assert max(report.input_shapes["forward"]) == 16
