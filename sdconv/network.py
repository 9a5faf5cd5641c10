"""What every network here has in common, and what lets it stand in for diffusers' class of the same
name."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdconv.checkpoint.write import write_folder
from sdconv.config import Config
from sdconv.errors import InputError, SdconvError

Method = TypeVar("Method", bound=Callable[..., Any])


class Recomputed(nn.Module):
    """A module that can forget its parts' activations and compute them again in the backward
    pass."""

    gradient_checkpointing: bool = False

    def call(self, part: Callable[..., Any], *args: Any) -> Any:
        """Runs ``part(*args)``, through ``torch.utils.checkpoint`` while gradient checkpointing is
        on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(part, *args, use_reentrant=False)
        return part(*args)


def moved_by_hooks(method: Method) -> Method:
    """Lets accelerate's CPU offload see a call of ``method``, as it sees one of ``forward``."""

    @functools.wraps(method)
    def wrapper(self: Network, *args: Any, **kwargs: Any) -> Any:
        hook = getattr(self, "_hf_hook", None)
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(self)
        return method(self, *args, **kwargs)

    return cast(Method, wrapper)


class Network(nn.Module):
    """A network built from a config.

    It stands in for the diffusers class that its config names: a pipeline takes it, moves it,
    offloads it, saves it under that class's name and accepts it in ``from_pretrained(...,
    vae=network)``. Pipelines decide that by ``isinstance`` and by the class's name, so once
    diffusers is imported ``network.__class__`` answers with diffusers' class, as proxies do in
    Python; ``type(network)`` stays sdconv's. diffusers is never imported here.
    """

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        # recorded by pipelines in model_index.json, so that what they save opens without sdconv
        self.__dict__["__module__"] = "diffusers"

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        diffusers = sys.modules.get("diffusers")
        # torch.compile looks attributes up by __class__, and is to find ours
        if diffusers is None or torch.compiler.is_compiling():
            return type(self)
        return getattr(diffusers, self.config.class_name, type(self))

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle insists that an object's __class__ be what it rebuilds
        return _rebuild, (type(self),), self.__dict__

    def register_to_config(self, **fields: Any) -> None:
        """Changes fields of the config, as some pipelines do with the VAE's scaling factor."""
        self.config = dataclasses.replace(self.config, **fields)  # type: ignore[type-var]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes in: its first floating-point parameter's."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The device of its first parameter."""
        return next(self.parameters()).device

    def enable_gradient_checkpointing(self) -> None:
        """Trades time for memory in training: activations inside blocks are computed again for the
        gradient."""
        self._set_gradient_checkpointing(True)

    def disable_gradient_checkpointing(self) -> None:
        """Keeps all activations again."""
        self._set_gradient_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any part of it recomputes activations."""
        return any(m.gradient_checkpointing for m in self.modules() if isinstance(m, Recomputed))

    def _set_gradient_checkpointing(self, enabled: bool) -> None:
        for module in self.modules():
            if isinstance(module, Recomputed):
                module.gradient_checkpointing = enabled

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes ``config.json`` and ``diffusion_pytorch_model[.variant].safetensors``, as
        pipelines ask for it.

        Args:
            save_directory: the component's folder; made if absent.
            safe_serialization: must be True; sdconv writes no pickles.
            variant: a word put into the file's name, such as ``"fp16"``.
            kwargs: nothing else is taken.

        Raises:
            InputError: an option that is not taken.
        """
        if not safe_serialization or kwargs:
            raise InputError(
                "sdconv writes one safetensors file for each network",
                where="save_pretrained",
                expected="safe_serialization=True and no further options",
                got=", ".join([f"safe_serialization={safe_serialization}", *kwargs]),
            )
        write_folder(self.state_dict(), self.config, Path(save_directory), variant=variant)


def _rebuild(cls: type[Network]) -> Network:
    return cls.__new__(cls)


class Autoencoder(Network):
    """What the two kinds of autoencoder share: slicing, and the check of what comes in."""

    use_slicing: bool = False

    @property
    def downscale(self) -> int:
        """How many pixels, along each side, one latent stands for."""
        raise NotImplementedError

    def enable_slicing(self) -> None:
        """Works through a batch picture by picture: less memory, the same numbers."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Works through a whole batch at once again."""
        self.use_slicing = False

    def enable_tiling(self, *args: object, **kwargs: object) -> None:
        """Refused: tiles see other normalisation statistics than the picture, so the result would
        differ.

        Raises:
            SdconvError: always.
        """
        raise SdconvError(
            "tiling is not offered: GroupNorm and attention over tiles change the picture",
            where=f"{self.config.class_name}.enable_tiling",
            fix="decode the picture whole; enable_slicing() saves memory over a batch",
        )

    def disable_tiling(self) -> None:
        """Nothing to do: tiling is never on."""

    def _over_batch(self, run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        if self.use_slicing and len(batch) > 1:
            return torch.cat([run(one) for one in torch.split(batch, 1)])
        return run(batch)

    def _checked(self, x: Tensor, what: str, channels: int, least: int) -> Tensor:
        """``x`` if it is a batch of maps with this many channels, at least ``least`` rows and
        columns."""
        if x.ndim != 4 or x.shape[1] != channels or min(x.shape[2:]) < least:
            raise InputError(
                f"{what} of the wrong shape",
                where=self.config.class_name,
                expected=f"(B, {channels}, H, W) with H and W at least {least}",
                got=tuple(x.shape),
            )
        return x
