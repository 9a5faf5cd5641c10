"""Every module against diffusers, and the fast backend against float64.

For each network and dtype there is one row. The reference backend runs in lockstep with diffusers'
network of the same weights; a module passes if it is equal bit for bit, or no further from
diffusers than twice diffusers' own error against float64 (``sdconv.analysis.parity.compare``). The
fast backend passes if its error against float64 is at most twice diffusers' as a root mean square,
and at most four times as the largest of all values, which is luck; or a bound of the dtype, see
``MEASURES``. Where a module is not equal, the row says which is the first, and why.

Rows named "control" compare a network with one convolution's kernel transposed. They must fail,
and at that convolution; otherwise the stage complains.

``DIR/modules/*.json`` has the rows of all modules.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sdconv
from scripts.gpu import networks
from scripts.gpu.options import Options
from scripts.gpu.precision import BFLOAT16, FLOAT32, Precision, float32_by_tf32, precisions
from scripts.gpu.record import Record, plain, write_whole
from sdconv.analysis.parity import ModuleDifference, compare
from sdconv.analysis.parity.check import reference_network
from sdconv.analysis.parity.compare import in_float64
from sdconv.analysis.parity.stepwise import module_outputs
from sdconv.backends import set_backend
from sdconv.models.dummy_inputs import Inputs, Noise, inputs_for


@dataclass(frozen=True)
class Measure:
    """A measure of an error, over the largest value: ``factor`` times diffusers' own is tolerated,
    and ``least`` of each dtype in any case."""

    of: Callable[[Tensor], Tensor]
    factor: int
    least: Mapping[torch.dtype, float]


MEASURES = {
    "root mean square": Measure(
        lambda x: x.square().mean().sqrt(),
        2,
        {torch.float32: 5e-6, torch.float16: 2**-12, torch.bfloat16: 2**-9},
    ),
    "largest": Measure(
        lambda x: x.abs().max(),
        4,
        {torch.float32: 2e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7},
    ),
}
# Seconds that a network of full size takes at least.
SECONDS = {networks.SDXL_UNET: 20.0, networks.SD15_UNET: 8.0}


@dataclass(frozen=True)
class Trio:
    """A network of sdconv's, diffusers', and diffusers' in float64, with inputs."""

    ours: Any
    theirs: nn.Module
    truth: nn.Module
    inputs: Inputs


def run(record: Record, options: Options) -> None:
    record.facts(against=version(), order="cheapest and most telling first")
    every = precisions(options.device)
    for group in (every[:2],) if options.small else (every[:2], every[2:]):
        for name in (networks.SHIPPED, *networks.FULL):
            network_rows(record, options, name, group)


def network_rows(record: Record, options: Options, name: str, group: tuple[Precision, ...]) -> None:
    """The rows of one network in these dtypes."""
    if all(record.has(f"{name}, {precision.name}") for precision in group):
        return
    tensors = networks.tensors_of(name, options)
    for precision in group:
        what = {"network": networks.label(name), "dtype": precision.name}
        least = 0.5 if options.small else SECONDS.get(name, 3.0)

        def measure(precision: Precision = precision) -> dict[str, Any]:
            with float32_by_tf32(precision.tf32), torch.no_grad():
                return measured(record, options, name, precision, tensors)

        key = f"{name}, {precision.name}"
        found = record.measure(key, measure, least=least, must_work=True, **what)
        if found is not None:
            for side in ("reference", "fast"):
                if found[side] == "failed":
                    record.complain(f"{key}: {side} {found[f'{side}_why']}")
        controlled = name == networks.SHIPPED and precision in (BFLOAT16, FLOAT32)
        if controlled and found is not None:
            control(record, options, name, precision, tensors)


def measured(
    record: Record, options: Options, name: str, precision: Precision, tensors: Any
) -> dict[str, Any]:
    """One row."""
    trio = trio_of(options, name, precision.dtype, tensors)
    rows = compare(trio.ours, trio.theirs, trio.inputs, truth=truth_for(trio, options, precision))
    file = f"{name}-{precision.name}".replace(", ", "-").replace(" ", "-").replace(".", "")
    every = [plain(asdict(row)) for row in rows]
    write_whole(record.folder / "modules" / f"{file}.json", json.dumps(every) + "\n")
    return judged(rows, trio) | fast(trio, precision.dtype)


