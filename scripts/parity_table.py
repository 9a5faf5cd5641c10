"""Compares full-size autoencoders with diffusers', module by module, and prints a Markdown table.

Weights follow from a seed and stand in the original layout, so that the names are converted on both
sides, by sdconv's key map here and by diffusers' own code there. Both compute in float32 on the
CPU; input is a picture to encode and latents to decode.

    python scripts/parity_table.py --size 256x256
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch

import sdconv
from sdconv.checkpoint.save import original_tensors
from sdconv.config import Config
from sdconv.parity import ParityReport, check


def kl(latent_channels: int, quant: bool) -> sdconv.AutoencoderKLConfig:
    own: dict[str, Any] = {"use_quant_conv": quant, "use_post_quant_conv": quant}
    own |= {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    own |= {"latent_channels": latent_channels}
    return sdconv.AutoencoderKLConfig(**{**sdconv.AutoencoderKLConfig.assumed, **own})


NETWORKS: Mapping[str, tuple[type, Config, str | None]] = {
    "SD1, SD2, SDXL": (sdconv.AutoencoderKL, kl(4, True), "sd1"),
    "SD3, FLUX.1": (sdconv.AutoencoderKL, kl(16, False), "flux1"),
    "FLUX.2": (
        sdconv.AutoencoderKLFlux2,
        sdconv.AutoencoderKLFlux2Config(**sdconv.AutoencoderKLFlux2Config.assumed),
        None,
    ),
    "TAESD": (
        sdconv.AutoencoderTiny,
        sdconv.AutoencoderTinyConfig(**sdconv.AutoencoderTinyConfig.assumed),
        None,
    ),
}


def weights(build: type, config: Config, seed: int) -> dict[str, torch.Tensor]:
    """Random tensors of about the size that training gives, in the original layout."""
    random = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        blank = build(config).state_dict()
    drawn = {}
    for name, shape in ((name, tensor.shape) for name, tensor in blank.items()):
        noise = torch.randn(shape, generator=random)
        if noise.ndim > 1:
            drawn[name] = noise / math.sqrt(math.prod(shape[1:]))
        elif name.endswith("num_batches_tracked"):
            drawn[name] = torch.tensor(0)
        else:  # near 1 for what multiplies, near 0 for what is added
            near = 1.0 if name.endswith(("weight", "running_var")) else 0.0
            drawn[name] = near + 0.1 * noise
    return original_tensors(drawn, config)


def row(name: str, parameters: int, report: ParityReport) -> str:
    """One line of the table."""
    outputs = set(report.input_shapes)  # what the whole network gives, beside its modules
    modules = {entry.name for entry in report.rows} - outputs
    unequal = {entry.name for entry in report.rows if not entry.equal} - outputs
    height, width = report.input_shapes["encode"][2:]
    worst = max(entry.max_abs for entry in report.rows)
    cells = (
        name,
        f"{parameters / 1e6:.1f} M",
        f"{height} x {width}",
        str(len(modules)),
        str(len(modules) - len(unequal)),
        f"{worst:.3g}",
    )
    return "| " + " | ".join(cells) + " |"


def size(text: str) -> tuple[int, int]:
    """``256x320`` as two numbers."""
    height, width = text.split("x")
    return int(height), int(width)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--size", type=size, default=(256, 256), help="of the picture: 256x256 is rows x columns"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and input")
    options = parser.parse_args()
    print("| network | parameters | picture | modules compared | bit-equal | largest difference |")
    print("|---|---|---|---|---|---|")
    passed = True
    for name, (build, config, family) in NETWORKS.items():
        tensors = weights(build, config, options.seed)
        network = sdconv.load(tensors, family=family)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        del network
        report = check(tensors, family=family, size=options.size, seed=options.seed)
        print(row(name, parameters, report), flush=True)
        passed = passed and report.passed
    print(f"\nagainst {report.against}, torch {torch.__version__}, float32 on the CPU")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
