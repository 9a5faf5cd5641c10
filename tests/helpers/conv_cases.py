"""A convolution with what is fused with it, drawn from a seed, and its result in float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sdconv.fast.cpu import group_stats
from sdconv.fast.cpu.conv import Epilogue, Prologue, direct_conv, winograd_conv
from sdconv.fast.cpu.winograd import CONV3X3, Scheme

# relative to the largest value; the direct kernel's own error in float32 is about a third of it
WITHIN = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
GROUPS = 4


def expected_stats(x: Tensor, groups: int) -> Tensor:
    parts = x.double().reshape(len(x), groups, -1)
    return torch.stack([parts.mean(-1), parts.var(-1, correction=0)], dim=-1)


def prologue_in_float64(prologue: Prologue | None) -> Prologue | None:
    if prologue is None:
        return None
    return replace(prologue, weight=prologue.weight.double(), bias=prologue.bias.double())


def epilogue_in_float64(epilogue: Epilogue) -> Epilogue:
    added = (epilogue.bias, epilogue.temb, epilogue.residual)
    shortcut = epilogue.shortcut
    return Epilogue(
        *(None if t is None else t.double() for t in added),
        None if shortcut is None else (shortcut[0].double(), shortcut[1].double()),
    )


def lying(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; those of the first image for "one image
    repeated"."""
    match layout:
        case "channels last":
            return x.contiguous(memory_format=torch.channels_last)
        case "every other":
            return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]
        case "transposed":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        case "one image repeated":
            return x[:1].expand_as(x)
        case _:
            return x


class Case:
    """A convolution with prologue and epilogue, drawn from a seed."""

    def __init__(
        self,
        seed: int = 0,
        batch: int = 1,
        channels: int = 12,
        out_channels: int = 8,
        height: int = 11,
        width: int = 14,
        layout: str = "channels last",
        dtype: torch.dtype = torch.float32,
        normed: bool = True,
        shortcut: bool = False,
    ) -> None:
        random = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(dtype)

        self.x = lying(draw(batch, channels, height, width) + 0.5, layout)
        self.weight = draw(out_channels, channels, 3, 3) / (3 * channels**0.5)
        self.prologue = None
        if normed:
            stats = group_stats.group_stats(self.x, GROUPS)
            self.prologue = Prologue(stats, 1 + draw(channels) / 4, draw(channels), 1e-6, True)
        residual = draw(batch, channels if shortcut else out_channels, height, width)
        by = (draw(out_channels, channels, 1, 1), draw(out_channels)) if shortcut else None
        bias, temb = draw(out_channels), draw(batch, out_channels)
        self.epilogue = Epilogue(bias, temb, lying(residual, layout), by)

    def run(self, scheme: Scheme = CONV3X3) -> tuple[Tensor, Tensor]:
        return winograd_conv(self.x, self.weight, scheme, self.prologue, self.epilogue, GROUPS)

    def expected(self) -> Tensor:
        return direct_conv(
            self.x.double(),
            self.weight.double(),
            prologue_in_float64(self.prologue),
            epilogue_in_float64(self.epilogue),
        )


def in_place(case: Case) -> tuple[Tensor, Tensor]:
    """`Case.run`, whose output overwrites its input."""
    x = case.x.clone(memory_format=torch.channels_last)
    around = CONV3X3, case.prologue, case.epilogue, GROUPS
    return winograd_conv(x, case.weight, *around, in_place=True)
