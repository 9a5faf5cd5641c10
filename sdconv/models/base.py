"""Base classes of the networks: ``Network``, and ``Autoencoder`` for the VAE and the tiny one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from sdconv.errors import InputError, SdconvError
from sdconv.models.blocks import Checkpointed
from sdconv.models.diffusers_api import DiffusersModel
from sdconv.models.inputs import check_like, check_tensor

# diffusers' attention processors that differ only in memory and rounding
_SAME_ATTENTION = frozenset(
    {"AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0", "XFormersAttnProcessor"}
)

Method = TypeVar("Method", bound=Callable[..., Any])


def apply_forward_hook(method: Method) -> Method:
    """Runs accelerate's CPU offload hook before ``method``, as it runs before ``forward``."""

    @functools.wraps(method)
    def wrapper(self: Network, *args: Any, **kwargs: Any) -> Any:
        hook = getattr(self, "_hf_hook", None)
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(self)
        return method(self, *args, **kwargs)

    return cast(Method, wrapper)


class Network(DiffusersModel):
    """A network built from a config, which diffusers pipelines accept in place of their own.

    ``Pipeline.from_pipe(pipe)`` keeps it where it would keep diffusers' class of the same name. A
    tiny autoencoder in a VAE's place has to be passed on, as in diffusers: ``from_pipe(pipe,
    vae=pipe.vae)``.
    """

    if TYPE_CHECKING:
        # `load(path)` may return any network, so attributes that only some of them have are not
        # checked statically. torch's own annotation makes each a tensor or a module.
        def __getattr__(self, name: str) -> Any: ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter, in which the network computes."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    def enable_gradient_checkpointing(self) -> None:
        """Saves memory in training: recomputes activations inside blocks in the backward pass."""
        self._set_gradient_checkpointing(True)

    def disable_gradient_checkpointing(self) -> None:
        """Stores all activations for the backward pass again."""
        self._set_gradient_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any part of the network recomputes activations."""
        return any(m.gradient_checkpointing for m in self.modules() if isinstance(m, Checkpointed))

    def _set_gradient_checkpointing(self, enabled: bool) -> None:
        for module in self.modules():
            if isinstance(module, Checkpointed):
                module.gradient_checkpointing = enabled


class Autoencoder(Network):
    """Base class of the VAE and the tiny autoencoder: slicing, and checks of the input."""

    component: ClassVar[str] = "vae"
    use_slicing: bool = False

    @property
    def downscale(self) -> int:
        """The factor by which an image is higher and wider than its latents."""
        raise NotImplementedError

    def enable_slicing(self) -> None:
        """Processes the images of a batch one by one: less memory, the same numbers."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Processes whole batches again."""
        self.use_slicing = False

    def enable_tiling(self, use_tiling: object = True, *args: object, **kwargs: object) -> None:
        """Refuses to tile: a tile's normalisation statistics are not the image's, so the result
        would differ.

        Args:
            use_tiling: False, which older versions of diffusers pass, does nothing.

        Raises:
            SdconvError: unless ``use_tiling`` is False.
        """
        if not use_tiling:
            return
        raise SdconvError(
            "tiling is not offered: GroupNorm and attention over tiles change the image",
            where=f"{self.config.class_name}.enable_tiling",
            hint="decode the whole image; enable_slicing() saves memory over a batch",
        )

    def disable_tiling(self) -> None:
        """Does nothing: tiling is never on."""

    @property
    def use_tiling(self) -> bool:
        """Whether images are processed in strips; assigning calls ``enable_tiling(value)``."""
        return getattr(self, "streaming", None) is not None

    @use_tiling.setter
    def use_tiling(self, value: bool) -> None:
        self.enable_tiling(value)

    def fuse_qkv_projections(self) -> None:
        """Does nothing: the one attention layer in each half is left as it is."""

    def unfuse_qkv_projections(self) -> None:
        """Does nothing."""

    @property
    def attn_processors(self) -> dict[str, Any]:
        """Empty: processors cannot replace the attention."""
        return {}

    def set_attn_processor(self, processor: Any) -> None:
        """Accepts the processors of diffusers that compute the same function, and changes nothing.

        Raises:
            SdconvError: any other processor.
        """
        given = processor.values() if isinstance(processor, Mapping) else (processor,)
        if others := {type(one).__name__ for one in given} - _SAME_ATTENTION:
            raise SdconvError(
                "the attention cannot be replaced",
                where=f"{self.config.class_name}.set_attn_processor",
                expected=" or ".join(sorted(_SAME_ATTENTION)),
                got=", ".join(sorted(others)),
                hint="use diffusers' class of the same name",
            )

    def set_default_attn_processor(self) -> None:
        """Does nothing: the network computes as diffusers does with its default processor."""

    def enable_xformers_memory_efficient_attention(self, attention_op: object = None) -> None:
        """Does nothing: attention is torch's fused kernel, whose memory grows with the number of
        positions and not with its square."""

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Does nothing."""

    def _over_batch(self, run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        if self.use_slicing and len(batch) > 1:
            return torch.cat([run(one) for one in torch.split(batch, 1)])
        return run(batch)

    def _checked(self, x: object, what: str, channels: int, least: int, part: nn.Module) -> Tensor:
        """Returns ``x`` if it is a batch with ``channels`` channels and at least ``least`` rows and
        columns, in the dtype and on the device of ``part``."""
        where = self.config.class_name
        x = check_tensor(x, what, where, f"(B, {channels}, H, W)")
        if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape or min(x.shape[2:]) < least:
            raise InputError(
                f"{what} have the wrong shape",
                where=where,
                expected=f"(B, {channels}, H, W) with B at least 1, H and W at least {least}",
                got=tuple(x.shape),
            )
        check_like(x, part, what, where)
        return x
