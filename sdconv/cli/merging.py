"""The commands that make weights of other weights: average, merge-lora, extract-lora."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdconv.cli.common import (
    Dtype,
    Force,
    Json,
    check_output,
    parse_dtype,
    print_json,
    reading,
    say,
)
from sdconv.errors import InputError

if TYPE_CHECKING:
    from sdconv.checkpoint.changes import Change

_MODELS = "A file or a folder: of one network, or of a whole model."
OutModel = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        metavar="FILE",
        help="A name that ends in .safetensors for a single file. Any other name is a folder's, if "
        "the weights come from one.",
        show_default=False,
    ),
]


def average(
    paths: Annotated[
        list[Path], typer.Argument(metavar="A B [C...]", help=_MODELS, show_default=False)
    ],
    out: OutModel,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[COMPONENT=]W[,W...]",
            help="One number: the share of B, of two checkpoints. Several: the share of each, 1 in "
            "all. With a component's name (unet, vae, text_encoder, text_encoder_2, ...) for that "
            "one only. Can be repeated.  Default: equal shares.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the weighted average of checkpoints.

    Each floating-point tensor becomes the sum of share * tensor, in float32, rounded once to A's
    dtype. What comes out has A's form, names and metadata; B and the others may have any layout and
    dtype, as long as they hold the same tensors. Integers and the noise schedule are taken from A.
    Tensors are read one at a time.

    \b
    Examples:
      sdconv average base.safetensors tuned.safetensors --out half.safetensors
      sdconv average base.safetensors tuned.safetensors --weight 0.3 --weight vae=0 -o c.safetensors
      sdconv average a.safetensors b.safetensors c.ckpt --weight 0.5,0.25,0.25 -o d.safetensors
    """
    from sdconv.checkpoint.average import average as write

    check_output(out, force, paths)
    usual, own = _shares(weight or [], len(paths))
    with reading("averaging") as progress:
        result = write(paths, out, usual, own, on_tensor=progress)
    if result.dequantised:
        say(f"{result.dequantised} scaled fp8 weights were multiplied by their scales", "note")
    if result.taken:
        taken = ", ".join(result.taken[:4])
        say(f"{len(result.taken)} tensors that differ were taken from A: {taken}", "note")
    names = [str(file) for file in result.files]
    if as_json:
        print_json(
            {
                "files": names,
                "shares": result.shares,
                "averaged": result.averaged,
                "changes": _json(result.changes),
                "taken": result.taken,
                "dequantised": result.dequantised,
            }
        )
        return
    for component, count in result.averaged.items():
        shares = ", ".join(f"{share:g}" for share in result.shares[component])
        changed = _changed(result.changes, component)
        typer.echo(f"{component}: shares {shares}; {count} tensors, {changed}")
    for name in names:
        typer.echo(name)


