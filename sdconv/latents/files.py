"""Files of latents: what a file says of them, and what a decoder takes."""

from __future__ import annotations

import json
import math
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdconv.checkpoint.io.files import as_path, os_errors, short
from sdconv.checkpoint.io.source import Source, open_source
from sdconv.checkpoint.io.tensor_files import TensorsFile
from sdconv.checkpoint.io.write import write_tensors
from sdconv.config.facts import VAE_FACTS
from sdconv.errors import CheckpointError, InputError, SdconvWarning
from sdconv.latents.scales import LatentScale, check_scaled, unscale
from sdconv.models.base import Autoencoder
from sdconv.models.tiny import AutoencoderTiny

KEY = "latents"
"""The tensor's name in files that `write_latents` writes."""

SCALED_KEY = "sdconv.latents"
"""The metadata key in such files whose value is ``scaled`` or ``raw``."""

SCALE_KEY = "sdconv.latents.scale"
"""The metadata key for the scale of the VAE that the latents come from, in JSON: see
``LatentScale``."""

IMAGE_KEY = "sdconv.latents.image"
"""The metadata key for the rows and columns of the image that was encoded, ``37x50``, before it was
padded."""

ALPHA = "alpha"
"""The name of that image's alpha channel in such files, ``(rows, columns)`` in uint8."""


@dataclass(frozen=True, eq=False)
class StoredLatents:
    """Latents from a file.

    ``values``: ``(B, C, h, w)`` in float32. ``scaled``: True if they are scaled, False if raw, None
    if the file does not say. ``made_by``: the scale of the VAE that they come from, if the file
    says so. ``image_size``: the rows and columns of the image that they are of, if the file says
    so. ``alpha``: its alpha channel, ``(rows, columns)`` in uint8, if the file has it.
    """

    values: Tensor
    scaled: bool | None
    made_by: LatentScale | None = None
    image_size: tuple[int, int] | None = None
    alpha: Tensor | None = None

    def for_decoder(
        self, network: Autoencoder, scaled: bool | None = None, family: str | None = None
    ) -> Tensor:
        """What ``network.decode`` takes.

        Args:
            network: any autoencoder.
            scaled: whether they are scaled, where the file does not say; None: raw for a VAE, and
                scaled for a tiny autoencoder.
            family: that of the VAE which raw latents come from (``"sd1"``, ``"sdxl"``, ...), or
                of the tiny autoencoder (``"taesdxl"``), where the file does not say it; only a tiny
                autoencoder asks.

        Raises:
            InputError: they cannot be related to this network: other channels; raw ones of an
                unknown VAE for a tiny autoencoder; scaled by another VAE's scale.

        Warns:
            SdconvWarning: raw latents of a VAE with another scale.
        """
        form = self.scaled if self.scaled is not None else scaled
        if isinstance(network, AutoencoderTiny):
            if form is not False:
                return unscale(network, self.values)
            return unscale(network, self._scaled(network.config.class_name, family))
        check_scaled(network, self.values, bool(form))
        own = LatentScale.of(network)
        other = self.made_by is not None and own is not None and self.made_by != own
        if other and form:
            raise InputError(
                "these latents were scaled for another VAE",
                where=network.config.class_name,
                expected=own,
                got=self.made_by,
                hint="open the VAE that they come from, or say its family (--family, family=)",
            )
        if other:
            what = f"these raw latents come from a VAE with {self.made_by}; this one has {own}"
            hint = "colours are wrong if it is another VAE"
            warnings.warn(SdconvWarning(f"{what}. hint: {hint}"), stacklevel=2)
        return unscale(network, self.values) if form else self.values

    def for_diffusion(self, where: object, family: str | None = None) -> Tensor:
        """The scaled latents, as a diffusion model takes them.

        Args:
            where: what takes them, for messages.
            family: as for ``for_decoder``.

        Raises:
            InputError: they are raw, and neither the file nor the family says their scale.
        """
        return self.values if self.scaled is not False else self._scaled(where, family)

    def _scaled(self, where: object, family: str | None) -> Tensor:
        """Raw latents, scaled as the file or else the family says."""
        by_family = None if family is None else _scale_of(family, self.values.shape[1])
        scale = self.made_by or by_family
        if scale is None:
            fitting = " or ".join(_families_with(self.values.shape[1]))
            raise InputError(
                "these latents are raw, and their file does not say of which VAE they are, which "
                "decides how they are scaled",
                where=where,
                expected="scaled latents, or a file that names the scale, as `sdconv encode` does",
                hint=f"pass family= to say it: {fitting}"
                if fitting
                else "write them with `sdconv encode --scaled`",
            )
        if by_family is not None and (by_family.factor, by_family.shift) != (
            scale.factor,
            scale.shift,
        ):
            raise InputError(
                "the file of these latents names the scale of another family",
                where="family",
                expected=scale,
                got=f"{family}: {by_family}",
                hint="leave family= out",
            )
        return scale.scale(self.values)


