"""A network's operations, one by one, in blocks and in total."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby
from math import prod
from typing import Any

from sdconv.sizes import format_padding, format_pair

ROLES = (
    "convolution",
    "attention",
    "feed-forward",
    "embedding",
    "normalisation",
    "activation",
    "upsampling",
)
"""The kinds of operations."""

PATHS = ("encode", "decode", "denoise")
"""What a network does: the two halves of an autoencoder, a U-Net."""

_MACS = frozenset({"convolution", "attention", "feed-forward", "embedding"})


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation of a network. Pairs are (rows, columns).

    ``name``: its module's, by diffusers' names. ``block``: the name of the block it belongs to.
    ``path``: one of ``PATHS``. ``role``: one of ``ROLES``. ``kernel``, ``stride``: a
    convolution's, else None. ``padding``: zeros above, below, left and right. ``in_size``,
    ``out_size``: of the feature map; for a prompt, tokens and 1.

    ``receptive_field``: the input pixels (latents, unless encoding) that one output depends on
    through convolutions, the widest of all paths through skips. ``downscale``: input pixels from
    one output to the next, below 1 after upsampling. Both are None for what does not depend on the
    feature map: embeddings of the timestep and the prompt. ``global_receptive_field``: whether
    attention, here or before, makes every output depend on the whole input.
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
    receptive_field: tuple[int, int] | None
    downscale: tuple[Fraction, Fraction] | None
    global_receptive_field: bool

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image: of convolutions, linear layers and attention, as
        torch's FlopCounterMode counts them, who calls each two FLOPs."""
        return self.multiplies if self.role in _MACS else 0

    @property
    def activations(self) -> int:
        """Values in its output, for one image."""
        return prod((self.out_channels, *self.out_size))

    def to_json(self, itemsize: int = 4) -> dict[str, Any]:
        """The fields as JSON has them; a downscale factor is text such as ``"1/2"``.

        Args:
            itemsize: bytes of a value, for the memory of weights and activations.
        """
        downscale = self.downscale and [str(factor) for factor in self.downscale]
        own = {"macs": self.macs, "activations": self.activations, **_memory(self, itemsize)}
        return {**vars(self), **own, "downscale": downscale}


@dataclass(frozen=True, kw_only=True)
class Block:
    """Operations that belong together, such as a ResNet block's, in the order in which they run."""

    name: str
    class_name: str
    path: str
    operations: tuple[Operation, ...]

    @property
    def convolutions(self) -> tuple[Operation, ...]:
        """Its convolutions."""
        return tuple(one for one in self.operations if one.role == "convolution")

    @property
    def main(self) -> Operation:
        """Its first convolution, or else its first operation other than normalisation."""
        others = [one for one in self.operations if one.role != "normalisation"]
        return (*self.convolutions, *others, *self.operations)[0]

    @property
    def last(self) -> Operation:
        """The operation with the largest receptive field."""
        return max(
            self.operations, key=lambda one: (one.global_receptive_field, one.receptive_field or ())
        )

    @property
    def in_size(self) -> tuple[int, int]:
        """Rows and columns of the input."""
        return self.operations[0].in_size

    @property
    def out_size(self) -> tuple[int, int]:
        """Rows and columns of the output."""
        return self.operations[-1].out_size

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.operations[0].in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.operations[-1].out_channels

    @property
    def parameters(self) -> int:
        """The number of its parameters."""
        return sum(one.parameters for one in self.operations)

    @property
    def multiplies(self) -> int:
        """Multiplies for one image."""
        return sum(one.multiplies for one in self.operations)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return sum(one.macs for one in self.operations)

    @property
    def activations(self) -> int:
        """Values in the outputs of all its operations, for one image: what training keeps of an
        image for the backward pass."""
        return sum(one.activations for one in self.operations)


