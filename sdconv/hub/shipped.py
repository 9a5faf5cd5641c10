"""The small files that ship with sdconv."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

SHIPPED = ("tiny-vae", "tiny-unet")
"""The small trained networks that ship with sdconv; ``weights/README.md`` is their card."""


def shipped(file: str) -> Path:
    """The path of a file that ships with sdconv: in the installed package, or in the checkout.

    Args:
        file: ``"manifest.toml"``, ``"photo.jpg"``, or a network such as ``"tiny-vae.safetensors"``.
    """
    packaged = Path(str(resources.files("sdconv"))) / "data" / file
    checkout = Path(__file__).parents[2] / "weights" / file
    return packaged if packaged.is_file() else checkout
