"""Features of a data set: what ``sdconv.capture`` reads at hook points, image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sdconv.config.facts import TRAIN_TIMESTEPS
from sdconv.dataset.decoding import Decoded, decode
from sdconv.dataset.encoder import (
    STORED,
    Weights,
    check_batch,
    computed_on,
    fingerprint,
    generator_for,
    in_any_folder,
    threads,
    to_batch,
)
from sdconv.dataset.headers import Rejected, rejection
from sdconv.dataset.plan import Plan
from sdconv.dataset.principal import PrincipalAxes
from sdconv.dataset.run import Options, Progress, Summary, make_dataset
from sdconv.dataset.store import Store
from sdconv.errors import InputError, SdconvError
from sdconv.features.capture import capture
from sdconv.features.conditions import conditions, scheduler_file
from sdconv.features.points import points_of
from sdconv.features.reduction import Reduction, reduction
from sdconv.features.selection import match_patterns
from sdconv.latents import encode, image_multiple, scale
from sdconv.loading import load
from sdconv.models.base import Autoencoder, Network
from sdconv.models.unet import UNet2DConditionModel

TOP = ":top"
"""Ends the names of tensors ``(C, 3)``: each channel's largest value, and its row and column."""

DECODING = ("decoder.", "post_quant_conv")


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """What a data set's features are.

    Attributes:
        points, exclude: hook points, as ``sdconv.capture`` takes them.
        timesteps: of a U-Net, 0 to 999: noise of each is added to the image's latents.
        reduce: as ``sdconv.capture`` takes it by name, or None for whole feature maps. ``"pca:3"``
            has the same axes for the whole data set, those of a sample of its images.
        seed: of the noise, which follows from it and the image's key.
        top: keep the place where each channel is largest, for ``top_patches``.
        dtype: that they are stored in. computed_in, backend: as in ``Settings``.
        batch: images that an autoencoder takes at once; a U-Net takes one.
    """

    points: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    timesteps: tuple[int, ...] = ()
    reduce: str | None = "mean"
    seed: int = 0
    top: bool = False
    dtype: str = "float16"
    computed_in: str = "float32"
    backend: str = "reference"
    batch: int = 1

    def __post_init__(self) -> None:
        reduction(self.reduce)  # refuses unknown names
        check_batch(self.batch)
        if self.dtype not in STORED:
            raise InputError(
                "unknown dtype", where="dtype", expected=", ".join(STORED), got=repr(self.dtype)
            )
        for timestep in self.timesteps:
            if not 0 <= timestep < TRAIN_TIMESTEPS:
                raise InputError(
                    "not a timestep",
                    where="timesteps",
                    expected=f"0 to {TRAIN_TIMESTEPS - 1}",
                    got=timestep,
                )


