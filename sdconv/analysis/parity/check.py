"""Check a file's network against the one that another library builds from the same file."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdconv.analysis.parity.compare import ModuleDifference, compare
from sdconv.checkpoint.io.narrow import Caster
from sdconv.checkpoint.io.source import open_source
from sdconv.checkpoint.open import SourceView, Weights, pipeline_parts
from sdconv.devices import usable_device
from sdconv.errors import InputError
from sdconv.loading import load
from sdconv.models.base import Network
from sdconv.models.dummy_inputs import Noise, inputs_for

_EXACT = (torch.float32, torch.float64)
_EQUAL = "the same operations in the same order: equal bit for bit"
_WITHIN = (
    "for each module twice the reference's own error in {dtype} against float64, with the same"
    " {dtype} weights and input"
)


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """The result of a comparison.

    ``label``: the file. ``against``: the reference and its version. ``conversion``: how the file's
    names became the reference's. ``input_shapes``: method -> the shape of its image or latents.
    ``rows``: one for each call of each module, in the order in which they finished.
    ``tolerance_source``: where the tolerance comes from.
    """

    label: str
    component: str
    class_name: str
    against: str
    conversion: str
    dtype: str
    device: str
    input_shapes: dict[str, tuple[int, ...]]
    rows: tuple[ModuleDifference, ...]
    tolerance_source: str

    @property
    def tolerance(self) -> float:
        """The largest tolerance of any row; 0 if only equality passes."""
        return max(row.tolerance for row in self.rows)

    @property
    def first_difference(self) -> str | None:
        """The first module whose output differs from the reference's in any bit; None if none
        does."""
        return next((row.name for row in self.rows if not row.equal or not row.passed), None)

    @property
    def worst(self) -> ModuleDifference:
        """The row with the largest relative difference, among those that failed if any did."""
        return max(self.rows, key=lambda row: (not row.passed, _size(row.relative)))

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return all(row.passed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """The report in JSON's types; infinite numbers and NaN become text."""
        summary = {
            "passed": self.passed,
            "first_difference": self.first_difference,
            "tolerance": self.tolerance,
            "worst": self.worst,
        }
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: _plain(value) for name, value in (fields | summary).items()}


def check(
    path: Weights,
    *,
    component: str | None = None,
    against: str = "diffusers",
    family: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    size: tuple[int, int] | None = None,
    seed: int = 0,
    batch: int = 1,
    prefix: str | None = None,
    ema: bool = False,
    clamp: bool = False,
    on_module: Callable[[str, int, int], None] | None = None,
) -> ParityReport:
    """Build a file's network with sdconv and with a reference, and compare every module.

    On the CPU, float32 and float64 must agree bit for bit. Elsewhere rounding depends on the
    kernel, and the tolerance is derived from the reference's own error against float64; see
    ``sdconv.analysis.parity.compare``.

    Args:
        path, component, family, prefix, ema, clamp: as for ``sdconv.load``.
        against: ``"diffusers"``.
        dtype: the dtype that both compute in; None for float32.
        device: ``"cpu"`` or ``"cuda"``.
        size: rows and columns of an autoencoder's image (None for 96 x 128), or of a U-Net's
            latents (24 x 32).
        seed: of the random input. Images and latents are standard normal, timesteps and labels
            uniform.
        batch: how many images or latents at once.
        on_module: called after each module with its name, the number compared so far, and of all.

    Raises:
        InputError: an argument is invalid, or there is no such device.
        SdconvError: the reference has no such network, or the file cannot be opened, as for
            ``sdconv.load``.
    """
    dtype = dtype or torch.float32
    device = usable_device(device)
    sides = tuple(size) if isinstance(size, tuple | list) else (1, 1) if size is None else (size,)
    if len(sides) != 2 or any(type(n) is not int or n < 1 for n in (batch, *sides)):
        raise InputError(
            "not a batch of images",
            where="batch, size",
            expected="positive numbers of images, rows and columns",
            got=(batch, size),
        )
    if against != "diffusers":
        raise InputError(
            "unknown reference", where="against", expected="'diffusers'", got=repr(against)
        )
    chosen: dict[str, Any] = {
        "component": component,
        "family": family,
        "prefix": prefix,
        "ema": ema,
    }
    ours = load(path, dtype=dtype, device=device, clamp=clamp, **chosen)
    other = reference_network(path, ours, dtype=dtype, clamp=clamp, **chosen)
    exact = device.type == "cpu" and dtype in _EXACT
    truth = None if exact else copy.deepcopy(other.network).double()
    inputs = inputs_for(ours, size, Noise(batch, seed, dtype, device))
    return ParityReport(
        label=other.label,
        component=other.component,
        class_name=ours.config.class_name,
        against=other.version,
        conversion=other.conversion,
        dtype=_short(dtype),
        device=str(device),
        input_shapes={method: tuple(given[0].shape) for method, given in inputs.items()},
        rows=compare(ours, other.network.to(device), inputs, truth=truth, on_module=on_module),
        tolerance_source=_EQUAL if exact else _WITHIN.format(dtype=_short(dtype)),
    )


