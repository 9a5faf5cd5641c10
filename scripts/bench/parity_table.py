"""Compares full-size networks with diffusers', module by module, and prints a Markdown table.

Weights are drawn from a seed, under the names of the original layout, so that both sides convert
the names: sdconv by its key map, diffusers by its own code. Both compute in float32 on the CPU from
the same tensors in memory; SDXL's U-Net takes 12 GB. A VAE encodes an image and decodes latents; a
U-Net takes latents, a timestep and a prompt embedding.

    python -m scripts.bench.parity_table --size 256x256 --latents 64x64
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

import sdconv
from scripts.bench.configs import FLUX2, SD15, SDXL, TAESD, kl
from scripts.bench.sides import Size, size_of
from sdconv.analysis.parity import ParityReport, check
from sdconv.checkpoint.save import original_tensors
from sdconv.config import Config
from sdconv.integrations.peers import VERSION
from sdconv.loading import build


@dataclass(frozen=True)
class Case:
    """A network, and its family where the shapes leave it open."""

    build: Callable[..., torch.nn.Module]
    config: Config
    family: str | None = None


VAES: Mapping[str, Case] = {
    "SD1, SD2, SDXL": Case(sdconv.AutoencoderKL, kl(4, True), "sd1"),
    "SD3, FLUX.1": Case(sdconv.AutoencoderKL, kl(16, False), "flux1"),
    "FLUX.2": Case(sdconv.AutoencoderKLFlux2, FLUX2),
    "TAESD": Case(sdconv.AutoencoderTiny, TAESD),
}
UNETS: Mapping[str, Case] = {
    "SD1.5 U-Net": Case(build, SD15),
    "SDXL base U-Net": Case(build, SDXL),
}


def weights(case: Case, seed: int, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Random tensors of about the scale of trained ones, in the original layout. Each kind of
    device draws its own."""
    random = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        empty = case.build(case.config).state_dict()
    drawn = {}
    for name, shape in ((name, tensor.shape) for name, tensor in empty.items()):
        noise = torch.randn(shape, generator=random, device=device)
        if noise.ndim > 1:
            drawn[name] = noise.div_(math.sqrt(math.prod(shape[1:])))
        elif name.endswith("num_batches_tracked"):
            drawn[name] = torch.tensor(0)
        else:  # scales near 1, shifts near 0
            near = 1.0 if name.endswith(("weight", "running_var")) else 0.0
            drawn[name] = near + 0.1 * noise
    return original_tensors(drawn, case.config)


def compared(case: Case, size: Size, seed: int) -> tuple[int, ParityReport]:
    """The number of parameters, and the comparison's report."""
    tensors = weights(case, seed)
    parameters = sum(p.numel() for p in sdconv.load(tensors, family=case.family).parameters())
    return parameters, check(tensors, family=case.family, size=size, seed=seed)


def row(name: str, parameters: int, report: ParityReport) -> str:
    """One line of the table."""
    outputs = set(report.input_shapes)  # rows of the whole network's outputs, not of modules
    modules = {entry.name for entry in report.rows} - outputs
    unequal = {entry.name for entry in report.rows if not entry.equal} - outputs
    kind = "latents" if "forward" in outputs else "image"
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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--size", type=size_of, default=(256, 256), help="of the image, rows x columns"
    )
    parser.add_argument(
        "--latents", type=size_of, default=(64, 64), help="size of a U-Net's latents"
    )
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
