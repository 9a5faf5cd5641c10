"""The family that a file's metadata names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# where it may stand: modelspec's own key, and that of kohya's training scripts
_KEYS = ("modelspec.architecture", "ss_base_model_version")

# beginnings of modelspec.architecture, the most specific first
_WORDS: Sequence[tuple[str, str]] = (
    ("stable-diffusion-xl-v1-refiner", "sdxl-refiner"),
    ("stable-diffusion-xl", "sdxl"),
    ("sdxl", "sdxl"),
    ("stable-diffusion-v3", "sd3"),
    ("stable-diffusion-3", "sd3"),
    ("sd3", "sd3"),
    ("flux", "flux1"),
    ("stable-diffusion-v2", "sd2"),
    ("sd_v2", "sd2"),
    ("stable-diffusion-v1", "sd1"),
    ("sd_v1", "sd1"),
    ("playground-v2.5", "playground-v2.5"),
)


def family_in(metadata: Mapping[str, str]) -> str | None:
    """The family; None if the metadata names none that sdconv knows."""
    return _named(metadata)[0]


def spoken(metadata: Mapping[str, str]) -> str:
    """What names the family, as ``modelspec.architecture = ...``; empty if nothing does."""
    return _named(metadata)[1]


def _named(metadata: Mapping[str, str]) -> tuple[str | None, str]:
    for key in _KEYS:
        said = metadata.get(key, "")
        for word, named in _WORDS:
            if said.lower().startswith(word):
                return named, f"{key} = {said}"
    return None, ""
