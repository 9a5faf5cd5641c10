"""Changes the U-Net's feature maps while a pipeline runs.

    python examples/edit_while_it_runs.py [--steps 20] [--size 256] [--out edited.png]

One sees three pictures from the same noise: the plain run; one whose middle block is left out in
the first half of the steps; and one whose skips into the last level are a tenth weaker. The small
U-Net does almost without its middle. It sees the noise through its skips: weaken them, and it takes
too little away.
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

    def without_middle(x: Tensor, context: Context) -> Tensor:
        return x * 0 if context.step < args.steps // 2 else x

    def weaker(x: Tensor, context: Context) -> Tensor:
        return x * 0.9

    pipe = tiny_pipeline()
    pictures = run(pipe, args.steps, args.size)
    for change in (
        {"unet.mid_block": without_middle},
        {"unet.up_blocks.2.resnets.*:skip": weaker},
    ):
        with sdconv.edit(pipe, change):
            pictures += run(pipe, args.steps, args.size)
    again = run(pipe, args.steps, args.size)
    print("plain again after the edits:", again[0].tobytes() == pictures[0].tobytes())

    sheet = Image.new("RGB", (3 * args.size, args.size))
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place * args.size, 0))
    sheet.save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
