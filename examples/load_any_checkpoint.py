"""Opens checkpoints of any layout and says what they are.

    python examples/load_any_checkpoint.py [FILE_OR_FOLDER ...]

Without arguments: the small VAE as it ships, in the original layout, and as a folder in diffusers'.
One sees that each holds the same network: class, levels, parameters, and a sum over all weights
that is the same in every line.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import sdconv

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


def describe(path: Path) -> str:
    """One line on the network in a file or folder."""
    network = sdconv.load(path)
    parameters = list(network.parameters())
    return (
        f"{path.name:24}{type(network).__name__:22}"
        f"{len(network.config.block_out_channels)} levels  "
        f"{sum(p.numel() for p in parameters) / 1e6:8.2f} M parameters  "
        f"sum {sum(p.double().sum() for p in parameters):.6f}"
    )


def the_small_vae_three_times(folder: Path) -> list[Path]:
    shipped = WEIGHTS / "tiny-vae.safetensors"
    vae = sdconv.load(shipped)
    sdconv.save(vae, folder / "original.safetensors", layout="original")
    sdconv.save(vae, folder / "diffusers-folder", layout="diffusers")
    return [shipped, *sorted(folder.iterdir())]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(name) for name in sys.argv[1:]]
        for path in paths or the_small_vae_three_times(Path(folder)):
            print(describe(path))


if __name__ == "__main__":
    try:
        main()
    except sdconv.SdconvError as error:  # what is wrong, where, and what to do
        sys.exit(str(error))