def merge_lora(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help=_MODELS, show_default=False)
    ],
    loras: Annotated[
        list[Path],
        typer.Argument(
            metavar="LORA...",
            help="LoRA files, or folders of PEFT adapters.",
            show_default=False,
        ),
    ],
    out: OutModel,
    scale: Annotated[
        list[float] | None,
        typer.Option(
            metavar="S",
            help="The strength: once for all LoRAs, or once for each in their order; negative to "
            "subtract.  Default: 1.",
            show_default=False,
        ),
    ] = None,
    text_encoder_scale: Annotated[
        list[float] | None,
        typer.Option(
            metavar="S",
            help="The same for text encoders; 0 leaves them as they are.  Default: as --scale.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint with LoRAs merged into its weights.

    The U-Net, the VAE and CLIP text encoders get what the LoRAs have for them, in whichever layout
    and spelling; sums are formed in float32 and rounded once to the dtype that a tensor has in the
    file. Everything else stays as it is: other tensors, names, metadata, and of a folder the
    configs and tokenizers. Tensors are read one at a time.

    \b
    Examples:
      sdconv merge-lora v1-5.safetensors style.safetensors --scale 0.8 --out styled.safetensors
      sdconv merge-lora sdxl/ a.safetensors b.safetensors --scale 1 --scale 0.5 --out sdxl-merged/
      sdconv merge-lora v1-5.safetensors style.safetensors --text-encoder-scale 0.5 -o c.safetensors
    """
    from sdconv.lora.bake import bake_lora as write

    check_output(out, force, [checkpoint, *loras])
    with reading("merging") as progress:
        result = write(
            checkpoint, loras, out, scale or 1.0, text_encoder_scale or None, on_tensor=progress
        )
    if result.dequantised:
        say(f"{result.dequantised} scaled fp8 weights were multiplied by their scales", "note")
    if result.averages:
        say(f"{result.averages} running averages were left as they are", "note")
    for label, keys in result.skipped.items():
        listed = ", ".join(keys[:4])
        say(f"{label}: {len(keys)} keys were skipped: {listed}", "note")
    names = [str(file) for file in result.files]
    if as_json:
        print_json(
            {
                "files": names,
                "changes": _json(result.changes),
                "skipped": result.skipped,
                "averages": result.averages,
                "dequantised": result.dequantised,
            }
        )
        return
    for component, one in result.changes.items():
        typer.echo(
            f"{component}: {one.modules} modules changed, by {one.relative:.3g} at most "
            f"({one.largest})"
        )
    if not result.changes:
        typer.echo("nothing changed: every sum is rounded to the weight that was there")
    for name in names:
        typer.echo(name)


class LoraNames(StrEnum):
    """Whose names a LoRA's tensors have."""

    kohya = "kohya"
    peft = "peft"


def extract_lora(
    first: Annotated[Path, typer.Argument(metavar="A", help=_MODELS, show_default=False)],
    second: Annotated[
        Path,
        typer.Argument(metavar="B", help="The same model with other weights.", show_default=False),
    ],
    rank: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Of linear layers and 1x1 convolutions.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="The LoRA's file.", show_default=False),
    ],
    conv_rank: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Of larger convolutions; 0 leaves them out.  Default: as --rank.",
            show_default=False,
        ),
    ] = None,
    names: Annotated[
        LoraNames, typer.Option(help="Whose names the tensors get.")
    ] = LoraNames.kohya,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            parser=parse_dtype,
            metavar="DTYPE",
            help="What the matrices are stored in; B's own dtype if left out.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the LoRA that makes B of A, as far as its rank allows.

    Each layer's difference becomes its best approximation of that rank (a truncated singular value
    decomposition). For each component, the share of the difference's energy that is kept is
    printed, and what a LoRA cannot hold: norms, biases and embeddings that differ.

    \b
    Examples:
      sdconv extract-lora v1-5.safetensors tuned.safetensors --rank 32 --out tuned-lora.safetensors
      sdconv extract-lora base/ tuned/ --rank 64 --conv-rank 16 --names peft -o lora.safetensors
    """
    from sdconv.lora.extract import extract_lora as write

    check_output(out, force, [first, second])
    with reading("extracting") as progress:
        result = write(
            first,
            second,
            out,
            rank,
            conv_rank,
            names=names.value,
            dtype=None if dtype is None else dtype.in_torch(),
            on_tensor=progress,
        )
    for name, one in result.components.items():
        if one.left_out:
            listed = ", ".join(one.left_out[:4])
            say(f"{name}: {len(one.left_out)} tensors differ and are left out: {listed}", "note")
    short = str(result.dtype).removeprefix("torch.")
    if as_json:
        components = {name: one.to_json() for name, one in result.components.items()}
        print_json({"file": str(result.file), "dtype": short, "components": components})
        return
    for name, one in result.components.items():
        typer.echo(f"{name}: {one.layers} layers, {one.kept:.2%} of the energy kept")
    typer.echo(f"{result.file}: {short}")


def _shares(given: list[str], count: int) -> tuple[list[float] | None, dict[str, list[float]]]:
    """The shares for everything, and for single components, of what ``--weight`` says."""
    usual: list[float] | None = None
    own: dict[str, list[float]] = {}
    for text in given:
        component, _, numbers = text.rpartition("=")
        try:
            shares = [float(word) for word in numbers.split(",")]
        except ValueError:
            raise InputError(
                "not a share",
                where="--weight",
                expected="0.3, 0.5,0.25,0.25 or vae=0.5",
                got=repr(text),
            ) from None
        if len(shares) == 1 and count == 2:
            shares = [1 - shares[0], shares[0]]
        if component:
            own[component.strip()] = shares
        else:
            usual = shares
    return usual, own


def _changed(changes: Mapping[str, Change], component: str) -> str:
    if component not in changes:
        return "none changed"
    one = changes[component]
    return f"{one.tensors} changed, by {one.relative:.3g} at most ({one.largest})"


def _json(changes: Mapping[str, Change]) -> dict[str, Any]:
    return {name: one.to_json() for name, one in changes.items()}
