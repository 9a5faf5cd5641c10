"""The work on a batch of images: pixels in, latents out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdconv.dataset.decoding import Decoded
from sdconv.dataset.headers import Rejected, rejection
from sdconv.dataset.plan import Plan
from sdconv.dataset.store import Store
from sdconv.errors import InputError
from sdconv.latents import LatentScale, image_multiple, scale, scale_log_variance
from sdconv.loading import load
from sdconv.models.base import Autoencoder, Network
from sdconv.models.image_inputs import check_unmasked
from sdconv.models.tiny import AutoencoderTiny

KINDS = ("moments", "mean", "sample")
STORED = ("float32", "float16", "bfloat16")
Weights = str | Path | Sequence[str | Path]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a data set's latents are.

    Attributes:
        latents: ``"moments"`` (mean and log-variance), ``"mean"``, or ``"sample"``, drawn with
            noise that follows from ``seed`` and the image's key.
        seed: of the samples.
        scaled: as the diffusion model sees them, instead of raw; a tiny autoencoder's always are.
        flip: encode the mirror image too.
        dtype: that they are stored in.
        computed_in: the network's dtype. backend: see ``sdconv.backend``.
        batch: images that are encoded at once. With 1, latents are equal bit for bit to those of
            one image alone; more are faster on a GPU, and differ by rounding.
    """

    latents: str = "moments"
    seed: int = 0
    scaled: bool = False
    flip: bool = False
    dtype: str = "float32"
    computed_in: str = "float32"
    backend: str = "reference"
    batch: int = 1

    def __post_init__(self) -> None:
        _among("latents", self.latents, KINDS)
        _among("dtype", self.dtype, STORED)
        check_batch(self.batch)


