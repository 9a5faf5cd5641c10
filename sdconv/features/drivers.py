"""What passes through a network when its feature maps are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sdconv.cli.common import Dtype, one_or_all
from sdconv.cli.running import check_patches, fits, has_room
from sdconv.errors import InputError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from sdconv.images import Picture
    from sdconv.models.base import Autoencoder, Network
    from sdconv.models.unet import UNet2DConditionModel

LATENT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_UNITS = (
    16  # a text of no more channels is no text encoder's: the tiny U-Net's tokens are unit vectors
)
_PIXELS = 8  # of a picture to one latent, in every family whose U-Net is known


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the caller gave.

    ``source``: a picture or a file of latents, None for noise. ``key``: the latents' name in their
    file, None for the only tensor there. ``vae``: files of the autoencoder that turns a picture
    into a U-Net's latents. ``size``: pixels of the longer side.
    """

    source: Path | None
    key: str | None
    model: Sequence[Path]
    vae: Sequence[Path]
    component: str | None
    family: str | None
    dtype: Dtype
    device: str
    size: int | None
    steps: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A network and what will pass through it.

    ``size``: rows and columns of its input. ``halves``: those of an autoencoder that are run.
    ``calls``: each runs the network once. ``facts``: label -> words. ``notes``: choices made.
    """

    network: Network
    size: tuple[int, int]
    halves: tuple[str, ...]
    calls: Sequence[Callable[[], object]]
    facts: dict[str, str]
    notes: tuple[str, ...]
    picture: Image.Image | None


def passage(given: Given) -> Passage:
    """What is to be run, with every complaint about the input made.

    Raises:
        SdconvError: as ``sdconv.load``, ``read_image`` and ``read_latents``; or the input is not
            one for this network.
    """
    from sdconv.images import read_image
    from sdconv.loading import load
    from sdconv.models.base import Autoencoder

    pictured = given.source is not None and given.source.suffix.lower() not in LATENT_SUFFIXES
    # before the weights, which take longer
    picture = read_image(given.source) if given.source is not None and pictured else None
    network = load(
        one_or_all(given.model),
        given.component,
        dtype=given.dtype.in_torch(),
        device=given.device,
        family=given.family,
    )
    if isinstance(network, Autoencoder):
        return _through_autoencoder(network, given, picture)
    return _through_unet(cast("UNet2DConditionModel", network), given, picture)


def _through_autoencoder(network: Autoencoder, given: Given, picture: Picture | None) -> Passage:
    from sdconv.images import to_tensor

    if given.source is None:
        raise InputError(
            "an autoencoder makes nothing of noise",
            where="--noise",
            expected="a picture or a file of latents",
            hint="leave --noise out, or give a U-Net with --model",
        )
    if picture is None:
        z = _latents(network, given.source, given.key)
        return Passage(
            network=network,
            size=_times(z, network.downscale),
            halves=("decode",),
            calls=[lambda: network.decode(z)],  # type: ignore[operator]
            facts={"input": f"{given.source.name}, latents {_shape(z)}"},
            notes=(),
            picture=None,
        )
    picture = picture.fitted(network.downscale, given.size)
    has_room(network, picture.image.size[::-1], options=("size", "dtype"))
    x = to_tensor(picture.image).to(network.device, network.dtype)
    there = [half for half in ("encode", "decode") if getattr(network, f"{half}r", None)]

    def run() -> None:
        result = network.encode(x)  # type: ignore[operator]
        if "decode" in there:
            z = result.latents if hasattr(result, "latents") else result.latent_dist.mode()
            network.decode(z)  # type: ignore[operator]

    return Passage(
        network=network,
        size=(x.shape[2], x.shape[3]),
        halves=tuple(there),
        calls=[run],
        facts={"input": f"{given.source.name}, {x.shape[2]} \u00d7 {x.shape[3]}"},
        notes=picture.notes,
        picture=picture.image,
    )


def _through_unet(unet: UNet2DConditionModel, given: Given, picture: Picture | None) -> Passage:
    import torch

    from sdconv.integrations.schedule import Schedule

    config = _scheduler_file(given.model)
    schedule = Schedule(given.steps, config)
    random = torch.Generator().manual_seed(given.seed)
    z, shown, notes = _to_noise(unet, given, picture)
    channels = unet.config.out_channels
    if z is None:
        shape = (1, channels, *_sides(unet, given.size))
    else:
        shape = (1, channels, z.shape[2], z.shape[3])
    if unet.device.type == "cpu":
        places = shape[2] * shape[3]
        least = unet.config.block_out_channels[0] * places * unet.dtype.itemsize
        sized = given.source is None or picture is not None
        fits(least, f"latents {shape[2]}x{shape[3]}", ("size", "dtype") if sized else ("dtype",))
    noise = torch.randn(shape, generator=random).to(unet.device, unet.dtype)
    arguments, words = _conditions(unet, shape[2:], given.seed)
    latents = noise  # of the run from noise, step by step

    def call(timestep: int) -> None:
        nonlocal latents
        sample = latents if z is None else schedule.add_noise(z, noise, timestep)
        given_ = torch.cat([sample, arguments[0][:, channels:]], 1)
        predicted = unet(given_, timestep, *arguments[2:]).sample
        if z is None:
            latents = schedule.step(predicted, timestep, latents)

    source = "noise" if given.source is None else given.source.name
    how = "denoised" if z is None else "with noise, each timestep by itself"
    trained = "the pipeline's" if config else "Stable Diffusion's"
    notes += (words, f"the noise schedule is {trained}, the prediction {schedule.prediction_type}")
    return Passage(
        network=unet,
        size=(shape[2], shape[3]),
        halves=(),
        calls=[lambda timestep=t: call(timestep) for t in schedule.timesteps],  # type: ignore[misc]
        facts={
            "input": f"{source}, latents {_shape(noise)}, {how}",
            "timesteps": f"{given.steps}, seed {given.seed}",
        },
        notes=notes,
        picture=shown,
    )


def _sides(unet: UNet2DConditionModel, size: int | None) -> tuple[int, int]:
    """Rows and columns of the latents for a picture of so many pixels, or of the usual one."""
    if size is not None:
        return max(size // _PIXELS, 1), max(size // _PIXELS, 1)
    usual = unet.config.sample_size or 64
    return (usual, usual) if isinstance(usual, int) else usual


def _to_noise(
    unet: UNet2DConditionModel, given: Given, picture: Picture | None
) -> tuple[Tensor | None, Image.Image | None, tuple[str, ...]]:
    """The latents to which noise is added, None for none; the picture that they are of; notes."""
    import torch

    from sdconv.images import to_tensor
    from sdconv.latents import read_latents, scale

    channels = unet.config.out_channels
    if given.source is None:
        return None, None, ()
    if picture is None:
        z, scaled = read_latents(given.source, given.key)
        if z.shape[1] != channels:
            raise InputError(
                "latents of another number of channels than this U-Net's",
                where=given.source,
                expected=f"(B, {channels}, h, w)",
                got=tuple(z.shape),
            )
        if scaled is False:
            raise InputError(
                "these latents are raw, and a U-Net reads scaled ones",
                where=given.source,
                hint="write them with `sdconv encode --scaled`",
            )
        return z[:1].to(unet.device, unet.dtype), None, ()
    if not given.vae:
        raise InputError(
            "a U-Net reads latents, not pictures",
            where=given.source,
            hint="name the autoencoder that makes them: --vae PATH; or give --noise",
        )
    from sdconv.cli.running import Means, opened

    vae = opened(given.vae, Means(None, given.family, given.dtype, given.device))
    picture = picture.fitted(vae.downscale, given.size)
    has_room(vae, picture.image.size[::-1], options=("size", "dtype"))
    with torch.inference_mode():
        result = vae.encode(to_tensor(picture.image).to(vae.device, vae.dtype))  # type: ignore[operator]
        raw = result.latents if hasattr(result, "latents") else result.latent_dist.mode()
        z = scale(vae, raw)
    if z.shape[1] != channels:
        raise InputError(
            "this autoencoder's latents are not those of the U-Net",
            where="--vae",
            expected=f"{channels} channels",
            got=z.shape[1],
        )
    return z.to(unet.dtype), picture.image, picture.notes


def _conditions(
    unet: UNet2DConditionModel, size: tuple[int, int], seed: int
) -> tuple[list[Any], str]:
    """What a U-Net is told beside latents and timestep, by position after these; and in words."""
    import torch

    from sdconv.models.dummy_inputs import Noise, inputs_for

    noise = Noise(1, seed, unet.dtype, unet.device)
    arguments = list(cast(Iterable[Any], inputs_for(unet, size, noise)["forward"]))
    text = arguments[2]
    width = text.shape[2]
    words = "in place of a text there are zeros"
    if not unet.reads_text:
        arguments[2], words = None, "it reads no text"
    elif width <= _UNITS:
        arguments[2] = torch.eye(width, dtype=text.dtype, device=text.device)[None]
        words = f"in place of a text there are {width} unit vectors"
    else:
        arguments[2] = torch.zeros_like(text)
    if added := arguments[7] if len(arguments) > 7 else None:
        added["text_embeds"].zero_()
        rows, columns = (side * _PIXELS for side in size)
        numbers = [rows, columns, 0, 0, rows, columns][: added["time_ids"].shape[1]]
        added["time_ids"] = added["time_ids"].new_tensor([numbers])
    more = unet.config.in_channels - unet.config.out_channels
    return arguments, words + (f", and {more} further channels are noise" if more > 0 else "")


def _latents(network: Autoencoder, path: Path, key: str | None) -> Tensor:
    """A file's first latents as ``decode`` takes them."""
    from sdconv.latents import read_latents, unscale

    z, scaled = read_latents(path, key)
    check_patches(network, z, bool(scaled))
    z = z[:1].to(network.device)
    return (unscale(network, z) if scaled else z).to(network.dtype)


def _scheduler_file(model: Sequence[Path]) -> Path | None:
    """Where a pipeline's folder says how it was trained."""
    found = model[0] / "scheduler" / "scheduler_config.json"
    return found if found.is_file() else None


def _times(z: Tensor, factor: int) -> tuple[int, int]:
    return z.shape[2] * factor, z.shape[3] * factor


def _shape(x: Tensor) -> str:
    return " \u00d7 ".join(map(str, x.shape[1:]))
