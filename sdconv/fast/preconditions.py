"""Whether the fast backend may compute with a module's weights instead of calling the module."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.modules import module as torch_module

from sdconv.fast.cpu.tiling import MULTIPLE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# torch 2.6 has no function that asks for all of them
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


def _originals(kind: Any) -> tuple[Any, Any]:
    """``forward`` and ``_conv_forward`` of a class of torch's; ``...``, which equals neither, for
    a method that was replaced before sdconv was imported."""
    file = sys.modules[kind.__module__].__file__
    methods = (getattr(kind, name, None) for name in ("forward", "_conv_forward"))
    forward, conv_forward = (
        ...
        if m is not None and getattr(m, "__code__", None) and m.__code__.co_filename != file
        else m
        for m in methods
    )
    return forward, conv_forward


# Programs replace methods of torch's classes, for instance to make images seamless.
_METHODS: dict[type[nn.Module], tuple[Any, Any]] = {
    kind: _originals(kind) for kind in (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.SiLU, nn.Dropout)
}


def is_supported(x: Tensor) -> bool:
    """Whether the fast arithmetic can process a feature map: shape and dtype are supported, and
    neither autocast nor a transformation of torch.func is active."""
    return (
        x.ndim == 4
        and x.dtype in DTYPES
        and x.numel() > 0
        and not torch.is_autocast_enabled(x.device.type)
        and not _is_transformed()
    )


def _is_transformed() -> bool:
    """Whether torch.func or forward-mode gradients are active; they need torch's operations."""
    if torch.compiler.is_compiling():
        return False
    functions: Any = torch._C._functorch
    return forward_ad._current_level >= 0 or functions.peek_interpreter_stack() is not None


def is_conv3x3(module: nn.Module | None, x: Tensor, *, stride: int = 1, padding: int = 1) -> bool:
    """Whether a module is a bare 3x3 convolution with this stride and zero padding, in the dtype of
    ``x``."""
    return (
        isinstance(module, nn.Conv2d)
        and is_bare(module, nn.Conv2d)
        and module.kernel_size == (3, 3)
        and module.stride == (stride, stride)
        and module.padding == (padding, padding)
        and module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and _fits(module.weight, x)
    )


def is_image_conv(module: nn.Module | None, x: Tensor) -> bool:
    """Whether a module is a bare 3x3 convolution of an image, such as an encoder's first, that the
    CPU's arithmetic computes by a kernel of its own."""
    if not is_conv3x3(module, x):
        return False
    conv = cast(nn.Conv2d, module)
    return reads_image(conv) and is_eager(x, conv)


def reads_image(conv: nn.Conv2d) -> bool:
    """Whether a convolution has the channels of an image, and whole panels of outputs."""
    return conv.in_channels <= 3 and conv.out_channels % MULTIPLE == 0


def is_conv1x1(module: nn.Module | None, x: Tensor) -> bool:
    """Whether a module is a bare 1x1 convolution with stride 1, in the dtype of ``x``."""
    return (
        isinstance(module, nn.Conv2d)
        and is_bare(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding == (0, 0)
        and module.groups == 1
        and _fits(module.weight, x)
    )


def is_linear(module: nn.Module | None, x: Tensor) -> bool:
    """Whether a module is a bare linear layer in the dtype of ``x``."""
    return isinstance(module, nn.Linear) and is_bare(module, nn.Linear) and _fits(module.weight, x)


def is_norm(module: nn.Module | None, x: Tensor) -> bool:
    """Whether a module is a bare GroupNorm with weights in the dtype of ``x``."""
    return (
        isinstance(module, nn.GroupNorm)
        and is_bare(module, nn.GroupNorm)
        and module.affine
        and _fits(module.weight, x)
        # torch refuses to normalise a single value, with an error that must stay
        and x.shape[2] * x.shape[3] * module.num_channels > module.num_groups
    )


def is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module runs the ``forward`` of class ``kind`` and nothing else.

    It does not if the module is of a subclass (LoRA layers, parametrizations), has hooks, has a
    ``forward`` of its own (offloading), or is compiled; nor if the ``forward`` of torch's class was
    replaced. The same goes for a convolution's ``_conv_forward``, which ``forward`` calls.
    """
    return is_called_plainly(module, kind) and has_plain_methods(module, kind)


def is_diffusers(module: Any, name: str) -> bool:
    """Whether calling a module runs the ``forward`` that diffusers wrote for its class of this
    name, and nothing else."""
    kind = type(module)
    return _is_of_diffusers(kind, name, "forward") and is_bare(module, kind)


def is_diffusers_processor(processor: Any, name: str) -> bool:
    """Whether an attention processor is diffusers' of this name, with the ``__call__`` that
    diffusers wrote."""
    return _is_of_diffusers(type(processor), name, "__call__")


def _is_of_diffusers(kind: Any, name: str, method: str) -> bool:
    """Whether a class is diffusers' of this name, and the method was not replaced."""
    if kind.__name__ != name or not kind.__module__.startswith("diffusers.models."):
        return False
    code = getattr(getattr(kind, method), "__code__", None)
    return code is not None and code.co_filename == sys.modules[kind.__module__].__file__


def has_plain_methods(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module's ``forward`` and ``_conv_forward`` are those of class ``kind``, and torch's
    own if that is a class of torch's; and so is the function that these call."""
    _, conv_forward = _METHODS.get(kind, (None, None))
    return has_plain_forward(module, kind) and (
        conv_forward is None
        or (_is_plain(module, kind, "_conv_forward", conv_forward) and _is_plain_conv2d())
    )


def _is_plain_conv2d() -> bool:
    return torch.compiler.is_compiling() or functional.conv2d is torch.conv2d


def has_plain_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module's ``forward`` is that of class ``kind``, and torch's own if that is a class
    of torch's."""
    forward, _ = _METHODS.get(kind, (kind.forward, None))
    return _is_plain(module, kind, "forward", forward)


def _is_plain(module: nn.Module, kind: type[nn.Module], name: str, function: Any) -> bool:
    """Whether a method of a module is this function, not one of its own."""
    own = module.__dict__  # torch.compile traces no vars() before torch 2.7
    if name not in own:  # torch.compile cannot compare a bound method's function
        return getattr(kind, name) is function
    return getattr(own[name], "__func__", None) is function


def is_called_plainly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module of this very class runs its ``forward`` only: it has no hooks and is
    not compiled."""
    return (
        type(module) is kind
        and module._compiled_call_impl is None
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)
        )
    )


def is_eager(*operands: Tensor | nn.Conv2d | None) -> bool:
    """Whether kernels may be called directly: the tensors are plain, nothing is traced, no mode
    intercepts torch's operations, and no gradient is recorded. Otherwise custom operators are
    called in their place."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    tensors: list[Tensor] = []
    for operand in operands:
        if isinstance(operand, nn.Conv2d):
            tensors += operand.parameters(recurse=False)
        elif operand is not None:
            tensors.append(operand)
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _fits(weight: Tensor, x: Tensor) -> bool:
    return weight.device == x.device and weight.dtype == x.dtype
