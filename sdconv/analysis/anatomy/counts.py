"""What is known of a network's operations, one by one, in blocks and in all."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

ROLES = ("convolution", "attention", "embedding", "normalisation", "activation", "upsampling")
"""What an operation is there for."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One operation. Pairs are (rows, columns).

    ``name``: of its module, with diffusers' names. ``block``: of the block that it is a part of.
    ``path``: ``"encode"`` or ``"decode"``. ``role``: one of ``ROLES``. ``kernel`` and ``stride``:
    of a convolution, else None. ``padding``: zeros above, below, left and right. ``in_size``,
    ``out_size``: of the map.

    ``receptive_field``: input pixels (latents, when decoding) that one output sees through the
    convolutions. ``step``: input pixels from one output to the next, below 1 after upsampling.
    ``sees_all``: an attention, here or before, lets every output see the whole map.
    """

    name: str
    block: str
    block_class: str
    path: str
    role: str
    kernel: tuple[int, int] | None
    stride: tuple[int, int] | None
    padding: tuple[int, int, int, int]
    in_channels: int
    out_channels: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    parameters: int
    multiplies: int
    receptive_field: tuple[int, int]
    step: tuple[Fraction, Fraction]
    sees_all: bool

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON has them; a step is text such as ``"1/2"``."""
        return {**vars(self), "step": [str(step) for step in self.step]}


@dataclass(frozen=True, kw_only=True)
class Block:
    """Operations that belong together, such as a ResNet block's; ``layers`` in the order they
    run."""

    name: str
    class_name: str
    path: str
    layers: tuple[Layer, ...]

    @property
    def convolutions(self) -> tuple[Layer, ...]:
        """Its convolutions."""
        return tuple(layer for layer in self.layers if layer.role == "convolution")

    @property
    def main(self) -> Layer:
        """Its first convolution, or else its first operation that is no normalisation."""
        plain = [layer for layer in self.layers if layer.role != "normalisation"]
        return (*self.convolutions, *plain, *self.layers)[0]

    @property
    def last(self) -> Layer:
        """The operation with the widest view among those that set its output's size."""
        return max(self.layers, key=lambda layer: (layer.sees_all, layer.receptive_field))

    @property
    def in_size(self) -> tuple[int, int]:
        """Rows and columns of what goes in."""
        return self.layers[0].in_size

    @property
    def out_size(self) -> tuple[int, int]:
        """Rows and columns of what comes out."""
        return self.layers[-1].out_size

    @property
    def in_channels(self) -> int:
        """Channels of what goes in."""
        return self.layers[0].in_channels

    @property
    def out_channels(self) -> int:
        """Channels of what comes out."""
        return self.layers[-1].out_channels

    @property
    def parameters(self) -> int:
        """Of all its layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def multiplies(self) -> int:
        """Of all its layers, for one picture."""
        return sum(layer.multiplies for layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class Total:
    """Counts of all operations of one role, and their shares of the network's."""

    role: str
    layers: int
    parameters: int
    multiplies: int
    parameter_share: float
    multiply_share: float


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A network's operations at one size of picture, ``(rows, columns)``."""

    class_name: str
    latent_channels: int
    size: tuple[int, int]
    blocks: tuple[Block, ...]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every operation, in the order they run."""
        return tuple(layer for block in self.blocks for layer in block.layers)

    @property
    def parameters(self) -> int:
        """Of the whole network."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def multiplies(self) -> int:
        """For one picture, through the latents and back."""
        return sum(layer.multiplies for layer in self.layers)

    @property
    def largest(self) -> int:
        """Numbers in the maps before and after the operation that has most: both are held at
        once."""
        return max(
            prod((layer.in_channels, *layer.in_size)) + prod((layer.out_channels, *layer.out_size))
            for layer in self.layers
        )

    def half(self, path: str) -> tuple[Block, ...]:
        """The blocks of ``"encode"`` or ``"decode"``; none where the network lacks that half."""
        return tuple(block for block in self.blocks if block.path == path)

    @property
    def totals(self) -> tuple[Total, ...]:
        """One for each role that occurs, in the order of ``ROLES``."""
        return tuple(
            Total(
                role=role,
                layers=len(layers),
                parameters=(parameters := sum(layer.parameters for layer in layers)),
                multiplies=(multiplies := sum(layer.multiplies for layer in layers)),
                parameter_share=parameters / self.parameters,
                multiply_share=multiplies / self.multiplies,
            )
            for role in ROLES
            if (layers := [layer for layer in self.layers if layer.role == role])
        )

    def to_json(self) -> dict[str, Any]:
        """What ``sdconv anatomy --json`` prints."""
        return {
            "class": self.class_name,
            "latent_channels": self.latent_channels,
            "size": self.size,
            "parameters": self.parameters,
            "multiplies": self.multiplies,
            "totals": [vars(total) for total in self.totals],
            "blocks": [
                {
                    "name": block.name,
                    "class": block.class_name,
                    "path": block.path,
                    "parameters": block.parameters,
                    "multiplies": block.multiplies,
                    "in_size": block.in_size,
                    "out_size": block.out_size,
                    "in_channels": block.in_channels,
                    "out_channels": block.out_channels,
                    "layers": [layer.to_json() for layer in block.layers],
                }
                for block in self.blocks
            ],
        }
