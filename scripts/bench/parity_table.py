"""Compares full-size networks with diffusers', module by module, and prints a Markdown table.

Weights follow from a seed and stand in the original layout, so that the names are converted on both
sides, by sdconv's key map here and by diffusers' own code there. Both compute in float32 on the
CPU, from the same tensors in memory: SDXL's U-Net takes 12 GB. Input is a picture to encode and
latents to decode, or latents, a timestep and a text for a U-Net.

    python -m scripts.bench.parity_table --size 256x256 --latents 64x64
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import sdconv
from sdconv.analysis.parity import ParityReport, check
from sdconv.checkpoint.save import original_tensors
from sdconv.config import Config
from sdconv.config.unet import CROSS_DOWN, CROSS_UP, DOWN, UP
from sdconv.integrations.peers import VERSION
from sdconv.loading import build

Size = tuple[int, int]


def kl(latent_channels: int, quant: bool) -> sdconv.AutoencoderKLConfig:
    own: dict[str, Any] = {"use_quant_conv": quant, "use_post_quant_conv": quant}
    own |= {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    own |= {"latent_channels": latent_channels}
    return sdconv.AutoencoderKLConfig(**{**sdconv.AutoencoderKLConfig.assumed, **own})


def unet(**fields: Any) -> sdconv.UNet2DConditionConfig:
    return sdconv.UNet2DConditionConfig(**{**sdconv.UNet2DConditionConfig.assumed, **fields})


SDXL = unet(
    sample_size=128,
    block_out_channels=(320, 640, 1280),
    down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN),
    up_block_types=(CROSS_UP, CROSS_UP, UP),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)


@dataclass(frozen=True)
class Case:
    """A network, and the family that its shapes leave open."""

    build: Callable[..., torch.nn.Module]
    config: Config
    family: str | None = None


FLUX2 = sdconv.AutoencoderKLFlux2Config(**sdconv.AutoencoderKLFlux2Config.assumed)
TAESD = sdconv.AutoencoderTinyConfig(**sdconv.AutoencoderTinyConfig.assumed)
VAES: Mapping[str, Case] = {
    "SD1, SD2, SDXL": Case(sdconv.AutoencoderKL, kl(4, True), "sd1"),
    "SD3, FLUX.1": Case(sdconv.AutoencoderKL, kl(16, False), "flux1"),
    "FLUX.2": Case(sdconv.AutoencoderKLFlux2, FLUX2),
    "TAESD": Case(sdconv.AutoencoderTiny, TAESD),
}
UNETS: Mapping[str, Case] = {
    "SD1.5 U-Net": Case(build, unet(sample_size=64, cross_attention_dim=768)),
    "SDXL base U-Net": Case(build, SDXL),
}


def weights(case: Case, seed: int) -> dict[str, torch.Tensor]:
    """Random tensors of about the size that training gives, in the original layout."""
    random = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        blank = case.build(case.config).state_dict()
    drawn = {}
    for name, shape in ((name, tensor.shape) for name, tensor in blank.items()):
        noise = torch.randn(shape, generator=random)
        if noise.ndim > 1:
            drawn[name] = noise.div_(math.sqrt(math.prod(shape[1:])))
        elif name.endswith("num_batches_tracked"):
            drawn[name] = torch.tensor(0)
        else:  # near 1 for what multiplies, near 0 for what is added
            near = 1.0 if name.endswith(("weight", "running_var")) else 0.0
            drawn[name] = near + 0.1 * noise
    return original_tensors(drawn, case.config)


def compared(case: Case, size: Size, seed: int) -> tuple[int, ParityReport]:
    """The number of parameters, and what the comparison found."""
    tensors = weights(case, seed)
    parameters = sum(p.numel() for p in sdconv.load(tensors, family=case.family).parameters())
    return parameters, check(tensors, family=case.family, size=size, seed=seed)


def row(name: str, parameters: int, report: ParityReport) -> str:
    """One line of the table."""
    outputs = set(report.input_shapes)  # what the whole network gives, beside its modules
    modules = {entry.name for entry in report.rows} - outputs
    unequal = {entry.name for entry in report.rows if not entry.equal} - outputs
    kind = "latents" if "forward" in outputs else "picture"
    height, width = next(iter(report.input_shapes.values()))[2:]
    worst = max(entry.max_abs for entry in report.rows)
    cells = (
        name,
        f"{parameters / 1e6:.1f} M",
        f"{kind} {height} x {width}",
        str(len(modules)),
        str(len(modules) - len(unequal)),
        f"{worst:.3g}",
    )
    return "| " + " | ".join(cells) + " |"


def size(text: str) -> Size:
    """``256x320`` as two numbers."""
    height, width = text.split("x")
    return int(height), int(width)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--size", type=size, default=(256, 256), help="of the picture: 256x256 is rows x columns"
    )
    parser.add_argument("--latents", type=size, default=(64, 64), help="size of a U-Net's latents")
    parser.add_argument("--only", choices=("vaes", "unets"), help="one half of the table")
    parser.add_argument("--seed", type=int, default=0, help="of weights and input")
    options = parser.parse_args()
    cases = []
    if options.only != "unets":
        cases += [(name, case, options.size) for name, case in VAES.items()]
    if options.only != "vaes":
        cases += [(name, case, options.latents) for name, case in UNETS.items()]
    print("| network | parameters | input | modules compared | bit-equal | largest difference |")
    print("|---|---|---|---|---|---|")
    passed = True
    for name, case, shape in cases:
        parameters, report = compared(case, shape, options.seed)
        print(row(name, parameters, report), flush=True)
        passed = passed and report.passed
    print(f"\nagainst {VERSION}, torch {torch.__version__}, float32 on the CPU")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
