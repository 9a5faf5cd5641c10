"""Infers a tiny autoencoder's config from the shapes of its layers, in their order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sdconv.checkpoint.identify.shapes import BY_CALLER, InferredConfig, NetworkShapes, Shape
from sdconv.config import AutoencoderTinyConfig

TINY_FAMILIES = ("taesd", "taesdxl", "taesd3", "taef1", "taef2", "taesana")


def read_tiny(shapes: NetworkShapes, family: str | None = None) -> InferredConfig:
    """The config of a tiny autoencoder, or of one half of it.

    Args:
        shapes: of its tensors.
        family: one of ``TINY_FAMILIES``, if the caller knows it; no number depends on it.

    Raises:
        WeightsMismatchError: a layer is incomplete, or the halves are of different networks.
    """
    encoder = _tiny_layers(shapes, "encoder")
    decoder = _tiny_layers(shapes, "decoder")
    assumed = AutoencoderTinyConfig.assumed
    stem, encoder_channels, encoder_blocks = _tiny_encoder(encoder)
    decoder_channels, decoder_blocks = _tiny_decoder(decoder)
    latent = decoder[0].shape[1] if decoder else encoder[-1].shape[0]
    if encoder and decoder and encoder[-1].shape[0] != latent:
        raise shapes.mismatch(
            "the encoder and the decoder belong to different autoencoders",
            expected=f"{latent} latent channels, the decoder's",
            got=f"{encoder[-1].shape[0]} out of the encoder",
            hint="load the two halves of one autoencoder",
        )
    pooled = any(layer.pooled for layer in (*encoder, *decoder))
    config = shapes.config(
        AutoencoderTinyConfig,
        in_channels=encoder[0].shape[1] if encoder else 3,
        out_channels=decoder[-1].shape[0] if decoder else 3,
        encoder_block_out_channels=encoder_channels,
        decoder_block_out_channels=decoder_channels,
        num_encoder_blocks=encoder_blocks,
        num_decoder_blocks=decoder_blocks,
        latent_channels=latent,
        encoder_stem_channels=stem,
        use_midblock_gn=pooled,
        latent_magnitude=assumed["latent_magnitude"],
        latent_shift=assumed["latent_shift"],
        force_upcast=assumed["force_upcast"],
        scaling_factor=assumed["scaling_factor"],
        shift_factor=assumed["shift_factor"],
    )
    if family is not None:
        return InferredConfig(config=config, family=family, evidence=BY_CALLER)
    name = (
        "taef2"
        if pooled
        else "taesana"
        if stem or len(decoder_blocks) == 6
        else {4: "taesd or taesdxl", 16: "taesd3 or taef1"}.get(latent, "taesd-like")
    )
    # these families do not differ in any number, so nothing is left open
    return InferredConfig(config=config, family=name, evidence="layers and latent channels")


@dataclass(frozen=True)
class _Layer:
    """A layer of a tiny autoencoder: its first convolution's shape and what it is."""

    shape: Shape
    block: bool
    biased: bool
    pooled: bool


def _tiny_layers(shapes: NetworkShapes, half: str) -> list[_Layer]:
    """The layers of one half that have weights, in order; empty if that half is absent."""
    parts: dict[int, set[str]] = {}
    for name in shapes:
        if match := re.match(rf"{half}\.layers\.([0-9]{{1,4}})\.(.+)", name):
            parts.setdefault(int(match[1]), set()).add(match[2])
    numbered = {}
    for number, names in sorted(parts.items()):
        block = any(name.startswith("conv.") for name in names)
        first = f"{half}.layers.{number}.{'conv.0.weight' if block else 'weight'}"
        numbered[number] = _Layer(
            shape=shapes.axes(first, 4),
            block=block,
            biased="bias" in names,
            pooled=any(name.startswith("pool.") for name in names),
        )
    _check_numbers(shapes, half, numbered)
    layers = list(numbered.values())
    if layers and (layers[0].block or layers[-1].block or len(layers) < 3):
        raise shapes.mismatch(
            f"the {half} of the tiny autoencoder is incomplete",
            expected="a convolution at each end and blocks between",
            got=f"{len(layers)} layers with weights",
        )
    return layers


def _check_numbers(shapes: NetworkShapes, half: str, layers: Mapping[int, _Layer]) -> None:
    """Refuses a half in which the number of a missing layer cannot be that of a layer without
    weights: an activation after a convolution, or the decoder's upsampling before one."""
    convolutions = {number for number, layer in layers.items() if not layer.block}
    for number in set(range(max(layers, default=0))) - set(layers):
        upsamples = half == "decoder" and number + 1 in convolutions
        if number - 1 not in convolutions and not upsamples:
            shapes.axes(f"{half}.layers.{number + (half == 'decoder')}.weight", 4)


def _tiny_encoder(
    layers: list[_Layer],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The stem's channels, and the channels and number of blocks of each stage."""
    if not layers:
        return (), (), ()
    first, *body = layers[:-1]
    stem = [first, *(layer for layer in body if layer.biased and not layer.block)]
    channels, blocks = _stages(stem[-1].shape[0], body)
    # a stem of one convolution has stride 1; the strided stem has several
    strided = tuple(layer.shape[0] for layer in stem) if len(stem) > 1 else ()
    return strided, channels, blocks


def _tiny_decoder(layers: list[_Layer]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The channels and number of blocks of each stage."""
    return _stages(layers[0].shape[0], layers[1:-1]) if layers else ((), ())


def _stages(first: int, layers: list[_Layer]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The channels and number of blocks of each stage.

    A stage begins at a convolution without bias: one with stride 2, or one after upsampling.
    """
    channels, blocks = [first], [0]
    for layer in layers:
        if layer.block:
            blocks[-1] += 1
        elif not layer.biased:
            channels.append(layer.shape[0])
            blocks.append(0)
    return tuple(channels), tuple(blocks)
