"""The modules of a patched pipeline, and the code that runs in it."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

from diffusers.models import downsampling, resnet, upsampling
from diffusers.models.autoencoders import vae as autoencoder
from helpers.pipelines import Run, pipeline, run
from torch import nn

REPLACED = (
    resnet.ResnetBlock2D,
    downsampling.Downsample2D,
    upsampling.Upsample2D,
    autoencoder.Encoder,
    autoencoder.Decoder,
)


@functools.cache
def plain(kind: str = "text") -> Run:
    """The result of an unchanged pipeline."""
    return run(pipeline(kind), kind)


def modules_of(target: Any) -> dict[str, nn.Module]:
    """All modules of a pipeline or module, by name."""
    if isinstance(target, nn.Module):
        return dict(target.named_modules())
    parts = {n: c for n, c in target.components.items() if isinstance(c, nn.Module)}
    return {f"{n}.{name}": m for n, part in parts.items() for name, m in part.named_modules()}


def classes(target: Any) -> dict[str, type]:
    return {name: type(module) for name, module in modules_of(target).items()}


def is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("sdconv.")


def code_of(kind: type[nn.Module]) -> CodeType:
    """The code of a class's own ``forward``, without the decorators around it."""
    return inspect.unwrap(kind.forward).__code__


def code_run_by(call: Callable[[], object]) -> set[CodeType]:
    """The code of the Python functions that run during a call."""
    ran: set[CodeType] = set()
    sys.setprofile(lambda frame, event, arg: ran.add(frame.f_code) if event == "call" else None)
    try:
        call()
    finally:
        sys.setprofile(None)
    return ran