def components(path: Weights) -> tuple[str, ...]:
    """The names of the components that ``check`` can compare, such as ``("unet", "vae")``.

    Raises:
        SdconvError: the weights cannot be read, as for ``sdconv.load``.
    """
    if parts := pipeline_parts(path):
        return tuple(sorted(parts))
    with open_source(path) as source:
        return tuple(sorted(found.component for found in SourceView(source).networks))


@dataclass(frozen=True)
class Reference:
    """Another library's network, built from a file, and where it comes from.

    ``version``: the library's. ``conversion``: how the file's names became the library's.
    ``label``: the file.
    """

    network: nn.Module
    version: str
    conversion: str
    label: str
    component: str


def reference_network(
    path: Weights,
    ours: Network,
    *,
    component: str | None = None,
    family: str | None = None,
    dtype: torch.dtype = torch.float32,
    prefix: str | None = None,
    ema: bool = False,
    clamp: bool = False,
) -> Reference:
    """diffusers' network of a file, in eval mode, where the file's tensors are.

    Args:
        path, component, family, prefix, ema, clamp: those that ``ours`` was loaded with.
        ours: sdconv's network of the same file. Tensors that hold the same values on the same
            device are shared with it.
        dtype: the dtype of its weights.

    Raises:
        SdconvError: diffusers has no such network, or the file cannot be opened.
    """
    from sdconv.integrations.peers import VERSION, peer

    # sdconv.load has opened the same file, so the component exists, and is the only one if unnamed
    parts = {k: v for k, v in pipeline_parts(path).items() if component in (None, k)}
    with open_source(next(iter(parts.values()), path)) as source:
        view = SourceView(source)
        (one,) = (
            one
            for one in view.identify(family, component, prefix)
            if component in (None, one.component)
        )
        state, tensors = ours.state_dict(), {}
        caster = Caster(source.label, clamp=clamp)
        for canonical, name in one.found.names.items():
            stored = one.found.ema[canonical] if ema else name
            tensor = view.tensor(stored)
            if tensor.is_floating_point():
                tensor = caster.cast(tensor, dtype, stored, tensor.device)
            tensors[name.removeprefix(one.found.prefix)] = _share(tensor, state[canonical])
        network, conversion = peer(one.config, source.config, tensors, one.found.layout)
    return Reference(network, VERSION, conversion, source.label, one.component)


def _share(tensor: Tensor, twin: Tensor) -> Tensor:
    """``twin`` if it holds the same values, so that two networks share their memory."""
    comparable = tensor.device == twin.device and tensor.dtype == twin.dtype
    return twin if comparable and torch.equal(tensor, twin) else tensor


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(relative: float) -> float:
    return math.inf if math.isnan(relative) else relative


def _plain(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else str(value)
        case ModuleDifference():
            return {k: _plain(v) for k, v in dataclasses.asdict(value).items()}
        case dict():
            return {k: _plain(v) for k, v in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    return value
