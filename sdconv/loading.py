"""From a path to a network: the whole line from file to module, for any layout, without a network
connection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from sdconv.backends import check_backend, set_backend
from sdconv.checkpoint.identify.find import (
    find_networks,
    is_bare_half,
    is_vae_projection,
    tiny_half,
)
from sdconv.checkpoint.identify.fit import fit
from sdconv.checkpoint.identify.infer import Identified, identify, warn_if_open
from sdconv.checkpoint.io.files import os_errors
from sdconv.checkpoint.io.source import (
    TORCH_DTYPES,
    Source,
    SourceFile,
    components_in,
    open_source,
)
from sdconv.errors import InputError, UnknownNetworkError, WeightsMismatchError
from sdconv.models.base import Network
from sdconv.models.tiny import AutoencoderTiny
from sdconv.models.unet import with_diffusers_transformers
from sdconv.models.vae import AutoencoderKL, AutoencoderKLFlux2

Weights = str | Path | Sequence[str | Path] | Mapping[str, Tensor]

BUILD: Mapping[str, Callable[..., Network]] = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderKLFlux2": AutoencoderKLFlux2,
    "AutoencoderTiny": AutoencoderTiny,
    "UNet2DConditionModel": with_diffusers_transformers,
}
# one-byte floats are for storage: nothing computes in them
_STORAGE_ONLY = frozenset(
    getattr(torch, name)
    for name in dir(torch)
    if name.startswith("float8") or name == "float4_e2m1fn_x2"
)


def load(
    path: Weights,
    component: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    family: str | None = None,
    backend: str = "reference",
    ema: bool = False,
) -> Network:
    """Opens a network from a checkpoint, in eval mode, never through a network connection.

    On the CPU, in the file's own dtype, safetensors weights are memory-mapped: nothing is read
    until it is used. Otherwise each tensor is read once, straight to the device and dtype.

    Args:
        path: a ``.safetensors``, ``.ckpt``, ``.pth`` or ``.bin`` file in diffusers' or the original
            layout; a folder of one component, or of a whole pipeline; several files of one network
            (shards, or a tiny autoencoder's two halves in any order); or a state dict, whose
            tensors are shared, not copied.
        component: ``"vae"`` or ``"unet"``; None for the only one there is.
        dtype: a floating-point dtype; None keeps the file's. A network computes in one dtype, so a
            file of several gives the widest, and one-byte floats become float32.
        device: where the weights go.
        family: the family, where shapes leave it open (``"sd1"``, ``"sdxl"``, ``"sd3"``,
            ``"flux1"``, ...).
        backend: the network's own, see ``sdconv.backend``: ``"reference"`` or ``"fast"``.
        ema: take the running averages of the weights that an original checkpoint keeps beside them
            (``model_ema.*``), in place of the weights.

    Returns:
        ``AutoencoderKL``, ``AutoencoderKLFlux2``, ``AutoencoderTiny`` or ``UNet2DConditionModel``;
        the last with diffusers' transformers in its slots, for which diffusers is imported.

    Raises:
        CheckpointError: what is there cannot be read as weights.
        UnknownNetworkError: no network that sdconv knows, several, or not the component asked for.
        WeightsMismatchError: a tensor is missing, unexpected or of the wrong shape.
        InputError: an argument has no such value.

    Warns:
        SdconvWarning: the family is open, and one was chosen.
    """
    _check_arguments(dtype, backend)
    place = usable_device(device)
    with open_source(_component_path(path, component)) as source:
        view = SourceView(source)
        names = {found.component: found for found in find_networks(view.shapes, source.label)}
        if names:
            component = _one_of(names, component, source.label)
        (chosen,) = view.identify(family, component)
        if ema:
            chosen = _averaged(chosen, source.label)
        warn_if_open(chosen)
        with torch.device("meta"):
            network = BUILD[chosen.found.kind](chosen.config)
        wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        fit(chosen, view.shapes, view.dtype, wanted).check(chosen, source.label)
        network.load_state_dict(
            _tensors(network, chosen, view, dtype, place), strict=True, assign=True
        )
    set_backend(network, backend)
    return network.eval()


class SourceView:
    """A source's tensors under names of one network each.

    The two files of a tiny autoencoder's halves both number their layers from 0: their names here
    begin with ``encoder.`` and ``decoder.``, which their shapes tell.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        files = source.files
        if len(files) > 1 and all(is_bare_half(_shapes(file)) for file in files):
            self._homes = _named_halves(source)
        else:
            # asked for as a whole, a source refuses a name that stands in two files
            names = list(source.entries)
            owners = {name: file for file in files for name in file.entries}
            self._homes = {name: (owners[name], name) for name in names}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by its name."""
        return {name: file.entries[own].shape for name, (file, own) in self._homes.items()}

    def dtype(self, name: str) -> str:
        """A tensor's dtype, by safetensors' name for it."""
        file, own = self._homes[name]
        return file.entries[own].dtype

    def home(self, name: str) -> tuple[SourceFile, str]:
        """The file that holds a tensor, and the tensor's name in it."""
        return self._homes[name]

    def tensor(self, name: str) -> Tensor:
        """The tensor on the CPU, mapped where the file allows it."""
        file, own = self._homes[name]
        return file.tensor(own)

    def identify(self, family: str | None, component: str | None = None) -> list[Identified]:
        """The networks in it, or only the one that is asked for."""
        return identify(
            self.shapes,
            metadata=self.source.metadata,
            family=family,
            component=component,
            config=self.source.config,
            where=self.source.label,
        )


def _named_halves(source: Source) -> dict[str, tuple[SourceFile, str]]:
    halves = [tiny_half(_shapes(file), file.label) for file in source.files]
    if sorted(halves) != ["decoder", "encoder"]:
        pairs = zip(source.files, halves, strict=True)
        raise UnknownNetworkError(
            "these files are not the two halves of a tiny autoencoder",
            where=source.label,
            expected="one encoder and one decoder",
            got=" and ".join(f"{file.label}: {half}" for file, half in pairs),
        )
    return {
        f"{half}.{name}": (file, name)
        for half, file in zip(halves, source.files, strict=True)
        for name in file.entries
    }


def _shapes(file: SourceFile) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in file.entries.items()}


