"""Drive a network so that its feature maps can be captured: an image or latents through an
autoencoder, noise or noised latents through a U-Net."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from sdconv.analysis.memory import check_free_memory, check_memory
from sdconv.errors import InputError
from sdconv.features.conditions import (
    conditional_half,
    conditions,
    guided_conditions,
    latent_sides,
    scheduler_file,
)
from sdconv.features.prompts import PromptEmbeds, encode_prompt, read_embeds
from sdconv.images import LoadedImage, read_image, to_tensor
from sdconv.latents import encode, read_stored, scale
from sdconv.loading import load
from sdconv.models.base import Autoencoder, Network
from sdconv.models.unet import UNet2DConditionModel

GUIDANCE, SDXL_GUIDANCE = 7.5, 5.0
"""The scales of classifier-free guidance that diffusers' pipelines have by default."""

LATENT_SUFFIXES = (".safetensors", ".latent", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class Request:
    """The input and the network of a run.

    Attributes:
        source: an image or a file of latents; None for noise.
        key: name of the latents in their file; None for the only tensor there.
        model: files of the network, as ``sdconv.load`` takes them.
        vae: files of the autoencoder that encodes an image for a U-Net, or None.
        component, family, prefix, ema, dtype, clamp, device: as ``sdconv.load`` takes them.
        model_key: ``key`` of ``sdconv.load``.
        size: pixels of the image's longer side, or (rows, columns); None for the image's own.
        steps: number of a U-Net's timesteps.
        seed: of the noise.
        prompt: a U-Net's prompt, which the text encoders in the pipeline's folder ``model`` encode;
            or None.
        embeds: a file with the prompt's embedding, or None.
        negative: the negative prompt, or None for what the pipeline takes without one.
        guidance: scale of classifier-free guidance; None for that of diffusers' pipelines.
    """

    source: Path | None
    key: str | None
    model: Path | list[Path]
    vae: Path | list[Path] | None
    component: str | None
    family: str | None
    prefix: str | None
    model_key: str | None
    ema: bool
    dtype: torch.dtype
    clamp: bool
    device: str
    size: int | tuple[int, int] | None
    steps: int
    seed: int
    prompt: str | None = None
    embeds: Path | None = None
    negative: str | None = None
    guidance: float | None = None


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
        guided: the network's batch has two halves, of which the second follows the prompt.
    """

    network: Network
    size: tuple[int, int]
    methods: tuple[str, ...]
    calls: Sequence[Callable[[], object]]
    facts: dict[str, str]
    notes: tuple[str, ...]
    image: Image.Image | None
    guided: bool = False

    @property
    def reduce(self) -> Callable[[Tensor], Tensor] | None:
        """What is kept of a feature map: under guidance the half that follows the prompt."""
        return conditional_half if self.guided else None


def prepare_run(request: Request) -> Run:
    """Load the network, and check and prepare its input.

    Raises:
        SdconvError: as ``sdconv.load``, ``read_image``, ``read_stored``, ``encode_prompt`` and
            ``read_embeds``; or the input is not one for this network, or too large for the free
            memory.
    """
    request = _of_pipeline(request)
    source = request.source
    # the image before the weights, which take longer
    is_image = source is not None and source.suffix.lower() not in LATENT_SUFFIXES
    loaded = read_image(source) if source is not None and is_image else None
    prompt = _prompt(request)
    network = load(
        request.model,
        request.component,
        dtype=request.dtype,
        device=request.device,
        family=request.family,
        prefix=request.prefix,
        key=request.model_key,
        ema=request.ema,
        clamp=request.clamp,
    )
    if isinstance(network, UNet2DConditionModel):
        return _unet_run(network, request, loaded, prompt)
    network = cast(Autoencoder, network)
    if prompt is not None:
        raise InputError(
            "an autoencoder takes no prompt",
            where="--embeds" if request.embeds else "--prompt",
            hint="leave it out, or open the U-Net with --component unet",
        )
    if source is None:
        raise InputError(
            "an autoencoder does not take noise",
            where="--noise",
            expected="an image or a file of latents",
            hint="leave --noise out, or give a U-Net with --model",
        )
    if loaded is None:
        return _decoder_run(network, source, request)
    return _autoencoder_run(network, source, loaded.fitted(network.downscale, request.size))


def _of_pipeline(request: Request) -> Request:
    """A request for a pipeline's folder, with its U-Net and its autoencoder filled in."""
    model = request.model
    folder = model if isinstance(model, Path) and (model / "unet").is_dir() else None
    if folder is None:
        return request
    for_unet = request.source is None or request.prompt is not None or request.embeds is not None
    component = request.component or ("unet" if for_unet or request.vae else None)
    own_vae = folder if component == "unet" and (folder / "vae").is_dir() else None
    return replace(request, component=component, vae=request.vae or own_vae)


def _prompt(request: Request) -> PromptEmbeds | None:
    if request.prompt is not None and request.embeds is not None:
        raise InputError(
            "give either a prompt or its embeddings", where="--prompt and --embeds", got="both"
        )
    if request.negative is not None and request.prompt is None:
        raise InputError("a negative prompt needs a prompt", where="--negative-prompt")
    if request.embeds is not None:
        return read_embeds(request.embeds)
    if request.prompt is None:
        return None
    folder = request.model if isinstance(request.model, Path) else request.model[0]
    # of a component's folder, the pipeline is the folder around it
    within = (folder.parent / "text_encoder").is_dir() and not (folder / "text_encoder").is_dir()
    return encode_prompt(folder.parent if within else folder, request.prompt, request.negative)


def _decoder_run(network: Autoencoder, source: Path, request: Request) -> Run:
    stored = read_stored(source, request.key)
    z = stored.for_decoder(network, family=request.family)[:1].to(network.device, network.dtype)
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


def _unet_run(
    unet: UNet2DConditionModel,
    request: Request,
    loaded: LoadedImage | None,
    prompt: PromptEmbeds | None,
) -> Run:
    from sdconv.integrations.schedule import Schedule  # imports diffusers

    if prompt is not None:
        prompt = prompt.checked(unet, "--embeds" if request.embeds else "--prompt")
    config = scheduler_file(request.model)
    schedule = Schedule(request.steps, config)
    generator = torch.Generator().manual_seed(request.seed)
    z, image, notes = _latents_of(unet, request, loaded)
    channels = unet.config.out_channels
    rows, columns = latent_sides(unet, request.size) if z is None else (z.shape[2], z.shape[3])
    if unet.device.type == "cpu":
        least = unet.config.block_out_channels[0] * rows * columns * unet.dtype.itemsize
        resizable = request.source is None or loaded is not None
        options = ("size", "dtype") if resizable else ("dtype",)
        check_free_memory(least, f"latents {rows}x{columns}", options)
    shape = (1, channels, rows, columns)
    noise = torch.randn(shape, generator=generator).to(unet.device, unet.dtype)
    guidance = _guidance(unet, request, prompt)
    arguments, words = (conditions if guidance is None else guided_conditions)(
        unet, (rows, columns), request.seed, prompt
    )
    latents = noise  # of the run from noise, step by step

    def call(timestep: int) -> None:
        nonlocal latents
        noisy = latents if z is None else schedule.add_noise(z, noise, timestep)
        further = arguments[0][:, channels:]
        sample = torch.cat([noisy.expand(len(further), -1, -1, -1), further], 1)
        predicted = unet(sample, timestep, *arguments[2:]).sample
        if guidance is not None:
            without, of_prompt = predicted.chunk(2)
            predicted = without + guidance * (of_prompt - without)
        if z is None:
            latents = schedule.step(predicted, timestep, latents)

    source = "noise" if request.source is None else request.source.name
    how = "denoised" if z is None else "with noise added at each timestep"
    trained = "the pipeline's" if config else "Stable Diffusion's"
    facts = {}
    if prompt is not None:
        of_half = ", and the feature maps are those of its half of the batch"
        guided = "none" if guidance is None else f"{guidance:g}"
        facts = {"prompt": prompt.words, "guidance": guided}
        words += f", the guidance {guided}" + ("" if guidance is None else of_half)
    notes += (words, f"the noise schedule is {trained}, the prediction {schedule.prediction_type}")
    return Run(
        network=unet,
        size=(rows, columns),
        methods=(),
        calls=[partial(call, timestep) for timestep in schedule.timesteps],
        facts={
            "input": f"{source}, latents {_shape(noise)}, {how}",
            "timesteps": f"{request.steps}, seed {request.seed}",
            **facts,
        },
        notes=notes,
        image=image,
        guided=guidance is not None,
    )


def _guidance(
    unet: UNet2DConditionModel, request: Request, prompt: PromptEmbeds | None
) -> float | None:
    """The scale of classifier-free guidance: as in diffusers' pipelines, if a prompt steers the
    denoising; None without guidance."""
    refusal = None
    if prompt is None:
        refusal = "guidance needs a prompt", "give --prompt, or --embeds"
    elif request.source is not None:
        refusal = "guidance steers denoising, but here noise is added to an image", "leave it out"
    elif unet.config.time_cond_proj_dim is not None:
        refusal = "this U-Net was distilled to need no guidance", "leave it out"
    elif prompt.negative is None:
        refusal = (
            "guidance needs the embedding of a negative prompt too",
            "add negative_prompt_embeds to the file: pipelines take that of the empty prompt",
        )
    if refusal is not None and (request.guidance or 0) > 1:
        raise InputError(refusal[0], where="--guidance", hint=refusal[1])
    if refusal is not None or prompt is None:
        return None
    scale = request.guidance
    if scale is None:
        scale = SDXL_GUIDANCE if prompt.pooled is not None else GUIDANCE
    return scale if scale > 1 else None


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
        scaled = stored.for_diffusion(request.source, request.family)
        return scaled[:1].to(unet.device, unet.dtype), None, ()
    if not request.vae:
        raise InputError(
            "a U-Net takes latents, not images",
            where=request.source,
            hint="name the autoencoder that encodes the image: --vae PATH, or a pipeline's folder "
            "with --model; or give --noise",
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


def _shape(x: Tensor) -> str:
    return " \u00d7 ".join(map(str, x.shape[1:]))
