"""Assembles a network: builds it from a config, and fills it with a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor, nn

from sdconv.checkpoint.identify.find import is_vae_projection
from sdconv.checkpoint.identify.fit import fit
from sdconv.checkpoint.identify.infer import Identified, warn_if_open
from sdconv.checkpoint.io.source import TORCH_DTYPES
from sdconv.checkpoint.open import SourceView, Weights, one_of, open_component
from sdconv.config import Config
from sdconv.devices import usable_device
from sdconv.errors import InputError, UnknownNetworkError, WeightsMismatchError

Module = TypeVar("Module", bound=nn.Module)

# one-byte floats, in which weights are stored but no network computes
_STORAGE_ONLY = frozenset(
    getattr(torch, name)
    for name in dir(torch)
    if name.startswith("float8") or name == "float4_e2m1fn_x2"
)


def assemble(
    path: Weights,
    build: Callable[[Config], Module],
    *,
    component: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    family: str | None = None,
    ema: bool = False,
) -> Module:
    """Opens a network from a checkpoint, in eval mode.

    Args:
        path, component, dtype, device, family, ema: as for ``sdconv.load``.
        build: makes the network for a config; it is called on the meta device.

    Raises:
        SdconvError: as ``sdconv.load``, and what ``build`` raises.

    Warns:
        SdconvWarning: the family is open, and one was chosen.
    """
    _check_dtype(dtype)
    target = usable_device(device)
    with open_component(path, component) as source:
        view = SourceView(source)
        if view.networks:
            names = {found.component: found for found in view.networks}
            component = one_of(names, component, source.label)
        (identified,) = view.identify(family, component)
        if ema:
            identified = _averaged(identified, source.label)
        warn_if_open(identified, stacklevel=4)  # the caller of `load` or `from_pretrained`
        with torch.device("meta"):
            network = build(identified.config)
        fit(identified, view.shapes, view.dtype, shapes_in(network)).check(identified, source.label)
        network.load_state_dict(
            _tensors(network, identified, view, dtype, target), strict=True, assign=True
        )
    return network.eval()


def shapes_in(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and not (
        isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype not in _STORAGE_ONLY
    ):
        raise InputError(
            "networks do not compute in this dtype",
            where="dtype",
            expected="torch.float32, float16, bfloat16 or float64",
            got=dtype,
        )


def _averaged(identified: Identified, where: object) -> Identified:
    """The same network, with the names of its weights' running averages (EMA) as its tensors."""
    if not identified.found.ema:
        raise UnknownNetworkError(
            f"there are no running averages of the {identified.component}",
            where=where,
            expected="tensors under model_ema.",
            got=f"{len(identified.found.names)} weights without any",
            hint="leave ema=True out: many files hold the averages as their only weights",
        )
    return replace(identified, found=replace(identified.found, names=identified.found.ema))


def _tensors(
    network: nn.Module,
    identified: Identified,
    view: SourceView,
    dtype: torch.dtype | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """The network's state dict, read from the checkpoint."""
    names: Mapping[str, str] = identified.found.names
    if dtype is None:
        dtype = _common_dtype({view.dtype(name) for name in names.values()})
    state = {}
    for canonical, on_meta in network.state_dict().items():
        if canonical not in names:
            state[canonical] = torch.zeros_like(on_meta, device=device)
            continue
        tensor = view.tensor(names[canonical])
        if tensor.layout is not torch.strided:
            raise WeightsMismatchError(
                f"{names[canonical]} is not a dense tensor",
                where=view.source.label,
                expected="a tensor with all of its numbers in memory",
                got=tensor.layout,
                hint="pass tensor.to_dense() in its place",
            )
        if tensor.ndim == 4 and is_vae_projection(canonical):
            tensor = tensor.flatten(1)
        state[canonical] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    return state


def _common_dtype(names: Iterable[str]) -> torch.dtype:
    """The widest of these floating-point dtypes; one-byte floats count as float32."""
    stored = {TORCH_DTYPES[name] for name in names if name in TORCH_DTYPES}
    floats = {
        torch.float32 if dtype in _STORAGE_ONLY else dtype
        for dtype in stored
        if dtype.is_floating_point
    }
    return reduce(torch.promote_types, floats) if floats else torch.float32