def usable_device(device: str | torch.device) -> torch.device:
    """torch's device of that name.

    Raises:
        InputError: there is no such device here.
    """
    try:
        found = torch.device(device)
        torch.empty(1, device=found).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise InputError(
            "no such device here",
            where="device",
            expected="cpu, or cuda where torch finds a GPU",
            got=f"{device!r}: {str(error).splitlines()[0]}",
            hint="leave the device out",
        ) from error
    return found


def _check_arguments(dtype: torch.dtype | None, backend: str) -> None:
    check_backend(backend)
    if dtype is not None and not (
        isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype not in _STORAGE_ONLY
    ):
        raise InputError(
            "networks do not compute in this dtype",
            where="dtype",
            expected="torch.float32, float16, bfloat16 or float64",
            got=dtype,
        )


def pipeline_parts(path: Weights) -> dict[str, Path]:
    """The folders of a pipeline's networks by component; empty where ``path`` is no such folder.

    Raises:
        CheckpointError: the folder may not be listed.
    """
    if not isinstance(path, str | Path):
        return {}
    folder = Path(path)
    with os_errors(folder):
        if not folder.is_dir():
            return {}
    return {name: part for name, part in components_in(folder).items() if name in ("vae", "unet")}


def _component_path(path: Weights, component: str | None) -> Weights:
    """The component's own folder where ``path`` is a whole pipeline's."""
    parts = pipeline_parts(path)
    return parts[_one_of(parts, component, path)] if parts else path


def _one_of(known: Mapping[str, object], component: str | None, where: object) -> str:
    names = ", ".join(sorted(known)) or "none that sdconv knows"
    if component is None and len(known) == 1:
        return next(iter(known))
    if component is None:
        raise UnknownNetworkError(
            "one component must be chosen" if known else "no network that sdconv knows",
            where=where,
            expected="one component",
            got=names,
            hint="pass component=" + (" or component=".join(f"{name!r}" for name in sorted(known))),
        )
    if component not in known:
        raise UnknownNetworkError(
            f"there is no component {component!r}", where=where, expected=repr(component), got=names
        )
    return component


def _averaged(chosen: Identified, where: object) -> Identified:
    """The same network with the names of its weights' running averages."""
    if not chosen.found.ema:
        raise UnknownNetworkError(
            f"there are no running averages of the {chosen.component}",
            where=where,
            expected="tensors under model_ema.",
            got=f"{len(chosen.found.names)} weights without any",
            hint="leave ema=True out: many files hold the averages as their only weights",
        )
    return replace(chosen, found=replace(chosen.found, names=chosen.found.ema))


def _tensors(
    network: nn.Module,
    chosen: Identified,
    view: SourceView,
    dtype: torch.dtype | None,
    device: torch.device,
) -> dict[str, Tensor]:
    names = chosen.found.names
    if dtype is None:
        dtype = _common_dtype({view.dtype(name) for name in names.values()})
    state = {}
    for canonical, blank in network.state_dict().items():
        if canonical not in names:
            state[canonical] = torch.zeros_like(blank, device=device)
            continue
        tensor = view.tensor(names[canonical])
        if tensor.layout is not torch.strided:
            raise WeightsMismatchError(
                f"{names[canonical]} is no dense tensor",
                where=view.source.label,
                expected="a tensor whose numbers all stand in memory",
                got=tensor.layout,
                hint="pass tensor.to_dense() in its place",
            )
        if tensor.ndim == 4 and is_vae_projection(canonical):
            tensor = tensor.flatten(1)
        state[canonical] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    return state


def _common_dtype(names: Iterable[str]) -> torch.dtype:
    """The widest of some floating-point dtypes; one-byte floats count as float32."""
    stored = {TORCH_DTYPES[name] for name in names if name in TORCH_DTYPES}
    floats = {
        torch.float32 if dtype in _STORAGE_ONLY else dtype
        for dtype in stored
        if dtype.is_floating_point
    }
    return reduce(torch.promote_types, floats) if floats else torch.float32
