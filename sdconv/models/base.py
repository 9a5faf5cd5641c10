"""Base classes of the networks: ``Network``, and ``Autoencoder`` for the VAE and the tiny one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdconv.backends import provided
from sdconv.errors import InputError
from sdconv.models.blocks import Attention, Checkpointed, plain_attention
from sdconv.models.diffusers_api import DiffusersModel

# The attributes of accelerate's and diffusers' hooks, which may move or cast the input.
_HOOKS = ("_hf_hook", "_diffusers_hook")
# diffusers' attention processors, and the function by which each computes
_ATTENTION: Mapping[str, Callable[..., Tensor]] = {
    "AttnProcessor": plain_attention,
    "AttnProcessor2_0": F.scaled_dot_product_attention,
    "FusedAttnProcessor2_0": F.scaled_dot_product_attention,
    "XFormersAttnProcessor": F.scaled_dot_product_attention,
}

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
        """The dtype in which the network computes: that of the first floating-point parameter, or
        the one to which ``enable_layerwise_casting`` casts the weights."""
        for module in self.modules():
            hooks = vars(module).get("_diffusers_hook")
            if hooks is not None and (casting := hooks.get_hook("layerwise_casting")) is not None:
                return cast(torch.dtype, casting.compute_dtype)
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
    """Base class of the VAE and the tiny autoencoder: slicing, streaming, and checks of the
    input."""

    component: ClassVar[str] = "vae"
    use_slicing: bool = False
    # Set by enable_streaming: computes the output of "encode" or "decode".
    streaming: Callable[..., Tensor] | None = None

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

    def enable_streaming(
        self,
        memory_limit: int | str | None = "2GiB",
        spill: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        """Makes ``encode`` and ``decode`` compute in strips of rows, image by image, within a
        memory limit.

        Normalisation and attention still see the whole image, so the result differs from an
        ordinary run only by rounding. Gradients are not computed: an input that requires them is
        refused, and weights that require them get none.

        Args:
            memory_limit: for everything that a call allocates, the result included and weights and
                input excluded: ``"2GiB"``, a number of bytes, or None for no limit. On CUDA it
                limits the device's memory.
            spill: a folder on disk for feature maps that do not fit (``sdconv plan`` prints how
                large they become). With None, everything stays within the limit, except on CUDA,
                where it spills to the host's memory. A tiny autoencoder spills nothing.
            progress: shows a progress bar if standard error is a terminal.

        Raises:
            InputError: the limit is not a size, or the folder cannot be written to. ``encode`` and
                ``decode`` raise it later for a limit that is too low for the image, and name the
                lowest possible one.
        """
        from sdconv.streaming import Streaming

        self.streaming = Streaming.of(memory_limit, spill, progress)

    def disable_streaming(self) -> None:
        """Makes ``encode`` and ``decode`` compute whole feature maps again."""
        self.streaming = None

    def enable_tiling(self, use_tiling: object = True, *args: object, **kwargs: object) -> None:
        """Enables streaming in place of tiling, with the settings of an earlier
        ``enable_streaming``, otherwise without a memory limit.

        Args:
            use_tiling: False switches it off.
            args, kwargs: diffusers' tile sizes, which are ignored: streaming is exact, but tiles
                would change the image.
        """
        if not use_tiling:
            self.disable_streaming()
        elif self.streaming is None:
            self.enable_streaming(None)

    def disable_tiling(self) -> None:
        """Makes ``encode`` and ``decode`` compute whole feature maps again."""
        self.disable_streaming()

    @property
    def use_tiling(self) -> bool:
        """Whether images are processed in strips; assigning calls ``enable_tiling(value)``."""
        return self.streaming is not None

    @use_tiling.setter
    def use_tiling(self, value: bool) -> None:
        self.enable_tiling(value)

    @property
    def attn_processors(self) -> dict[str, Any]:
        """diffusers' processor of each attention layer, by its name in diffusers: those that were
        set, otherwise ``AttnProcessor2_0``. Imports diffusers."""
        default = provided("diffusers").AttnProcessor2_0
        return {
            name: getattr(block, "processor", None) or default()
            for name, block in self._attentions().items()
        }

    def set_attn_processor(self, processor: Any) -> None:
        """Chooses how attention is computed, by a processor of diffusers', for the same bits.

        ``AttnProcessor`` stands for scores that are computed as a whole, whose memory grows with
        the square of the number of positions. The others stand for torch's fused kernel. The fast
        backend and streaming compute attention in their own way.

        Args:
            processor: ``AttnProcessor``, ``AttnProcessor2_0``, ``FusedAttnProcessor2_0``,
                ``XFormersAttnProcessor``, or a dictionary of them, as ``attn_processors`` returns.

        Raises:
            InputError: another processor, or not one for each layer.
        """
        layers = self._attentions()
        where = f"{self.config.class_name}.set_attn_processor"
        several = isinstance(processor, Mapping)
        given = dict(processor) if several else dict.fromkeys(layers, processor)
        if others := {type(one).__name__ for one in given.values()} - set(_ATTENTION):
            raise InputError(
                "the attention cannot be replaced",
                where=where,
                expected=" or ".join(sorted(_ATTENTION)),
                got=", ".join(sorted(others)),
                hint="use diffusers' class of the same name",
            )
        if set(given) != set(layers):
            raise InputError(
                "not one processor for each attention layer",
                where=where,
                expected=", ".join(layers) or "none",
                got=", ".join(map(str, given)) or "none",
            )
        for name, block in layers.items():
            block.processor = given[name]
            block.attend = _ATTENTION[type(given[name]).__name__]

    def set_default_attn_processor(self) -> None:
        """Sets diffusers' ``AttnProcessor``, as diffusers' method does; despite its name this is
        not what networks begin with. Imports diffusers."""
        self.set_attn_processor(provided("diffusers").AttnProcessor())

    def fuse_qkv_projections(self) -> None:
        """Computes attention by torch's fused kernel, until ``unfuse_qkv_projections`` is called.

        The projections stay separate layers: the result is diffusers' to rounding."""
        vars(self)["_before_fusing"] = self.attn_processors
        self.set_attn_processor(provided("diffusers").FusedAttnProcessor2_0())

    def unfuse_qkv_projections(self) -> None:
        """Sets the attention processors that ``fuse_qkv_projections`` has replaced."""
        if before := vars(self).pop("_before_fusing", None):
            self.set_attn_processor(before)

    def _attentions(self) -> dict[str, Attention]:
        """The attention layers, by the names of their processors in diffusers."""
        return {
            f"{name}.processor": module
            for name, module in self.named_modules()
            if isinstance(module, Attention)
        }

    def enable_xformers_memory_efficient_attention(self, attention_op: object = None) -> None:
        """Does nothing: attention is torch's fused kernel, whose memory grows with the number of
        positions and not with its square."""

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Does nothing."""

    def _over_batch(self, run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        if self.use_slicing and batch.shape[0] > 1:
            return torch.cat([run(one) for one in torch.split(batch, 1)])
        return run(batch)

    def _checked(self, x: object, what: str, channels: int, least: int, part: nn.Module) -> Tensor:
        """Returns ``x`` if it is a batch with ``channels`` channels and at least ``least`` rows and
        columns, in the dtype and on the device of ``part``."""
        where = self.config.class_name
        if not isinstance(x, Tensor):
            x = _converted(x, what, where, channels, part)
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


def _converted(x: object, what: str, where: str, channels: int, part: nn.Module) -> object:
    """Pillow's images and numpy's arrays as a tensor with the dtype and on the device of ``part``;
    anything else as it is."""
    from sdconv.models.image_inputs import image_tensor, is_array, is_image, latent_tensor

    if what == "images" and channels == 3 and is_image(x):
        converted = image_tensor(x, where)
    elif what == "latents" and is_array(x):
        converted = latent_tensor(x, where)
    else:
        return x
    weight = next((p for p in part.parameters() if p.is_floating_point()), converted)
    return converted.to(weight.device, weight.dtype)


# --- checks that all networks make of their input, before any arithmetic


def check_tensor(x: object, what: str, where: str, expected: str) -> Tensor:
    """Returns ``x`` if it is a tensor.

    Args:
        x: the input.
        what: its name, for the error.
        where: the network's name.
        expected: the shape, in words.

    Raises:
        InputError: it is not.
    """
    if isinstance(x, Tensor):
        return x
    kind = type(x)
    array = kind.__module__ == "numpy" and kind.__name__ == "ndarray"
    raise InputError(
        f"{what} must be a tensor",
        where=where,
        expected=f"a torch.Tensor of shape {expected}",
        got="None" if x is None else f"{kind.__module__}.{kind.__qualname__}",
        hint="torch.from_numpy(array)" if array else None,
    )


def check_like(x: Tensor, part: nn.Module, what: str, where: str) -> None:
    """Refuses a tensor that the first layer of ``part`` cannot compute with.

    Under autocast, other floating-point dtypes pass. While a graph is traced, and where hooks may
    move or cast the input, the check is left to torch.

    Raises:
        InputError: it is not floating-point, or its device or dtype is not that of the weights.
    """
    if torch.compiler.is_compiling():
        return
    weight = next((p for p in part.parameters() if p.is_floating_point()), None)
    if weight is None or (x.dtype == weight.dtype and x.device == weight.device):
        return
    if not x.is_floating_point():
        raise InputError(
            f"{what} must be floating-point",
            where=where,
            expected=str(weight.dtype),
            got=str(x.dtype),
            hint="scale them as the network expects, and convert them with .to(network.dtype)",
        )
    check_device(x, weight.device, part, what, where)
    if x.dtype != weight.dtype and not (_may_change(part) or _casts(x, weight)):
        raise InputError(
            f"{what} must have the dtype of the weights",
            where=where,
            expected=str(weight.dtype),
            got=str(x.dtype),
            hint="convert them with .to(network.dtype), or use torch.autocast",
        )


def check_device(x: Tensor, device: torch.device, part: nn.Module, what: str, where: str) -> None:
    """Refuses a tensor that is not on ``device``, unless hooks in ``part`` may move it there.

    Raises:
        InputError: it is on another device.
    """
    if torch.compiler.is_compiling():
        return
    if x.device != device and not _may_change(part):
        raise InputError(
            f"{what} must be on the device of the weights",
            where=where,
            expected=str(device),
            got=str(x.device),
            hint="move them with .to(network.device)",
        )


def check_room(batch: int, area: int, channels: int, groups: int, where: str) -> None:
    """Refuses an input so small that a group of GroupNorm has a single value, which torch refuses.

    Args:
        batch: number of samples.
        area: height times width of the smallest feature map.
        channels: the lowest number of channels that are normalised there.
        groups: number of groups.
        where: the network's name.

    Raises:
        InputError: a group has a single value.
    """
    if channels == groups and batch * area == 1:
        raise InputError(
            "too small for this network: each group of GroupNorm would have a single value",
            where=where,
            expected="more than one value in each group",
            got=f"a 1x1 feature map with {channels} channels in {groups} groups",
            hint="use a larger image or larger latents, or a larger batch",
        )


def _may_change(part: nn.Module) -> bool:
    """Whether hooks may change the input of a layer in ``part``."""
    return any(
        module._forward_pre_hooks or any(hasattr(module, name) for name in _HOOKS)
        for module in part.modules()
    )


def _casts(x: Tensor, weight: Tensor) -> bool:
    """Whether autocast converts ``x``; it never converts float64."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return on and torch.float64 not in (x.dtype, weight.dtype)