def trio_of(options: Options, name: str, dtype: torch.dtype, tensors: Any) -> Trio:
    family = networks.family(name)
    ours = sdconv.load(tensors, dtype=dtype, device=options.device, family=family)
    theirs = reference_network(tensors, ours, family=family, dtype=dtype).network
    theirs = theirs.to(options.device)
    size = None
    if options.small:
        size = (6, 8) if "U-Net" in name else (16, 24)
    inputs = inputs_for(ours, size, Noise(1, 0, dtype, ours.device))
    return Trio(ours, theirs, copy.deepcopy(theirs).double(), inputs)


def truth_for(trio: Trio, options: Options, precision: Precision) -> nn.Module | None:
    """None where only equality passes: in float32 on a CPU."""
    return None if options.device == "cpu" and precision == FLOAT32 else trio.truth


def judged(rows: tuple[ModuleDifference, ...], trio: Trio) -> dict[str, Any]:
    """The reference backend's part of a row."""
    failed = [row for row in rows if not row.passed]
    first = next((row for row in rows if not row.equal or not row.passed), None)
    worst = max(rows, key=lambda row: (not row.passed, _ratio(row)))
    # what overflows in diffusers overflows here, too: no difference, and nothing to compare
    overflow = bool(failed) and all(math.isnan(row.max_abs) for row in failed)
    found = {
        "compared": len(rows),
        "equal": sum(row.equal for row in rows),
        "first": None if first is None else first.name,
        "reason": None if first is None else reason(trio, first),
        "worst": worst.name,
        "relative": worst.relative,
        "tolerance": worst.tolerance,
        "reference": "passed" if not failed else "overflows on both sides",
    }
    if failed and not overflow:
        found["reference"] = "failed"
        found["reference_why"] = f"{failed[0].name} {failed[0].verdict}"
    return found


def _ratio(row: ModuleDifference) -> float:
    """How much of its tolerance a difference takes."""
    if row.equal:
        return 0.0
    return row.relative / row.tolerance if row.tolerance else math.inf


def fast(trio: Trio, dtype: torch.dtype) -> dict[str, Any]:
    """The fast backend's part of a row."""
    theirs, ours, truth = fast_outputs(trio)
    errors, allowed = {}, {}
    for method, (name, measure) in itertools.product(truth, MEASURES.items()):
        own, other = (error(one[method], truth[method], measure) for one in (ours, theirs))
        errors[method, name] = own, other
        allowed[method, name] = max(measure.factor * other, measure.least[dtype])
    worst = max(errors, key=lambda each: _number(errors[each][0]) / allowed[each])
    own, other = errors[worst]
    found: dict[str, Any] = {
        "fast_method": worst[0],
        "fast_measure": worst[1],
        "fast_error": own,
        "diffusers_error": other,
        "fast_tolerance": allowed[worst],
    }
    if math.isnan(own) and math.isnan(other):
        return found | {"fast": "overflows on both sides"}
    if own <= allowed[worst]:
        return found | {"fast": "passed"}
    why = f"errs by {own:.2g} ({worst[1]}) in {worst[0]}, more than {allowed[worst]:.2g}"
    return found | {"fast": "failed", "fast_why": why}


def fast_outputs(trio: Trio) -> tuple[dict[str, Tensor], ...]:
    """By method, the outputs of diffusers, of the fast backend and of float64."""
    set_backend(trio.ours, "fast")
    try:
        exact = in_float64(trio.inputs, trio.truth)
        pairs = ((trio.theirs, trio.inputs), (trio.ours, trio.inputs), (trio.truth, exact))
        return tuple(outputs(network, inputs) for network, inputs in pairs)
    finally:
        set_backend(trio.ours, "reference")


