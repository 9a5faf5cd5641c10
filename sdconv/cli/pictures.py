"""Commands that take or make pictures: encode, decode, reconstruct."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdconv.cli.common import (
    FOR_PICTURES,
    LARGEST_SEED,
    Component,
    Device,
    Dtype,
    Family,
    Json,
    Model,
    Out,
    With,
    not_an_input,
    print_json,
)
from sdconv.cli.running import Means, check_patches, has_room, opened, prepared, running
from sdconv.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

ImageFile = Annotated[
    Path,
    typer.Argument(metavar="IMAGE", help="A picture of any size: PNG, JPEG, WebP, TIFF, ..."),
]
Size = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Resize it: pixels of the longer side.", show_default=False
    ),
]
In = Annotated[Dtype, typer.Option(help="What the network computes in.")]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="Work in strips within this limit, weights apart: 2GiB, 1500MB; see `sdconv plan`.",
        show_default=False,
    ),
]
Spill = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="With --memory: on a disk, where maps go that do not fit.",
        show_default=False,
    ),
]


def encode(
    image: ImageFile,
    model: Model,
    out: Out = Path("latents.safetensors"),
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw from the posterior instead of taking its mode.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of that draw.")] = 0,
    scaled: Annotated[
        bool,
        typer.Option(
            "--scaled",
            help="Write them as a diffusion model sees them: (latents - shift) * scaling factor; "
            "for FLUX.2 2x2 patches, normalised.",
        ),
    ] = False,
    size: Size = None,
    component: Component = None,
    family: Family = None,
    dtype: In = Dtype.float32,
    device: Device = "cpu",
    backend: With = FOR_PICTURES,
    memory: Memory = None,
    spill: Spill = None,
    as_json: Json = False,
) -> None:
    """Turn a picture into latents.

    They are written to a safetensors file with one tensor, "latents". Sides are cut around the
    centre to multiples of what one latent stands for (8 pixels for most). The file says whether
    they are raw or scaled.

    \b
    Examples:
      sdconv encode photo.jpg --model vae.safetensors
      sdconv encode photo.jpg --model vae.safetensors --size 512 --scaled --out z.safetensors
      sdconv encode photo.jpg --model vae.safetensors --sample --seed 7
    """
    import torch

    from sdconv.latents import scale, write_latents

    if out.suffix.lower() != ".safetensors":
        raise InputError(
            "latents are written as safetensors",
            where=out,
            expected="a name that ends in .safetensors",
        )
    not_an_input(out, [image, *model])
    means = Means(component, family, dtype, device, backend, memory, spill)
    network, picture, x = prepared(image, model, size, means, patches=scaled)
    with running("encoding", network):
        result = network.encode(x)  # type: ignore[operator]
        if not hasattr(result, "latent_dist"):
            if sample:
                raise InputError(
                    "a tiny autoencoder has no posterior to draw from",
                    where="--sample",
                    hint="leave --sample out",
                )
            latents = result.latents
        elif sample:
            latents = result.latent_dist.sample(torch.Generator().manual_seed(seed))
        else:
            latents = result.latent_dist.mode()
        latents = latents.float()
        if scaled:
            latents = scale(network, latents)
    if not torch.isfinite(latents).all():
        raise InputError(
            "the latents came out with NaN or infinity",
            where=network.config.class_name,
            hint="compute in a wider dtype: --dtype float32",
        )
    write_latents(latents, out, scaled=scaled)
    shape = tuple(latents.shape)
    if as_json:
        print_json(
            {
                "file": str(out),
                "shape": shape,
                "scaled": scaled,
                **_sides(picture.image),
                "notes": picture.notes,
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
            help="The picture; a file that is there is replaced. Several get numbers: out-0.png.",
        ),
    ] = Path("picture.png"),
    key: Annotated[
        str | None, typer.Option(metavar="NAME", help="The tensor's name.", show_default=False)
    ] = None,
    scaled: Annotated[
        bool | None,
        typer.Option(
            "--scaled/--raw",
            help="They carry the scaling factor (and shift) that a diffusion model sees; for "
            "FLUX.2 they are 2x2 patches (B, 128, h, w) normalised with bn's statistics.  "
            "Default: what the file says, else raw.",
            show_default=False,
        ),
    ] = None,
    component: Component = None,
    family: Family = None,
    dtype: In = Dtype.float32,
    device: Device = "cpu",
    backend: With = FOR_PICTURES,
    memory: Memory = None,
    spill: Spill = None,
    as_json: Json = False,
) -> None:
    """Turn latents into a picture.

    With --scaled, latents / scaling factor + shift is decoded. For FLUX.2, which has no such
    factor, patches * sqrt(running_var + eps) + running_mean, put back from 2x2 patches.

    \b
    Examples:
      sdconv decode latents.safetensors --model vae.safetensors
      sdconv decode z.safetensors --key samples --scaled --model vae.safetensors --out picture.png
      sdconv decode z.safetensors -m vae.safetensors --memory 2GiB --spill /var/tmp
    """
    from sdconv.images import image_format, to_image, write_image
    from sdconv.latents import read_latents, unscale

    image_format(out)
    not_an_input(out, [latents, *model])
    z, said = read_latents(latents, key)
    if scaled is not None and said is not None and scaled != said:
        raise InputError(
            "the file says otherwise",
            where=latents,
            expected="--scaled" if said else "--raw",
            got="--scaled" if scaled else "--raw",
            hint="leave it to the file: give neither",
        )
    carries = bool(said if scaled is None else scaled)
    means = Means(component, family, dtype, device, backend, memory, spill)
    network = opened(model, means)
    check_patches(network, z, carries)
    with running("decoding", network):
        z = z.to(network.device)
        z = unscale(network, z) if carries else z
        if memory is None:
            sides = tuple(network.downscale * side for side in z.shape[2:])
            has_room(network, sides, pictures=len(z), options=("memory", "dtype"))
        z = z.to(network.dtype)
        pictures = [to_image(one) for one in network.decode(z).sample]  # type: ignore[operator]
    outs = [out] if len(pictures) == 1 else _numbered(out, len(pictures))
    for picture, path in zip(pictures, outs, strict=True):
        write_image(picture, path)
    if as_json:
        names = [str(path) for path in outs]
        print_json({"files": names, "scaled": carries, **_sides(pictures[0])})
        return
    for picture, path in zip(pictures, outs, strict=True):
        kind = "scaled" if carries else "raw"
        typer.echo(f"{path}: {picture.width}x{picture.height} from {kind} latents")


def reconstruct(
    image: ImageFile,
    model: Model,
    out: Out = Path("reconstruction.png"),
    size: Size = None,
    component: Component = None,
    family: Family = None,
    dtype: In = Dtype.float32,
    device: Device = "cpu",
    backend: With = FOR_PICTURES,
    memory: Memory = None,
    spill: Spill = None,
    as_json: Json = False,
) -> None:
    """Pass a picture through the latents and back.

    Writes original, reconstruction and difference in a row. The difference is amplified, by how
    much stands over it. PSNR, in dB, is printed: the higher the closer.

    \b
    Examples:
      sdconv reconstruct photo.jpg --model vae.safetensors --out out.png
      sdconv reconstruct photo.jpg --model encoder.safetensors --model decoder.safetensors
      sdconv reconstruct photo.jpg --model vae.safetensors --size 512 --json
    """
    from sdconv.images import image_format, psnr, side_by_side, to_image, write_image

    image_format(out)
    not_an_input(out, [image, *model])
    means = Means(component, family, dtype, device, backend, memory, spill)
    network, picture, x = prepared(image, model, size, means)
    with running("encoding and decoding", network):
        result = network.encode(x)  # type: ignore[operator]
        latents = result.latents if hasattr(result, "latents") else result.latent_dist.mode()
        decoded = network.decode(latents).sample  # type: ignore[operator]
    back = to_image(decoded[0])
    decibels = psnr(decoded.cpu(), x.cpu())
    sheet, amplification = side_by_side(
        picture.image, back, f"reconstruction, PSNR {decibels:.2f} dB"
    )
    write_image(sheet, out)
    if as_json:
        print_json(
            {
                "file": str(out),
                "psnr": decibels,
                **_sides(picture.image),
                "latents": tuple(latents.shape),
                "amplification": amplification,
                "notes": picture.notes,
            }
        )
        return
    shape = " x ".join(map(str, latents.shape[1:]))
    sides = "{width}x{height}".format(**_sides(picture.image))
    typer.echo(f"{out}: {sides} through latents of {shape}, PSNR {decibels:.2f} dB")


def _sides(image: Image.Image) -> dict[str, int]:
    return {"width": image.width, "height": image.height}


def _numbered(out: Path, count: int) -> list[Path]:
    """``picture.png`` as ``picture-0.png``, ``picture-1.png``, ..."""
    return [out.with_name(f"{out.stem}-{number}{out.suffix}") for number in range(count)]
