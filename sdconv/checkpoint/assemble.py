"""Assembles a network: builds it from a config, and fills it with a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sdconv.checkpoint.identify.detected import is_vae_projection
from sdconv.checkpoint.identify.fit import fit
from sdconv.checkpoint.identify.infer import Identified, warn_if_open
from sdconv.checkpoint.io.narrow import STORAGE_ONLY, Caster, check_dtype
from sdconv.checkpoint.io.tensor_files import TORCH_DTYPES
from sdconv.checkpoint.open import SourceView, Weights, one_of, open_component
from sdconv.config import Config
from sdconv.devices import on_meta, usable_device
from sdconv.errors import UnknownNetworkError, WeightsMismatchError

Module = TypeVar("Module", bound=nn.Module)


def assemble(
    path: Weights,
    build: Callable[[Config], Module],
    *,
    component: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    family: str | None = None,
    ema: bool = False,
    prefix: str | None = None,
    clamp: bool = False,
    mmap: bool = True,
    fields: Mapping[str, Any] | None = None,
) -> Module:
    """Opens a network from a checkpoint, in eval mode.

    Args:
        path, component, dtype, device, family, ema, prefix, clamp, mmap: as for ``sdconv.load``.
        build: makes the network for a config; it is called on the meta device.
        fields: of the config, which overrule what was found.

    Raises:
        SdconvError: as ``sdconv.load``, and what ``build`` raises.

    Warns:
        SdconvWarning: the family is open, and one was identified; or values were clamped.
    """
    check_dtype(dtype)
    target = usable_device(device)
    with open_component(path, component) as source:
        view = SourceView(source)
        if view.networks and prefix is None:
            names = {found.component: found for found in view.networks}
            component = one_of(names, component, source.label)
        identified, *more = view.identify(family, component, prefix)
        if more:  # both networks without a prefix
            one_of({one.component: one for one in (identified, *more)}, None, source.label)
        if ema:
            identified = averaged(identified, source.label)
        identified = _overruled(identified, fields or {})
        warn_if_open(identified, stacklevel=4)  # the caller of `load` or `from_pretrained`
        with on_meta():
            network = build(identified.config)
        fit(identified, view.shapes, view.dtype, shapes_in(network)).check(identified, source.label)
        caster = Caster(source.label, clamp=clamp)
        state = _tensors(network, identified, view, dtype, target, caster, mmap)
        source.check_unchanged()
        network.load_state_dict(state, strict=True, assign=True)
        caster.warn(stacklevel=4)
    return network.eval()


# fields that decide between families
_DECIDING = ("scaling_factor", "attention_head_dim")


def _overruled(identified: Identified, fields: Mapping[str, Any]) -> Identified:
    """The same network with other fields of its config."""
    kind = type(identified.config)
    own = {name: value for name, value in fields.items() if name in kind.field_names()}
    if not own:
        return identified
    config = kind.from_json({**identified.config.to_json(), **own}, "the fields of the config")
    if any(own.get(name) is not None for name in _DECIDING):
        return replace(identified, config=config.left_open(()), open_to=(), guess=None)
    return replace(identified, config=config)


def shapes_in(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def averaged(identified: Identified, where: object) -> Identified:
    """The same network with the names of its weights' running averages.

    Raises:
        UnknownNetworkError: it has none. WeightsMismatchError: some are missing.
    """
    if not identified.found.ema:
        raise UnknownNetworkError(
            f"there are no running averages of the {identified.component}",
            where=where,
            expected="tensors under model_ema.",
            got=f"{len(identified.found.names)} weights without any",
            hint="leave ema=True out: many files hold the averages as their only weights",
        )
    gone = [name for name in identified.found.names if name not in identified.found.ema]
    if gone:
        every = identified.found.averages
        raise WeightsMismatchError(
            f"{len(gone)} missing of the {len(identified.found.names)} running averages of the "
            f"{identified.component}",
            where=where,
            expected=", ".join(every.get(name, f"the average of {name}") for name in gone[:4]),
            got=f"{len(identified.found.ema)} averages",
            hint="leave ema=True out to load the weights themselves",
        )
    return replace(identified, found=replace(identified.found, names=identified.found.ema))


def _tensors(
    network: nn.Module,
    identified: Identified,
    view: SourceView,
    dtype: torch.dtype | None,
    device: torch.device,
    caster: Caster,
    mmap: bool,
) -> dict[str, Tensor]:
    """The network's state dict, read from the checkpoint; in memory of its own unless ``mmap``."""
    names: Mapping[str, str] = identified.found.names
    if dtype is None:
        dtype = _common_dtype({view.dtype(name) for name in names.values()})
    state = {}
    for canonical, built in network.state_dict().items():
        if canonical not in names:
            state[canonical] = torch.zeros_like(built, device=device)
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
        if tensor.ndim > 2 and is_vae_projection(canonical):
            tensor = tensor.flatten(1)
        wanted = dtype if tensor.is_floating_point() else tensor.dtype
        cast = caster.cast(tensor, wanted, names[canonical], device)
        is_the_files = cast.device == tensor.device and cast.data_ptr() == tensor.data_ptr()
        state[canonical] = cast.clone() if is_the_files and not mmap else cast
    return state


def _common_dtype(names: Iterable[str]) -> torch.dtype:
    """The widest of these floating-point dtypes; one-byte floats count as float32."""
    stored = {TORCH_DTYPES[name] for name in names if name in TORCH_DTYPES}
    floats = {
        torch.float32 if dtype in STORAGE_ONLY else dtype
        for dtype in stored
        if dtype.is_floating_point
    }
    return reduce(torch.promote_types, floats) if floats else torch.float32
