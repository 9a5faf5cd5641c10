"""The commands that read or make images: encode, decode, reconstruct."""

from __future__ import annotations

from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from sdconv.analysis.memory import check_memory
from sdconv.cli.common import (
    LARGEST_SEED,
    Clamp,
    Component,
    ComputeDtype,
    Device,
    Dtype,
    Ema,
    Family,
    Force,
    Json,
    Model,
    ModelKey,
    ModelOrSmall,
    Out,
    Prefix,
    Resize,
    With,
    check_output,
    parse_resize,
    print_json,
    say,
)
from sdconv.cli.ranks import Ranks, Timeout, is_first_rank
from sdconv.cli.running import RunOptions, image_backend, open_autoencoder, prepared, running
from sdconv.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from sdconv.latents import StoredLatents


class Axes(StrEnum):
    """The axes along which an image is seamless."""

    x = "x"
    y = "y"
    xy = "xy"


ImageFile = Annotated[
    Path,
    typer.Argument(metavar="IMAGE", help="An image of any size: PNG, JPEG, WebP, TIFF, ..."),
]
Crop = Annotated[
    bool,
    typer.Option(
        "--crop",
        help="Crop the image around its centre to sides that the network takes, instead of padding "
        "it and cutting the padding off after decoding.",
    ),
]
Alpha = Annotated[
    bool,
    typer.Option(
        "--alpha",
        help="Keep the alpha channel, next to the colours; transparency is blended with white "
        "otherwise.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="Work in strips within this limit, which does not include the weights: 2GiB, 1500MB; "
        "see `sdconv plan`.",
        show_default=False,
    ),
]
Spill = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="With --memory: a folder on a disk for feature maps that do not fit.",
        show_default=False,
    ),
]