def outputs(network: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """By method, the output. No module has a hook, which the fast backend would step aside for."""
    return {one.name: one.output for one in module_outputs(network, inputs, ())}


def error(x: Tensor, truth: Tensor, measure: Measure) -> float:
    """The error by this measure over the largest value; NaN if ``x`` is not finite."""
    x = x.to(truth.device).double()
    if not bool(x.isfinite().all()):
        return math.nan
    return float(measure.of(x - truth) / truth.abs().max())


def _number(value: float) -> float:
    return math.inf if math.isnan(value) else value


# --- why two modules differ


def reason(trio: Trio, row: ModuleDifference) -> str:
    """Why a module is the first that differs, as far as running it again on its own shows."""
    if row.name in trio.inputs:
        return "only the whole network's output differs"
    kind = type(trio.theirs.get_submodule(row.name)).__name__
    try:
        return f"{kind}: {_reason(trio, row)}"
    except Exception as error:
        return f"{kind}: it could not be run on its own ({type(error).__name__}: {error})"


def _reason(trio: Trio, row: ModuleDifference) -> str:
    module, own = (net.get_submodule(row.name) for net in (trio.theirs, trio.ours))
    args, kwargs, seen = input_of(trio, row)
    again = _first(module(*args, **kwargs))
    if not torch.equal(again, _first(module(*args, **kwargs))):
        return "diffusers' own module gives other bits each time for the same input"
    if not torch.equal(again, seen):
        return "diffusers' module gives other bits for the same input when run on its own"
    if torch.equal(_first(own(*args, **kwargs)), again):
        return "equal for the same input; what it is given differs, outside of all modules before"
    return "differs for the same input"


def input_of(trio: Trio, row: ModuleDifference) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """What diffusers' module was given in this call, and what it returned."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

    def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        calls.append((args, kwargs, _first(out)))

    hook = trio.theirs.get_submodule(row.name).register_forward_hook(note, with_kwargs=True)
    try:
        for method, given in trio.inputs.items():
            networks.call(trio.theirs, method, given)
    finally:
        hook.remove()
    return calls[row.call - 1]


def _first(out: Any) -> Tensor:
    value: Tensor = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
    return value


# --- controls


def control(
    record: Record, options: Options, name: str, precision: Precision, tensors: Any
) -> None:
    """Compares a network with one thing wrong, which must fail there and nowhere before."""

    def measure() -> dict[str, Any]:
        with float32_by_tf32(precision.tf32), torch.no_grad():
            trio = trio_of(options, name, precision.dtype, tensors)
            planted = plant(trio.ours)
            truth = truth_for(trio, options, precision)
            rows = compare(trio.ours, trio.theirs, trio.inputs, truth=truth)
            return judged_control(rows, planted, fast(trio, precision.dtype))

    key = f"control: {name}, {precision.name}"
    what = {"network": f"control: {networks.label(name)}", "dtype": precision.name}
    found = record.measure(key, measure, must_work=True, **what)
    if found is not None and not found["noticed"]:
        record.complain(f"{key}: the fault planted in {found['planted']} was not noticed")


def plant(network: Any) -> str:
    """Transposes one kernel, in a copy of its own; returns the convolution's name."""
    name = "decoder.mid_block.resnets.0.conv1"
    conv = network.get_submodule(name)
    conv.weight = nn.Parameter(conv.weight.mT.contiguous(), requires_grad=False)
    return name


def judged_control(
    rows: tuple[ModuleDifference, ...], planted: str, of_fast: dict[str, Any]
) -> dict[str, Any]:
    first = next((row.name for row in rows if not row.passed), None)
    return {
        "planted": planted,
        "first": first,
        "reference": "failed, as it must" if first == planted else "not noticed",
        "fast": "failed, as it must" if of_fast["fast"] == "failed" else "not noticed",
        "fast_error": of_fast["fast_error"],
        "fast_tolerance": of_fast["fast_tolerance"],
        "noticed": first == planted and of_fast["fast"] == "failed",
    }


def version() -> str:
    from sdconv.integrations.peers import VERSION

    return VERSION