class FeatureExtractor:
    """Reads features of batches of images. It can be pickled: networks are loaded where they are
    first used.

    Args:
        model: files of an autoencoder or a U-Net, as ``sdconv.load`` takes them.
        settings: which features.
        vae: files of the autoencoder that encodes the images for a U-Net.
        component, family, device: as ``sdconv.load`` takes them.
        threads: see ``Encoder``.
    """

    def __init__(
        self,
        model: Weights,
        settings: FeatureSettings,
        *,
        vae: Weights | None = None,
        component: str | None = None,
        family: str | None = None,
        device: str = "cpu",
        threads: int | None = 1,
    ) -> None:
        self.model, self.settings, self.vae_files = model, settings, vae
        self.component, self.family = component, family
        self.device, self.threads = device, threads
        self.axes: dict[str, PrincipalAxes] = {}

    @property
    def batch(self) -> int:
        """The most images that are computed at once."""
        return self.settings.batch

    @cached_property
    def network(self) -> Network:
        """The network whose features are read.

        Raises:
            InputError: it takes timesteps and a VAE and got none, or the other way round.
            SdconvError: as ``sdconv.load``.
        """
        network = self._load(self.model, self.component)
        is_unet = isinstance(network, UNet2DConditionModel)
        for name, given in (("timesteps", self.settings.timesteps), ("vae", self.vae_files)):
            if bool(given) != is_unet:
                raise InputError(
                    "a U-Net needs timesteps, and a VAE that encodes the images"
                    if is_unet
                    else f"an autoencoder takes no {name}",
                    where=name,
                    got=given or "none",
                    hint="pass --timesteps 1,250,500 and --vae PATH" if is_unet else None,
                )
        return network

    @cached_property
    def vae(self) -> Autoencoder:
        """The autoencoder of the images.

        Raises:
            InputError: it has no encoder for colour images, or its latents do not fit the U-Net.
        """
        network = self.network
        if isinstance(network, UNet2DConditionModel):
            assert self.vae_files is not None
            vae = self._load(self.vae_files, "vae")
        else:
            vae = network
        if not isinstance(vae, Autoencoder) or getattr(vae, "encoder", None) is None:
            raise InputError(
                "images are encoded by an autoencoder with an encoder",
                where="vae" if self.vae_files else "model",
                got=vae.config.class_name,
            )
        channels = vae.config["latent_channels"]
        if network is not vae and network.config["out_channels"] != channels:
            raise InputError(
                "this autoencoder's latents do not fit the U-Net",
                where="vae",
                expected=f"{network.config['out_channels']} channels",
                got=channels,
            )
        return vae

    @property
    def multiple(self) -> int:
        """Of which the sides of the input must be."""
        return image_multiple(self.vae)

    def about(self) -> dict[str, Any]:
        """What decides the features: the networks and the settings."""
        network, vae = self.network, self.vae
        about = {"class": network.config.class_name, "sha256": fingerprint(network)}
        if network is not vae:
            about["vae_sha256"] = fingerprint(vae)
        return {"model": about, "features": {**asdict(self.settings), "names": self.names}}

    def prepare(self, store: Store, root: Path, plan: Plan) -> None:
        """With ``pca``, reads or finds the axes, which are the data set's."""
        name = self.settings.reduce or ""
        if not name.startswith("pca:") or not plan.images:
            return
        images = [one for shard in plan.shards for one in shard]
        step = -(-len(images) // PrincipalAxes.IMAGES)
        spread = images[::step] + [one for n, one in enumerate(images) if n % step]
        draft = (store.about() or {})["preprocessing"]["draft"]

        def whole() -> Iterator[Mapping[str, Tensor]]:
            decoded = (decode(root, planned, draft) for planned in spread)
            usable = (image for image in decoded if isinstance(image, Decoded))
            for image in islice(usable, PrincipalAxes.IMAGES):
                yield from self._captured([image], _whole)

        self.axes = PrincipalAxes.read_or_fit(store, int(name.partition(":")[2]), whole)

    def for_worker(self, number: int) -> FeatureExtractor:
        """The same work for one of several processes, on a GPU of its own if there are several."""
        other = copy(self)
        for name in ("network", "vae"):
            other.__dict__.pop(name, None)
        other.model = in_any_folder(self.model)
        if self.vae_files is not None:
            other.vae_files = in_any_folder(self.vae_files)
        if self.device == "cuda" and (count := torch.cuda.device_count()):
            other.device = f"cuda:{number % count}"
        return other

    @property
    def computed_on(self) -> dict[str, Any]:
        """The device, and on a CPU the threads: numbers differ by rounding on others."""
        return computed_on(self.device, self.threads)

    def facts(self, image: Decoded, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """What a sample's JSON says about its tensors."""
        return {
            "dtype": self.settings.dtype,
            "shapes": {name: list(one.shape) for name, one in tensors.items()},
        }

    def compute(self, images: Sequence[Decoded]) -> list[dict[str, Tensor] | Rejected]:
        """The features of each image by the names of the hook points, ``(C, H, W)`` unless they are
        reduced; a U-Net's names end in ``@`` and the timestep."""
        dtype = getattr(torch, self.settings.dtype)
        try:
            rows = self._captured(images, self._reduction)
            tops = self._captured(images, _largest_of) if self.settings.top else [{}] * len(rows)
        except InputError as error:
            return [Rejected("too small", rejection(error).detail)] * len(images)
        found: list[dict[str, Tensor] | Rejected] = []
        for row, top in zip(rows, tops, strict=True):
            tensors = {name: x.to(dtype).contiguous() for name, x in row.items()}
            tensors |= {name + TOP: x.float().contiguous() for name, x in top.items()}
            if all(torch.isfinite(x).all() for x in tensors.values()):
                found.append(tensors)
            else:
                words = f"its features hold NaN, infinity or values beyond {self.settings.dtype}"
                found.append(Rejected("not finite", words))
        return found

    def _captured(
        self, images: Sequence[Decoded], reduce: Callable[[str], Reduction | None]
    ) -> list[dict[str, Tensor]]:
        """The feature maps of each image, without a batch axis."""
        network = self.network
        names = self.names
        with torch.inference_mode(), threads(self.threads), ExitStack() as stack:
            captured = [
                stack.enter_context(capture(network, name, reduce=reduce(name), device="cpu"))
                for name in names
            ]
            if isinstance(network, UNet2DConditionModel):
                self._run_unet(network, images)
            else:
                self._run_autoencoder(network, images, names)
        rows: list[dict[str, Tensor]] = [{} for _ in images]
        for maps in captured:
            for name in maps:
                for call, one in enumerate(maps.series(name)):
                    image, step = divmod(call, len(self.settings.timesteps) or 1)
                    if self.settings.timesteps:
                        label = f"{name}@{self.settings.timesteps[step]}"
                        rows[image][label] = one.tensor[0]
                    else:
                        for row, x in zip(rows, one.tensor, strict=True):
                            row[name] = x
        return rows

    def _run_autoencoder(
        self, network: Network, images: Sequence[Decoded], names: Sequence[str]
    ) -> None:
        x = self._pixels(images)
        z = encode(cast(Autoencoder, network), x)
        if any(name.startswith(DECODING) for name in names):
            cast(Any, network).decode(z)

    def _run_unet(self, unet: UNet2DConditionModel, images: Sequence[Decoded]) -> None:
        from sdconv.integrations.schedule import Schedule  # imports diffusers

        files = [self.model] if isinstance(self.model, str | Path) else list(self.model)
        schedule = Schedule(1, scheduler_file([Path(one) for one in files]))
        for image in images:
            z = scale(self.vae, encode(self.vae, self._pixels([image]))).to(unet.dtype)
            generator = generator_for(self.settings.seed, image.planned.key)
            noise = torch.randn(z.shape, generator=generator).to(z.device, z.dtype)
            size = (z.shape[2], z.shape[3])
            arguments, _ = conditions(unet, size, self.settings.seed)
            for timestep in self.settings.timesteps:
                noisy = schedule.add_noise(z, noise, timestep)
                sample = torch.cat([noisy, arguments[0][:, z.shape[1] :]], 1)
                unet(sample, timestep, *arguments[2:])

    def _pixels(self, images: Sequence[Decoded]) -> Tensor:
        x = to_batch(np.stack([image.pixels for image in images]))
        return x.to(self.vae.device, self.vae.dtype)

    def _reduction(self, name: str) -> Reduction | None:
        if (self.settings.reduce or "").startswith("pca:"):
            return self.axes[name].project
        reduce = reduction(self.settings.reduce)
        return None if reduce is None else _of_point(name, reduce)

    @cached_property
    def names(self) -> list[str]:
        """The hook points that match, in the order of a run.

        Raises:
            InputError: a pattern matches none.
        """
        points = points_of(self.network)
        names = tuple(point.name for point in points if point.channels is not None)
        found = match_patterns(names, list(self.settings.points), list(self.settings.exclude))
        wanted = {name for some in found.values() for name in some}
        return [name for name in names if name in wanted]

    def _load(self, files: Weights, component: str | None) -> Network:
        return load(
            files,
            component,
            dtype=getattr(torch, self.settings.computed_in),
            device=self.device,
            family=self.family,
            backend=self.settings.backend,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name not in ("network", "vae")
        }


def _whole(name: str) -> None:
    """No reduction."""


def _largest_of(name: str) -> Reduction:
    return _of_point(name, _largest)


def _of_point(name: str, reduce: Reduction) -> Reduction:
    """The reduction, whose refusals are about the hook point and not about the image: they end the
    run."""

    def reduced(x: Tensor) -> Any:
        try:
            return reduce(x)
        except InputError as error:
            raise SdconvError(
                "its feature maps cannot be reduced in this way",
                where=name,
                got=" ".join(str(error).split()),
                hint=f"exclude it (--exclude '{name}'), or take another --reduce",
            ) from error

    return reduced


def _largest(x: Tensor) -> Tensor:
    """Each channel's largest value, and its row and column: ``(B, C, H, W)`` to ``(B, C, 3)``."""
    if x.ndim != 4:
        raise InputError(
            "only feature maps with rows and columns have places",
            where="top_patches",
            expected="(B, C, H, W)",
            got=tuple(x.shape),
            hint="exclude the points of transformers: --exclude '*attentions*'",
        )
    value, index = x.flatten(2).float().max(2)
    return torch.stack([value, index // x.shape[3], index % x.shape[3]], 2)


def features(
    source: str | Path,
    extractor: FeatureExtractor,
    out: str | Path,
    options: Options | None = None,
    *,
    progress: Progress = lambda *_: None,
) -> Summary:
    """Reads the features of a data set's images, or of those that are missing: as ``encode`` does
    it with latents.

    Raises:
        InputError, SdconvError: as ``encode``.
    """
    return make_dataset("features", source, out, extractor, options or Options(), progress)
