"""Drive a network so that its feature maps can be captured: an image or latents through an
autoencoder, noise or noised latents through a U-Net."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from sdconv.analysis.memory import check_free_memory, check_memory
from sdconv.errors import InputError
from sdconv.images import LoadedImage, read_image, to_tensor
from sdconv.latents import encode, read_stored, scale
from sdconv.loading import load
from sdconv.models.base import Autoencoder, Network
from sdconv.models.dummy_inputs import Noise, inputs_for
from sdconv.models.unet import UNet2DConditionModel

LATENT_SUFFIXES = (".safetensors", ".latent", ".pt", ".pth", ".bin", ".ckpt")
# prompt embeddings of at most this width come from no text encoder: the tiny U-Net's are unit
# vectors
_UNIT_VECTORS = 16
_PIXELS = 8  # per latent, in every family of the U-Nets


@dataclass(frozen=True, kw_only=True)
class Request:
    """The input and the network of a run.

    Attributes:
        source: an image or a file of latents; None for noise.
        key: name of the latents in their file; None for the only tensor there.
        model: files of the network, as ``sdconv.load`` takes them.
        vae: files of the autoencoder that encodes an image for a U-Net, or None.
        component, family, dtype, device: as ``sdconv.load`` takes them.
        size: pixels of the image's longer side, or (rows, columns); None for the image's own.
        steps: number of a U-Net's timesteps.
        seed: of the noise.
    """

    source: Path | None
    key: str | None
    model: Path | list[Path]
    vae: Path | list[Path] | None
    component: str | None
    family: str | None
    dtype: torch.dtype
    device: str
    size: int | tuple[int, int] | None
    steps: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """A network and the calls that run it.

    Attributes:
        network: the network.
        size: rows and columns of its input.
        methods: the methods of an autoencoder that are called, ``"encode"`` and ``"decode"``.
        calls: functions that each run the network once, in order.
        facts: label -> text about the input.
        notes: choices that were made.
        image: the image that the input comes from, if any.
    """

    network: Network
    size: tuple[int, int]
    methods: tuple[str, ...]
    calls: Sequence[Callable[[], object]]
    facts: dict[str, str]
    notes: tuple[str, ...]
    image: Image.Image | None


def prepare_run(request: Request) -> Run:
    """Load the network, and check and prepare its input.

    Raises:
        SdconvError: as ``sdconv.load``, ``read_image`` and ``read_stored``; or the input is not
            one for this network, or too large for the free memory.
    """
    source = request.source
    # the image before the weights, which take longer
    is_image = source is not None and source.suffix.lower() not in LATENT_SUFFIXES
    loaded = read_image(source) if source is not None and is_image else None
    network = load(
        request.model,
        request.component,
        dtype=request.dtype,
        device=request.device,
        family=request.family,
    )
    if isinstance(network, UNet2DConditionModel):
        return _unet_run(network, request, loaded)
    network = cast(Autoencoder, network)
    if source is None:
        raise InputError(
            "an autoencoder does not take noise",
            where="--noise",
            expected="an image or a file of latents",
            hint="leave --noise out, or give a U-Net with --model",
        )
    if loaded is None:
        return _decoder_run(network, source, request.key)
    return _autoencoder_run(network, source, loaded.fitted(network.downscale, request.size))


def _decoder_run(network: Autoencoder, source: Path, key: str | None) -> Run:
    z = read_stored(source, key).for_decoder(network)[:1].to(network.device, network.dtype)
    return Run(
        network=network,
        size=(z.shape[2] * network.downscale, z.shape[3] * network.downscale),
        methods=("decode",),
        calls=[lambda: cast(Any, network).decode(z)],
        facts={"input": f"{source.name}, latents {_shape(z)}"},
        notes=(),
        image=None,
    )


def _autoencoder_run(network: Autoencoder, source: Path, loaded: LoadedImage) -> Run:
    check_memory(network, loaded.image.size[::-1], options=("size", "dtype"))
    x = to_tensor(loaded.image).to(network.device, network.dtype)
    methods = [name for name in ("encode", "decode") if getattr(network, f"{name}r", None)]

    def run() -> None:
        z = encode(network, x)
        if "decode" in methods:
            cast(Any, network).decode(z)

    return Run(
        network=network,
        size=(x.shape[2], x.shape[3]),
        methods=tuple(methods),
        calls=[run],
        facts={"input": f"{source.name}, {x.shape[2]} \u00d7 {x.shape[3]}"},
        notes=loaded.notes,
        image=loaded.image,
    )


def _unet_run(unet: UNet2DConditionModel, request: Request, loaded: LoadedImage | None) -> Run:
    from sdconv.integrations.schedule import Schedule  # imports diffusers

    config = scheduler_file(request.model)
    schedule = Schedule(request.steps, config)
    generator = torch.Generator().manual_seed(request.seed)
    z, image, notes = _latents_of(unet, request, loaded)
    channels = unet.config.out_channels
    rows, columns = _sides(unet, request.size) if z is None else (z.shape[2], z.shape[3])
    if unet.device.type == "cpu":
        least = unet.config.block_out_channels[0] * rows * columns * unet.dtype.itemsize
        resizable = request.source is None or loaded is not None
        options = ("size", "dtype") if resizable else ("dtype",)
        check_free_memory(least, f"latents {rows}x{columns}", options)
    shape = (1, channels, rows, columns)
    noise = torch.randn(shape, generator=generator).to(unet.device, unet.dtype)
    arguments, words = neutral_conditions(unet, (rows, columns), request.seed)
    latents = noise  # of the run from noise, step by step

    def call(timestep: int) -> None:
        nonlocal latents
        noisy = latents if z is None else schedule.add_noise(z, noise, timestep)
        sample = torch.cat([noisy, arguments[0][:, channels:]], 1)
        predicted = unet(sample, timestep, *arguments[2:]).sample
        if z is None:
            latents = schedule.step(predicted, timestep, latents)

    source = "noise" if request.source is None else request.source.name
    how = "denoised" if z is None else "with noise added at each timestep"
    trained = "the pipeline's" if config else "Stable Diffusion's"
    notes += (words, f"the noise schedule is {trained}, the prediction {schedule.prediction_type}")
    return Run(
        network=unet,
        size=(rows, columns),
        methods=(),
        calls=[partial(call, timestep) for timestep in schedule.timesteps],
        facts={
            "input": f"{source}, latents {_shape(noise)}, {how}",
            "timesteps": f"{request.steps}, seed {request.seed}",
        },
        notes=notes,
        image=image,
    )


def _sides(unet: UNet2DConditionModel, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of the latents of an image of this size; None for the U-Net's default
    size."""
    if size is not None:
        rows, columns = size if isinstance(size, tuple) else (size, size)
        return max(rows // _PIXELS, 1), max(columns // _PIXELS, 1)
    default = unet.config.sample_size or 64
    return (default, default) if isinstance(default, int) else default


def _latents_of(
    unet: UNet2DConditionModel, request: Request, loaded: LoadedImage | None
) -> tuple[Tensor | None, Image.Image | None, tuple[str, ...]]:
    """The latents that noise is added to (None for a run from noise), the image that they are of,
    and notes."""
    channels = unet.config.out_channels
    if request.source is None:
        return None, None, ()
    if loaded is None:
        stored = read_stored(request.source, request.key)
        z = stored.values
        if z.shape[1] != channels:
            raise InputError(
                "these latents have another number of channels than this U-Net's",
                where=request.source,
                expected=f"(B, {channels}, h, w)",
                got=tuple(z.shape),
            )
        scaled = stored.for_diffusion()
        if scaled is None:
            raise InputError(
                "these latents are raw, and a U-Net takes scaled ones",
                where=request.source,
                hint="write them with `sdconv encode --scaled`",
            )
        return scaled[:1].to(unet.device, unet.dtype), None, ()
    if not request.vae:
        raise InputError(
            "a U-Net takes latents, not images",
            where=request.source,
            hint="name the autoencoder that encodes the image: --vae PATH; or give --noise",
        )
    vae = load(
        request.vae, "vae", dtype=request.dtype, device=request.device, family=request.family
    )
    if not isinstance(vae, Autoencoder):
        raise InputError("this is not an autoencoder", where="--vae", got=vae.config.class_name)
    loaded = loaded.fitted(vae.downscale, request.size)
    check_memory(vae, loaded.image.size[::-1], options=("size", "dtype"))
    with torch.inference_mode():
        z = scale(vae, encode(vae, to_tensor(loaded.image).to(vae.device, vae.dtype)))
    if z.shape[1] != channels:
        raise InputError(
            "this autoencoder's latents do not fit the U-Net",
            where="--vae",
            expected=f"{channels} channels",
            got=z.shape[1],
        )
    return z.to(unet.dtype), loaded.image, loaded.notes


def neutral_conditions(
    unet: UNet2DConditionModel, size: tuple[int, int], seed: int
) -> tuple[list[Any], str]:
    """A U-Net's arguments by position, with a neutral prompt embedding, and a note about them."""
    noise = Noise(1, seed, unet.dtype, unet.device)
    arguments = list(cast(Iterable[Any], inputs_for(unet, size, noise)["forward"]))
    prompt_embeds = arguments[2]
    width = prompt_embeds.shape[2]
    words = "the prompt embedding is zeros"
    if not unet.reads_text:
        arguments[2], words = None, "the network takes no prompt embedding"
    elif width <= _UNIT_VECTORS:
        arguments[2] = torch.eye(width, dtype=prompt_embeds.dtype, device=unet.device)[None]
        words = f"the prompt embedding is {width} unit vectors"
    else:
        arguments[2] = torch.zeros_like(prompt_embeds)
    if added := arguments[7] if len(arguments) > 7 else None:
        added["text_embeds"].zero_()
        rows, columns = (side * _PIXELS for side in size)
        numbers = [rows, columns, 0, 0, rows, columns][: added["time_ids"].shape[1]]
        added["time_ids"] = added["time_ids"].new_tensor([numbers])
    more = unet.config.in_channels - unet.config.out_channels
    return arguments, words + (f", and {more} further channels are noise" if more > 0 else "")


def scheduler_file(model: Path | list[Path]) -> Path | None:
    """The scheduler's config in a pipeline's folder; None if there is none."""
    folder = model if isinstance(model, Path) else model[0]
    found = folder / "scheduler" / "scheduler_config.json"
    return found if found.is_file() else None


def _shape(x: Tensor) -> str:
    return " \u00d7 ".join(map(str, x.shape[1:]))