def encode(
    image: ImageFile,
    model: Model,
    out: Out = Path("latents.safetensors"),
    force: Force = False,
    sample: Annotated[
        bool, typer.Option("--sample", help="Sample from the posterior instead of taking its mode.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, metavar="N", help="Seed of the sample.")
    ] = 0,
    scaled: Annotated[
        bool,
        typer.Option(
            "--scaled",
            help="Write them as a diffusion model reads them: (latents - shift) * scaling factor; "
            "for FLUX.2 normalised 2x2 patches.",
        ),
    ] = False,
    size: Resize = None,
    crop: Crop = False,
    alpha: Alpha = False,
    component: Component = None,
    family: Family = None,
    prefix: Prefix = None,
    model_key: ModelKey = None,
    ema: Ema = False,
    dtype: ComputeDtype = Dtype.float32,
    clamp: Clamp = False,
    device: Device = "cpu",
    backend: With = None,
    memory: Memory = None,
    spill: Spill = None,
    ranks: Ranks = False,
    timeout: Timeout = 60.0,
    as_json: Json = False,
) -> None:
    """Turn an image into latents.

    They are written to a safetensors file with one tensor, "latents". An image of any size is kept
    whole: it is padded to multiples of the downscale factor (8 for most autoencoders), and the file
    says its size, to which `sdconv decode` cuts the image again. The file also says whether the
    latents are raw or scaled, and for which scale; a tiny autoencoder's are always scaled.

    \b
    Examples:
      sdconv encode photo.jpg --model vae.safetensors
      sdconv encode photo.jpg --model vae.safetensors --size 512 --scaled --out z.safetensors
      sdconv encode photo.jpg --model vae.safetensors --sample --seed 7
      torchrun --nproc-per-node 2 -m sdconv encode photo.jpg -m vae.safetensors --ranks
    """
    import torch

    from sdconv.images import alpha_of
    from sdconv.latents import encode as encode_image
    from sdconv.latents import scale, write_latents
    from sdconv.models.tiny import AutoencoderTiny

    if out.suffix.lower() != ".safetensors":
        raise InputError(
            "latents are written as safetensors",
            where=out,
            expected="a name that ends in .safetensors",
        )
    check_output(out, force, [image, *model])
    options = RunOptions(
        component=component,
        family=family,
        prefix=prefix,
        key=model_key,
        ema=ema,
        dtype=dtype,
        clamp=clamp,
        device=device,
        backend=image_backend(backend, device),
        memory=memory,
        spill=spill,
        ranks=ranks,
        timeout=timeout,
    )
    network, loaded, x = prepared(
        image, model, parse_resize(size), options, scaled=scaled, crop=crop, alpha=alpha
    )
    with running("encoding", network, x.shape[2:], ["encode"]):
        generator = torch.Generator().manual_seed(seed) if sample else None
        latents = encode_image(network, x, generator).float()
        if scaled:
            latents = scale(network, latents)
    if not is_first_rank():
        return
    scaled = scaled or isinstance(network, AutoencoderTiny)  # whose latents always are
    if not torch.isfinite(latents).all():
        raise InputError(
            "the latents contain NaN or infinity",
            where=network.config.class_name,
            hint="compute in a wider dtype: --dtype float32",
        )
    kept = loaded.image
    write_latents(
        latents,
        out,
        scaled=scaled,
        network=network,
        image_size=(kept.height, kept.width),
        alpha=alpha_of(kept),
    )
    shape = tuple(latents.shape)
    if as_json:
        print_json(
            {
                "file": str(out),
                "shape": shape,
                "scaled": scaled,
                **_sides(loaded.image),
                "notes": loaded.notes,
            }
        )
    else:
        typer.echo(f"{out}: latents {' x '.join(map(str, shape))}, {'scaled' if scaled else 'raw'}")


def decode(
    latents: Annotated[
        Path,
        typer.Argument(metavar="LATENT", help="A safetensors file with one tensor, or with --key."),
    ],
    model: Model,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The image file to write. Several images get numbers: out-0.png.",
        ),
    ] = Path("picture.png"),
    force: Force = False,
    key: Annotated[
        str | None, typer.Option(metavar="NAME", help="The tensor's name.", show_default=False)
    ] = None,
    scaled: Annotated[
        bool | None,
        typer.Option(
            "--scaled/--raw",
            help="Whether they are scaled and shifted as a diffusion model reads them; for FLUX.2 "
            "2x2 patches (B, 128, h, w) normalised with bn's statistics.  Default: what the file "
            "says, else raw; scaled for a tiny autoencoder.",
            show_default=False,
        ),
    ] = None,
    component: Component = None,
    family: Family = None,
    prefix: Prefix = None,
    model_key: ModelKey = None,
    ema: Ema = False,
    dtype: ComputeDtype = Dtype.float32,
    clamp: Clamp = False,
    device: Device = "cpu",
    backend: With = None,
    memory: Memory = None,
    spill: Spill = None,
    ranks: Ranks = False,
    timeout: Timeout = 60.0,
    seamless: Annotated[
        Axes | None,
        typer.Option(
            help="Let opposite edges fit together, as a texture's: left and right (x), top and "
            "bottom (y), or both (xy).",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn latents into an image.

    If the file says the size of the image that was encoded, the image is cut to it; if the file has
    that image's alpha channel, it is added, in formats that have one.

    With --scaled, latents / scaling factor + shift is decoded. For FLUX.2, which has no such
    factor, patches * sqrt(running_var + eps) + running_mean, put back together from 2x2 patches.

    A tiny autoencoder decodes scaled latents. Of raw ones whose file names no scale, such as
    ComfyUI's, --family says which VAE made them.

    \b
    Examples:
      sdconv decode latents.safetensors --model vae.safetensors
      sdconv decode z.safetensors --key samples --scaled --model vae.safetensors --out picture.png
      sdconv decode z.safetensors -m vae.safetensors --memory 2GiB --spill /var/tmp
      sdconv decode panorama.safetensors -m vae.safetensors --seamless x
      sdconv decode ComfyUI_00001_.latent -m taesd --family sdxl
      torchrun --nproc-per-node 2 -m sdconv decode z.safetensors -m vae.safetensors --ranks
    """
    from sdconv.images import image_format, to_image, write_image
    from sdconv.latents import read_stored
    from sdconv.models.seamless import seamless as made_seamless
    from sdconv.models.tiny import AutoencoderTiny

    image_format(out)
    stored = read_stored(latents, key)
    z, stated = stored.values, stored.scaled
    outs = [out] if len(z) == 1 else _numbered(out, len(z))
    for path in outs:
        check_output(path, force, [latents, *model])
    if scaled is not None and stated is not None and scaled != stated:
        raise InputError(
            "the file says otherwise",
            where=latents,
            expected="--scaled" if stated else "--raw",
            got="--scaled" if scaled else "--raw",
            hint="leave it to the file: give neither",
        )
    options = RunOptions(
        component=component,
        family=family,
        prefix=prefix,
        key=model_key,
        ema=ema,
        dtype=dtype,
        clamp=clamp,
        device=device,
        backend=image_backend(backend, device),
        memory=memory,
        spill=spill,
        ranks=ranks,
        timeout=timeout,
    )
    network = open_autoencoder(model, options)
    z = stored.for_decoder(network, scaled, family)
    form = stated if scaled is None else scaled
    if form is None:
        taken = "scaled" if isinstance(network, AutoencoderTiny) else "raw"
        say(
            f"{latents} does not say whether its latents are raw or scaled: taken as {taken} "
            "(--raw, --scaled)",
            "note",
        )
    is_scaled = isinstance(network, AutoencoderTiny) if form is None else form
    wraps = nullcontext() if seamless is None else made_seamless(network, seamless.value)
    rows, columns = (network.downscale * side for side in z.shape[2:])
    with running("decoding", network, (rows, columns), ["decode"]), wraps:
        z = z.to(network.device)
        if memory is None and not ranks:
            sides = tuple(network.downscale * side for side in z.shape[2:])
            check_memory(network, sides, images=len(z), options=("memory", "dtype"))
        decoded = cast(Any, network).decode(z.to(network.dtype)).sample
        images = [to_image(one) for one in decoded]
    if not is_first_rank():
        return
    images = [_as_encoded(one, stored, out) for one in images]
    for image, path in zip(images, outs, strict=True):
        write_image(image, path)
    if as_json:
        names = [str(path) for path in outs]
        print_json({"files": names, "scaled": is_scaled, **_sides(images[0])})
        return
    for image, path in zip(images, outs, strict=True):
        kind = "scaled" if is_scaled else "raw"
        typer.echo(f"{path}: {image.width}x{image.height} from {kind} latents")


def reconstruct(
    image: ImageFile,
    model: ModelOrSmall = None,
    out: Out = Path("reconstruction.png"),
    force: Force = False,
    size: Resize = None,
    crop: Crop = False,
    alpha: Alpha = False,
    component: Component = None,
    family: Family = None,
    prefix: Prefix = None,
    model_key: ModelKey = None,
    ema: Ema = False,
    dtype: ComputeDtype = Dtype.float32,
    clamp: Clamp = False,
    device: Device = "cpu",
    backend: With = None,
    memory: Memory = None,
    spill: Spill = None,
    as_json: Json = False,
) -> None:
    """Pass an image through the latents and back.

    Writes the original, the reconstruction and their difference side by side. An image of any size
    is kept whole: it is padded for the network, and the padding is cut off. The difference is
    amplified by the factor written above it. The PSNR in dB is printed: higher is closer.

    \b
    Examples:
      sdconv reconstruct photo.jpg
      sdconv reconstruct photo.jpg --model vae.safetensors --out out.png
      sdconv reconstruct photo.jpg --model encoder.safetensors --model decoder.safetensors
      sdconv reconstruct photo.jpg --model vae.safetensors --size 512 --json
    """
    from sdconv.images import (
        HAVE_ALPHA,
        alpha_of,
        image_format,
        psnr,
        side_by_side,
        to_image,
        with_alpha,
        write_image,
    )
    from sdconv.latents import encode as encode_image

    if alpha and image_format(out) not in HAVE_ALPHA:
        raise InputError(
            "images in this format have no alpha channel",
            where=out,
            expected="a name that ends in .png, .webp, .tif or .tiff",
            hint="give the output another name, or leave --alpha out",
        )
    image_format(out)
    if not model:
        model = [Path("tiny-vae")]
        say("with tiny-vae, the small VAE that ships; --model names another", "note")
    check_output(out, force, [image, *model])
    options = RunOptions(
        component=component,
        family=family,
        prefix=prefix,
        key=model_key,
        ema=ema,
        dtype=dtype,
        clamp=clamp,
        device=device,
        backend=image_backend(backend, device),
        memory=memory,
        spill=spill,
    )
    network, loaded, x = prepared(image, model, parse_resize(size), options, crop=crop, alpha=alpha)
    with running("encoding and decoding", network, x.shape[2:], ["encode", "decode"]):
        latents = encode_image(network, x)
        decoded = cast(Any, network).decode(latents).sample
    width, height = loaded.image.size
    decoded, x = (one[..., :height, :width].cpu() for one in (decoded, x))
    back = to_image(decoded[0])
    if (channel := alpha_of(loaded.image)) is not None:
        back = with_alpha(back, channel)
    decibels = psnr(decoded, x)
    sheet, amplification = side_by_side(
        loaded.image, back, f"reconstruction, PSNR {decibels:.2f} dB"
    )
    write_image(sheet, out)
    if as_json:
        print_json(
            {
                "file": str(out),
                "psnr": decibels,
                **_sides(loaded.image),
                "latents": tuple(latents.shape),
                "amplification": amplification,
                "notes": loaded.notes,
            }
        )
        return
    shape = " x ".join(map(str, latents.shape[1:]))
    sides = "{width}x{height}".format(**_sides(loaded.image))
    typer.echo(f"{out}: {sides} through latents of {shape}, PSNR {decibels:.2f} dB")


def _as_encoded(image: Image.Image, stored: StoredLatents, out: Path) -> Image.Image:
    """A decoded image in the size of the one that was encoded, and with its alpha channel."""
    from sdconv.images import HAVE_ALPHA, image_format, with_alpha

    if stored.image_size is None:
        return image
    rows, columns = stored.image_size
    sides = "{width}x{height}".format(**_sides(image))
    # a patch of FLUX.2's latents stands for 16 pixels, and most latents for 8
    if not (image.height - 32 < rows <= image.height and image.width - 32 < columns <= image.width):
        say(f"not cut to {columns}x{rows}, of which the file says it is: it is {sides}", "note")
        return image
    if (image.height, image.width) != (rows, columns):
        say(f"the padding was cut off, from {sides} to {columns}x{rows}", "note")
        image = image.crop((0, 0, columns, rows))
    if stored.alpha is None:
        return image
    if image_format(out) not in HAVE_ALPHA:
        say(f"the alpha channel was left out: {out.suffix} images have none", "note")
        return image
    return with_alpha(image, stored.alpha)


def _sides(image: Image.Image) -> dict[str, int]:
    return {"width": image.width, "height": image.height}


def _numbered(out: Path, count: int) -> list[Path]:
    """``picture.png`` as ``picture-0.png``, ``picture-1.png``, ..."""
    return [out.with_name(f"{out.stem}-{number}{out.suffix}") for number in range(count)]
