"""Patches a diffusers pipeline with sdconv's blocks, and removes the patch.

    python examples/patch_a_pipeline.py [--steps 20] [--size 128]

The networks are saved and loaded with diffusers, so that they are diffusers' own classes. You see
how many blocks of each kind are replaced, and that the image is the same bit for bit before, with
and after the patch.
"""

from __future__ import annotations

import argparse
import tempfile

import numpy as np
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny_pipeline import run, tiny_pipeline

import sdconv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=128)
    args = parser.parse_args()

    pipe = tiny_pipeline()
    with tempfile.TemporaryDirectory() as folder:
        pipe.vae.save_pretrained(f"{folder}/vae")
        pipe.unet.save_pretrained(f"{folder}/unet")
        pipe.vae = AutoencoderKL.from_pretrained(f"{folder}/vae")
        pipe.unet = UNet2DConditionModel.from_pretrained(f"{folder}/unet")
    print("the U-Net is", type(pipe.unet).__module__)

    def image() -> np.ndarray:
        return run(pipe, args.steps, args.size, output_type="np")

    before = image()
    print(sdconv.apply_patch(pipe))
    patched = image()
    sdconv.remove_patch(pipe)
    after = image()
    print("the same with the patch:", np.array_equal(before, patched))
    print("the same after it:", np.array_equal(before, after))


if __name__ == "__main__":
    main()