# the family whose latents a tiny autoencoder takes
_OF_TINY: Mapping[str, str] = {
    "taesd": "sd1",
    "taesdxl": "sdxl",
    "taesd3": "sd3",
    "taef1": "flux1",
}


def _families_with(channels: int) -> list[str]:
    return [name for name, facts in VAE_FACTS.items() if facts.latent_channels == channels]


def _scale_of(family: str, channels: int) -> LatentScale:
    fitting = _families_with(channels)
    name = _OF_TINY.get(family, family)
    if name not in fitting:
        raise InputError(
            f"the family {family!r} has no known scale for latents with {channels} channels",
            where="family",
            expected=", ".join(fitting) or "none is known",
            got=repr(family),
        )
    facts = VAE_FACTS[name]
    shift = facts.shift_factor or 0.0
    return LatentScale(facts.scaling_factor, shift, facts.latents_mean, facts.latents_std)


def read_latents(path: str | Path, key: str | None = None) -> tuple[Tensor, bool | None]:
    """Read latents, and whether they are scaled, from a file: see ``read_stored``."""
    stored = read_stored(path, key)
    return stored.values, stored.scaled


def read_stored(path: str | Path, key: str | None = None) -> StoredLatents:
    """Read latents from a file.

    Files of ComfyUI (``.latent``) are raw; old ones, without its mark, were multiplied by 0.18215
    and are divided by it. sd-scripts' ``.npz`` are raw, except for FLUX.1's (``NAME_flux.npz``).

    Args:
        path: a safetensors file, a pickle of tensors or of one tensor, or numpy's ``.npz`` or
            ``.npy``.
        key: the tensor's name; None for the only tensor, the one named ``latents``,
            ``latent_tensor`` or ``samples``, sd-scripts' ``latents_32x64``, or the only one with
            four axes.

    Returns:
        The latents, ``(B, C, h, w)`` (a single ``(C, h, w)`` gets a batch axis).

    Raises:
        CheckpointError: the file cannot be read.
        InputError: there is no such tensor, or it is not clear which one; or it is not of floating
            point, not of this shape or not finite.
    """
    with _opened(as_path(path)) as source:
        names = list(source.entries)
        if key is None:
            key = _latents_among({name: info.shape for name, info in source.entries.items()})
        if key not in names:
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise InputError(
                "which tensor holds the latents?",
                where=path,
                expected=f"one tensor, or one named {key!r}",
                got=f"{len(names)} tensors: {shown}",
                hint="name it: --key NAME",
            )
        latents = source.tensor(key)
        form, made_by = source.metadata.get(SCALED_KEY), _made_by(source.metadata, path)
        image_size = _image_size(source.metadata, path)
        alpha = source.tensor(ALPHA).clone() if ALPHA in names and key != ALPHA else None
        if image_size is None or alpha is None or tuple(alpha.shape) != image_size:
            alpha = None
    scaled = None if form is None else form == "scaled"
    if form is None and as_path(path).suffix.lower() == ".npz":
        scaled = False if not as_path(path).stem.endswith("_flux") else None
    latents = latents[None] if latents.ndim == 3 else latents
    if latents.ndim != 4 or not latents.is_floating_point() or not latents.numel():
        raise InputError(
            "not latents",
            where=f"{path}: {key}",
            expected="floating-point numbers of shape (B, C, h, w) or (C, h, w)",
            got=f"{str(latents.dtype).removeprefix('torch.')} {tuple(latents.shape)}",
            hint="name another tensor: --key NAME" if len(names) > 1 else None,
        )
    latents = latents.float()
    if not torch.isfinite(latents).all():
        raise InputError("the latents hold NaN or infinity", where=f"{path}: {key}")
    if form is None and key == _COMFYUI:
        if others := [one for one in names if one.startswith(_VERSION) and one != _COMFYUI_RAW]:
            raise InputError(
                "latents in a format of ComfyUI that sdconv does not know",
                where=path,
                expected=f"{_COMFYUI_RAW}, or no mark",
                got=", ".join(others),
                hint="write them again with `sdconv encode`",
            )
        if _COMFYUI_RAW not in names:
            latents, made_by = latents * (1 / _SD_FACTOR), LatentScale(_SD_FACTOR)
        scaled = False
    elif form is None and key == "samples" and "noise_mask" in names:  # ComfyUI's latents
        scaled = False
    return StoredLatents(latents, scaled, made_by, image_size, alpha)


