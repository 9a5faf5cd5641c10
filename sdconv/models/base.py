"""What every network here has in common."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdconv.errors import InputError, SdconvError
from sdconv.models.diffusers_api import DiffusersModel
from sdconv.models.inputs import check_like, check_tensor

# diffusers' attention processors that differ in memory and rounding only
_SAME_ATTENTION = frozenset(
    {"AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0", "XFormersAttnProcessor"}
)

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


class Network(DiffusersModel):
    """A network built from a config, which a diffusers pipeline takes for its own.

    ``Pipeline.from_pipe(pipe)`` keeps it where it keeps diffusers' class of the same name; a tiny
    autoencoder in a VAE's place has to be named, there as in diffusers: ``from_pipe(pipe,
    vae=pipe.vae)``.
    """

    if TYPE_CHECKING:
        # `load(path)` may return any network: what not all of them have is not checked statically.
        # torch's own annotation says that an unknown attribute is a tensor or a module.
        def __getattr__(self, name: str) -> Any: ...

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


class Autoencoder(Network):
    """What the two kinds of autoencoder share: slicing, and the check of what comes in."""

    component: ClassVar[str] = "vae"
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

    def enable_tiling(self, use_tiling: object = True, *args: object, **kwargs: object) -> None:
        """Refused: tiles see other normalisation statistics than the picture, so the result would
        differ.

        Args:
            use_tiling: False, which older versions of diffusers take too, leaves it off.

        Raises:
            SdconvError: tiling is asked for.
        """
        if not use_tiling:
            return
        raise SdconvError(
            "tiling is not offered: GroupNorm and attention over tiles change the picture",
            where=f"{self.config.class_name}.enable_tiling",
            hint="decode the picture whole; enable_slicing() saves memory over a batch",
        )

    def disable_tiling(self) -> None:
        """Nothing hint: tiling is never on."""

    @property
    def use_tiling(self) -> bool:
        """Whether a picture is worked through in parts; setting it is ``enable_tiling(value)``."""
        return getattr(self, "streaming", None) is not None

    @use_tiling.setter
    def use_tiling(self, value: bool) -> None:
        self.enable_tiling(value)

    def fuse_qkv_projections(self) -> None:
        """Nothing hint: the one attention layer in each half is left as it is."""

    def unfuse_qkv_projections(self) -> None:
        """Nothing to do."""

    @property
    def attn_processors(self) -> dict[str, Any]:
        """Empty: what attention it has is one function, which no processor replaces."""
        return {}

    def set_attn_processor(self, processor: Any) -> None:
        """Takes diffusers' processors that compute what is computed here, and changes nothing.

        Raises:
            SdconvError: another processor.
        """
        given = processor.values() if isinstance(processor, Mapping) else (processor,)
        if others := {type(one).__name__ for one in given} - _SAME_ATTENTION:
            raise SdconvError(
                "its attention cannot be replaced",
                where=f"{self.config.class_name}.set_attn_processor",
                expected=" or ".join(sorted(_SAME_ATTENTION)),
                got=", ".join(sorted(others)),
                hint="use diffusers' class for this",
            )

    def set_default_attn_processor(self) -> None:
        """Nothing hint: it computes as diffusers does with its default processor."""

    def enable_xformers_memory_efficient_attention(self, attention_op: object = None) -> None:
        """Nothing hint: where it has attention, that is torch's fused kernel, whose memory grows
        with the number of positions and not with its square."""

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Nothing to do."""

    def _over_batch(self, run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        if self.use_slicing and len(batch) > 1:
            return torch.cat([run(one) for one in torch.split(batch, 1)])
        return run(batch)

    def _checked(self, x: object, what: str, channels: int, least: int, part: nn.Module) -> Tensor:
        """``x`` if it is a batch of maps with this many channels, at least ``least`` rows and
        columns, and ``part`` can compute with it."""
        where = self.config.class_name
        x = check_tensor(x, what, where, f"(B, {channels}, H, W)")
        if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape or min(x.shape[2:]) < least:
            raise InputError(
                f"{what} of the wrong shape",
                where=where,
                expected=f"(B, {channels}, H, W) with B at least 1, H and W at least {least}",
                got=tuple(x.shape),
            )
        check_like(x, part, what, where)
        return x
