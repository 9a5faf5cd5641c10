"""Opens checkpoints of any layout and describes them.

    python examples/load_any_checkpoint.py [FILE_OR_FOLDER ...]

Without arguments, it opens the small VAE as shipped, in the original layout, and as a folder in
diffusers' layout. You see that all three hold the same network: the class, the number of levels and
parameters, and the sum of all weights are the same in every line.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import sdconv

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


def describe(path: Path) -> str:
    """One line about the network in a file or folder."""
    network = sdconv.load(path)
    parameters = list(network.parameters())
    return (
        f"{path.name:24}{type(network).__name__:22}"
        f"{len(network.config.block_out_channels)} levels  "
        f"{sum(p.numel() for p in parameters) / 1e6:8.2f} M parameters  "
        f"sum {sum(p.double().sum() for p in parameters):.6f}"
    )


def write_layouts(folder: Path) -> list[Path]:
    """The small VAE as shipped, and written in both layouts."""
    shipped = WEIGHTS / "tiny-vae.safetensors"
    vae = sdconv.load(shipped)
    sdconv.save(vae, folder / "original.safetensors", layout="original")
    sdconv.save(vae, folder / "diffusers-folder", layout="diffusers")
    return [shipped, *sorted(folder.iterdir())]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(name) for name in sys.argv[1:]]
        for path in paths or write_layouts(Path(folder)):
            print(describe(path))


if __name__ == "__main__":
    try:
        main()
    except sdconv.SdconvError as error:  # says what is wrong, where, and what to do
        sys.exit(str(error))