def _opened(path: Path) -> Source:
    """Opens a file of latents; numpy's too."""
    if path.suffix.lower() not in (".npz", ".npy"):
        return open_source(path)
    with os_errors(path), path.open("rb") as file:
        try:
            content = np.load(file, allow_pickle=False)
            arrays = dict(content) if isinstance(content, Mapping) else {KEY: content}
            tensors = {name: torch.from_numpy(np.asarray(one)) for name, one in arrays.items()}
        except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                "cannot be read as numpy's arrays", where=path, got=short(str(error))
            ) from error
    return Source(str(path), [TensorsFile(str(path), tensors)])


def _latents_among(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The name of the tensor that holds latents, ``KEY`` if that is open."""
    if len(shapes) == 1:
        return next(iter(shapes))
    known = [name for name in (KEY, _COMFYUI, "samples") if name in shapes]
    known += [name for name in shapes if _KOHYA.fullmatch(name)]
    images = [name for name, shape in shapes.items() if len(shape) == 4]
    return known[0] if known else images[0] if len(images) == 1 else KEY


# the tensor in ComfyUI's files, and the empty one that marks those in its present format
_COMFYUI, _VERSION = "latent_tensor", "latent_format_version_"
_COMFYUI_RAW = f"{_VERSION}0"
# the tensor in sd-scripts' files
_KOHYA = re.compile(r"latents_[0-9]+x[0-9]+")
# by which ComfyUI multiplied before, whatever the family
_SD_FACTOR = VAE_FACTS["sd1"].scaling_factor


def _made_by(metadata: Mapping[str, str], path: object) -> LatentScale | None:
    text = metadata.get(SCALE_KEY)
    if text is None:
        return None
    try:
        given = json.loads(text)
        lists = (given.get("mean"), given.get("std"))
        mean, std = (None if one is None else tuple(map(float, one)) for one in lists)
        scale = LatentScale(float(given["factor"]), float(given.get("shift", 0.0)), mean, std)
        numbers = (scale.factor, scale.shift, *(mean or ()), *(std or ()))
        if not all(map(math.isfinite, numbers)) or 0.0 in (scale.factor, *(std or ())):
            raise ValueError(text)
        if (mean is None) != (std is None):
            raise ValueError(text)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise InputError(
            f"its metadata {SCALE_KEY} is not a latent scale",
            where=path,
            expected='{"factor": 0.18215, "shift": 0.0}',
            got=short(text),
        ) from error
    return scale


def _image_size(metadata: Mapping[str, str], path: object) -> tuple[int, int] | None:
    text = metadata.get(IMAGE_KEY)
    if text is None:
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})", text)
    if match is None:
        raise InputError(
            f"its metadata {IMAGE_KEY} is not an image's size",
            where=path,
            expected="rows and columns, such as 480x640",
            got=short(text),
        )
    return int(match[1]), int(match[2])


def write_latents(
    latents: Tensor,
    path: str | Path,
    *,
    scaled: bool,
    network: Autoencoder | None = None,
    image_size: tuple[int, int] | None = None,
    alpha: Tensor | None = None,
) -> None:
    """Write a safetensors file with one tensor, ``KEY``, completely or not at all.

    Args:
        latents: ``(B, C, h, w)``.
        path: the file.
        scaled: whether they are scaled, as a tiny autoencoder's always are.
        network: the autoencoder that they come from, whose scale is written too.
        image_size: the rows and columns of the image before it was padded, so that what is decoded
            can be cut to them.
        alpha: that image's alpha channel, ``(rows, columns)`` in uint8.

    Raises:
        InputError: ``path`` is not a path.
        CheckpointError: the file cannot be written.
    """
    metadata = {"format": "pt", SCALED_KEY: "scaled" if scaled else "raw"}
    made_by = None if network is None else LatentScale.of(network)
    if made_by is not None:
        given = {name: value for name, value in asdict(made_by).items() if value is not None}
        metadata[SCALE_KEY] = json.dumps(given)
    if image_size is not None:
        metadata[IMAGE_KEY] = "{}x{}".format(*image_size)
    tensors = {KEY: latents.cpu()} if alpha is None else {KEY: latents.cpu(), ALPHA: alpha}
    write_tensors(tensors, as_path(path), metadata)