@dataclass(frozen=True, kw_only=True)
class Total:
    """All operations of one role, counted, and their shares of the network."""

    role: str
    operations: int
    parameters: int
    multiplies: int
    macs: int
    parameter_share: float
    multiply_share: float


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A network's operations for an image of one size, ``(rows, columns)``, or for its latents.

    ``latent_channels``: channels of the latents that a U-Net predicts, or an autoencoder's.
    """

    class_name: str
    latent_channels: int
    size: tuple[int, int]
    blocks: tuple[Block, ...]

    @property
    def operations(self) -> tuple[Operation, ...]:
        """Every operation, in the order in which they run."""
        return tuple(one for block in self.blocks for one in block.operations)

    @property
    def parameters(self) -> int:
        """The number of the network's parameters."""
        return sum(one.parameters for one in self.operations)

    @property
    def multiplies(self) -> int:
        """Multiplies for one image, through the latents and back."""
        return sum(one.multiplies for one in self.operations)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image, through the latents and back."""
        return sum(one.macs for one in self.operations)

    def at_depth(self, depth: int) -> Anatomy:
        """The same operations in coarser blocks: those whose names share their first ``depth``
        parts, such as ``encoder.down_blocks.0`` at depth 3."""

        def group(one: Operation) -> tuple[str, str]:
            return one.path, ".".join(one.block.split(".")[:depth])

        blocks = []
        for (path, name), members in groupby(self.operations, key=group):
            own = tuple(members)
            kinds = {one.block_class for one in own if one.block == name}
            class_name = kinds.pop() if len(kinds) == 1 else ""
            blocks.append(Block(name=name, class_name=class_name, path=path, operations=own))
        return replace(self, blocks=tuple(blocks))

    def to_rows(self, *, every: bool = False, itemsize: int = 4) -> Iterator[dict[str, Any]]:
        """A flat row for each block, or for each operation with ``every``, as a CSV file has them.

        Args:
            every: one row for each operation.
            itemsize: bytes of a value, for the memory of weights and activations.
        """
        for block in self.blocks:
            for one in block.operations if every else (block,):
                widest = one if isinstance(one, Operation) else one.last
                yield {
                    "path": block.path,
                    "block": block.name,
                    "name": one.name,
                    "kind": one.role if isinstance(one, Operation) else one.class_name,
                    **_geometry(one),
                    "in_channels": one.in_channels,
                    "out_channels": one.out_channels,
                    "in_rows": one.in_size[0],
                    "in_columns": one.in_size[1],
                    "out_rows": one.out_size[0],
                    "out_columns": one.out_size[1],
                    "parameters": one.parameters,
                    **_memory(one, itemsize),
                    "macs": one.macs,
                    "downscale": _both(widest.downscale),
                    "receptive_field": _both(widest.receptive_field),
                    "global_receptive_field": widest.global_receptive_field,
                }

    @property
    def peak_values(self) -> int:
        """The most values that one operation's input and output hold together."""
        return max(
            prod((one.in_channels, *one.in_size)) + prod((one.out_channels, *one.out_size))
            for one in self.operations
        )

    def blocks_of(self, path: str) -> tuple[Block, ...]:
        """The blocks of one of ``PATHS``; none if the network does not have it."""
        return tuple(block for block in self.blocks if block.path == path)

    @property
    def totals(self) -> tuple[Total, ...]:
        """A total for each role that occurs, in the order of ``ROLES``."""
        return tuple(
            Total(
                role=role,
                operations=len(own),
                parameters=(parameters := sum(one.parameters for one in own)),
                multiplies=(multiplies := sum(one.multiplies for one in own)),
                macs=sum(one.macs for one in own),
                parameter_share=parameters / self.parameters,
                multiply_share=multiplies / self.multiplies,
            )
            for role in ROLES
            if (own := [one for one in self.operations if one.role == role])
        )

    def to_json(self, itemsize: int = 4) -> dict[str, Any]:
        """What ``sdconv anatomy --json`` prints.

        Args:
            itemsize: bytes of a value, for the memory of weights and activations.
        """
        return {
            "class": self.class_name,
            "latent_channels": self.latent_channels,
            "size": self.size,
            "parameters": self.parameters,
            "multiplies": self.multiplies,
            "macs": self.macs,
            "totals": [vars(total) for total in self.totals],
            "blocks": [
                {
                    "name": block.name,
                    "class": block.class_name,
                    "path": block.path,
                    "parameters": block.parameters,
                    "multiplies": block.multiplies,
                    "macs": block.macs,
                    "activations": block.activations,
                    **_memory(block, itemsize),
                    "in_size": block.in_size,
                    "out_size": block.out_size,
                    "in_channels": block.in_channels,
                    "out_channels": block.out_channels,
                    "operations": [one.to_json(itemsize) for one in block.operations],
                }
                for block in self.blocks
            ],
        }


def _memory(one: Operation | Block, itemsize: int) -> dict[str, int]:
    return {
        "weight_bytes": one.parameters * itemsize,
        "activation_bytes": one.activations * itemsize,
    }


def _geometry(one: Operation | Block) -> dict[str, str]:
    """Kernel, stride and padding of a convolution, or of a block's only one; else empty."""
    found = (one,) if isinstance(one, Operation) else one.convolutions
    conv = found[0] if len(found) == 1 else None
    if conv is None or conv.kernel is None or conv.stride is None:
        return {"kernel": "", "stride": "", "padding": ""}
    return {
        "kernel": "x".join(map(str, conv.kernel)),
        "stride": format_pair(conv.stride),
        "padding": format_padding(conv.padding),
    }


def _both(pair: tuple[object, object] | None) -> str:
    return "" if pair is None else format_pair(pair)
