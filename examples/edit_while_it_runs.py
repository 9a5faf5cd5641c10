"""Edits the U-Net's feature maps while a pipeline runs.

    python examples/edit_while_it_runs.py [--steps 20] [--size 256] [--out edited.png]

You see three images from the same noise: the plain run; one without the mid block in the first half
of the steps; and one with the skip connections of the last level scaled by 0.9. The small U-Net
hardly needs its mid block. It reads the noise from its skip connections: with weaker ones it
removes too little.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image
from tiny_pipeline import run, tiny_pipeline
from torch import Tensor

import sdconv
from sdconv.features import Context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("edited.png"))
    args = parser.parse_args()

    def without_mid_block(x: Tensor, context: Context) -> Tensor:
        return x * 0 if context.step < args.steps // 2 else x

    def weaker(x: Tensor, context: Context) -> Tensor:
        return x * 0.9

    pipe = tiny_pipeline()
    images = run(pipe, args.steps, args.size)
    for edits in (
        {"unet.mid_block": without_mid_block},
        {"unet.up_blocks.2.resnets.*:skip": weaker},
    ):
        with sdconv.edit(pipe, edits):
            images += run(pipe, args.steps, args.size)
    again = run(pipe, args.steps, args.size)
    print("plain again after the edits:", again[0].tobytes() == images[0].tobytes())

    sheet = Image.new("RGB", (3 * args.size, args.size))
    for column, image in enumerate(images):
        sheet.paste(image, (column * args.size, 0))
    sheet.save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