class Encoder:
    """Encodes batches of images. It can be pickled: the network is loaded where it is first used.

    As a function of a batch it fits ``ray.data.Dataset.map_batches``.

    Args:
        model: files of the autoencoder, as ``sdconv.load`` takes them.
        settings: what the latents are.
        component, family, device: as ``sdconv.load`` takes them.
        threads: of the CPU, while it computes; None for torch's. The numbers of one thread are the
            same however many processes share the work.
    """

    def __init__(
        self,
        model: Weights,
        settings: Settings | None = None,
        *,
        component: str | None = None,
        family: str | None = None,
        device: str = "cpu",
        threads: int | None = 1,
    ) -> None:
        self.model, self.settings = model, settings or Settings()
        self.component, self.family = component, family
        self.device, self.threads = device, threads

    @cached_property
    def network(self) -> Autoencoder:
        """The autoencoder, in eval mode.

        Raises:
            InputError: it is not one, or cannot do what the settings ask for.
            SdconvError: as ``sdconv.load``.
        """
        network = load(
            self.model,
            self.component or "vae",
            dtype=getattr(torch, self.settings.computed_in),
            device=self.device,
            family=self.family,
            backend=self.settings.backend,
        )
        if not isinstance(network, Autoencoder) or getattr(network, "encoder", None) is None:
            raise InputError(
                "images are encoded by an autoencoder with an encoder",
                where="model",
                got=network.config.class_name,
            )
        if network.config["in_channels"] != 3:
            raise InputError(
                "this network does not take colour images",
                where=network.config.class_name,
                expected="3 channels",
                got=network.config["in_channels"],
            )
        if isinstance(network, AutoencoderTiny) and self.settings.latents != "mean":
            raise InputError(
                "a tiny autoencoder has no posterior",
                where="latents",
                expected="mean",
                got=self.settings.latents,
                hint="pass latents='mean'",
            )
        return network

    @property
    def batch(self) -> int:
        """The most images that are encoded at once."""
        return self.settings.batch

    @property
    def multiple(self) -> int:
        """Of which the sides of the input must be."""
        return image_multiple(self.network, scaled=self.settings.scaled)

    def about(self) -> dict[str, Any]:
        """What decides the latents: the network and the settings."""
        made_by = LatentScale.of(self.network)
        return {
            "model": {"class": self.network.config.class_name, "sha256": fingerprint(self.network)},
            "latents": {
                **asdict(self.settings),
                "scaled": self.is_scaled,
                "channels": self.network.config["latent_channels"],
                "scale": None if made_by is None else asdict(made_by),
            },
        }

    @property
    def is_scaled(self) -> bool:
        """Whether the latents are scaled."""
        return self.settings.scaled or isinstance(self.network, AutoencoderTiny)

    @property
    def computed_on(self) -> dict[str, Any]:
        """The device, and on a CPU the threads: numbers differ by rounding on others."""
        return computed_on(self.device, self.threads)

    def facts(self, image: Decoded, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """What a sample's JSON says about its tensors."""
        return {
            "latents": self.settings.latents,
            "scaled": self.is_scaled,
            "dtype": self.settings.dtype,
            "shape": list(next(iter(tensors.values())).shape),
        }

    def compute(self, images: Sequence[Decoded]) -> list[dict[str, Tensor] | Rejected]:
        """The tensors of each image, ``(C, h, w)``: ``mean`` and ``logvar``, or ``latents``; with
        ``flip`` also these of the mirror image, with ``_flipped`` at the end of their names.

        Args:
            images: of one size.
        """
        keys = [image.planned.key for image in images]
        pixels = np.stack([image.pixels for image in images])
        if not self.settings.flip:
            return self.encode(pixels, keys)
        return self._both(pixels, np.stack([image.mirrored for image in images]), keys)

    def encode(self, pixels: np.ndarray, keys: Sequence[str]) -> list[dict[str, Tensor] | Rejected]:
        """The tensors of each image.

        Args:
            pixels: ``(B, H, W, 3)``, uint8. keys: of the images, for their noise.
        """
        network = self.network
        x = to_batch(pixels)
        try:
            with torch.inference_mode(), threads(self.threads):
                output = network.encode(x.to(network.device, network.dtype))
                tensors = self._tensors(output, keys)
        except InputError as error:
            return [Rejected("too small", rejection(error).detail)] * len(keys)
        dtype = getattr(torch, self.settings.dtype)
        tensors = {name: one.to(dtype).cpu().contiguous() for name, one in tensors.items()}
        return [_finite({name: x[row] for name, x in tensors.items()}) for row in range(len(keys))]

    def _both(
        self, pixels: np.ndarray, mirrored: np.ndarray, keys: Sequence[str]
    ) -> list[dict[str, Tensor] | Rejected]:
        """The tensors of images and their mirror images; without one of them, an image has none."""
        found: list[dict[str, Tensor] | Rejected] = []
        pairs = zip(self.encode(pixels, keys), self.encode(mirrored, keys), strict=True)
        for one, other in pairs:
            if isinstance(one, Rejected) or isinstance(other, Rejected):
                found.append(one if isinstance(one, Rejected) else other)
            else:
                found.append(one | {f"{name}_flipped": x for name, x in other.items()})
        return found

    def _tensors(self, output: Any, keys: Sequence[str]) -> dict[str, Tensor]:
        if isinstance(self.network, AutoencoderTiny):
            return {"latents": output.latents.float()}
        posterior, kind = output.latent_dist, self.settings.latents
        if kind == "moments":
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            if self.settings.scaled:
                logvar = scale_log_variance(self.network, logvar)
                mean = scale(self.network, mean)
            return {"mean": mean, "logvar": logvar}
        latents = posterior.mode()
        if kind == "sample":
            seeds = [generator_for(self.settings.seed, key) for key in keys]
            latents = posterior.sample(seeds)
        latents = latents.float()
        return {"latents": scale(self.network, latents) if self.settings.scaled else latents}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Encodes a batch of Ray Data or of any other mapping of columns.

        Args:
            batch: ``image``: uint8 arrays ``(H, W, 3)`` of one or several sizes, whose sides are
                multiples of ``multiple``; ``key``: their names. Other columns are kept.

        Raises:
            InputError: an image is not one of bytes.

        Returns:
            The columns without ``image``, and those of ``compute``, numpy arrays; in an ``error``
            column why an image has none, or an empty string.
        """
        keys = [str(key) for key in batch["key"]]
        columns: dict[str, Any] = {name: batch[name] for name in batch if name != "image"}
        rows: list[dict[str, Tensor] | Rejected] = []
        for key, image in zip(keys, batch["image"], strict=True):
            pixels = _pixels(image, key)[None]
            if self.settings.flip:
                rows += self._both(pixels, pixels[:, :, ::-1], [key])
            else:
                rows += self.encode(pixels, [key])
        names = {name for row in rows if isinstance(row, dict) for name in row}
        for name in sorted(names):
            column = np.empty(len(rows), dtype=object)
            for at, row in enumerate(rows):
                column[at] = row[name].float().numpy() if isinstance(row, dict) else None
            columns[name] = column
        columns["error"] = np.array([r.detail if isinstance(r, Rejected) else "" for r in rows])
        return columns

    def prepare(self, store: Store, root: Path, plan: Plan) -> None:
        """Nothing has to be known of all images before one can be encoded."""

    def for_worker(self, number: int) -> Encoder:
        """The same work for one of several processes, on a GPU of its own if there are several."""
        other = copy(self)
        other.__dict__.pop("network", None)
        other.model = in_any_folder(self.model)
        if self.device == "cuda" and (count := torch.cuda.device_count()):
            other.device = f"cuda:{number % count}"
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "network"}


def computed_on(device: str, threads: int | None) -> dict[str, Any]:
    """The kind of device, and on a CPU the threads."""
    kind = device.partition(":")[0]
    return {"device": kind, "threads": threads if kind == "cpu" else None}


def in_any_folder(files: Weights) -> Weights:
    """Files of a network as a process in another folder finds them; names stay names."""
    if isinstance(files, str | Path):
        return Path(files).absolute() if Path(files).exists() else files
    return [Path(one).absolute() if Path(one).exists() else one for one in files]


def to_batch(pixels: np.ndarray) -> Tensor:
    """Images ``(B, H, W, 3)``, uint8, as ``(B, 3, H, W)`` in [-1, 1], float32."""
    # contiguous: with channels last, convolutions round in another way
    x = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).contiguous()
    return x.float() / 127.5 - 1


def fingerprint(network: Network) -> str:
    """SHA-256 of a network's config and weights, in the dtype that it computes in."""
    found = hashlib.sha256(repr(sorted(network.config.to_json().items())).encode())
    for name, tensor in sorted(network.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        found.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        found.update(values.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def generator_for(seed: int, key: str) -> torch.Generator:
    """A generator on the CPU whose numbers follow from a seed and a key."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Lets torch compute with so many threads of the CPU."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _finite(tensors: dict[str, Tensor]) -> dict[str, Tensor] | Rejected:
    if all(torch.isfinite(one).all() for one in tensors.values()):
        return tensors
    return Rejected("not finite", "its latents hold NaN or infinity; compute in a wider dtype")


def check_batch(batch: int) -> None:
    """Refuses a number of images below 1.

    Raises:
        InputError: it is.
    """
    if batch < 1:
        raise InputError("not a batch", where="batch", expected="1 or more", got=batch)


def _among(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(
            f"unknown {name}", where=name, expected=", ".join(allowed), got=repr(value)
        )


def _pixels(image: Any, key: str) -> np.ndarray[Any, Any]:
    """An image as uint8, of which no value changes."""
    check_unmasked(image, key)
    given = np.asarray(image)
    with np.errstate(invalid="ignore"):
        pixels = given.astype(np.uint8)
    if not np.array_equal(pixels, given):
        raise InputError(
            "an image has values that are not bytes",
            where=key,
            expected="uint8 from 0 to 255",
            got=f"{given.dtype} from {given.min():g} to {given.max():g}",
            hint="scale the values, and round them: (image * 255).round().astype('uint8')",
        )
    return pixels
