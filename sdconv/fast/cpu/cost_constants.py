"""The cost model's constants: those that ship, and those that were fitted on this machine.

`sdconv bench --calibrate` fits them (:mod:`sdconv.fast.cpu.calibrate`) and keeps them in the file
`constants_path`, one entry for each `Conditions` under which they hold: the processor, the number
of threads, and the kernels. Under other conditions, the constants that ship are in force.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sdconv.checkpoint.io.write import write_whole
from sdconv.errors import SdconvWarning

ENVIRONMENT = "SDCONV_CACHE"
"""The environment variable that names the folder in which sdconv keeps what it has measured."""


@dataclass(frozen=True)
class CostConstants:
    """Times in units of one multiply-accumulate of the fast backend's matrix products.

    ``reorder``: per value of a weight, which torch's kernel reorders in each call. ``read``: per
    value of a packed weight, which is only read. ``kernel``: per 3x3 kernel that is transformed
    for a strip. ``transform``: per value of a transformed tile, in and out. ``call``: per call.
    ``normalise``: per value of a feature map that is normalised in passes of its own; ``prologue``:
    per value that is normalised as Winograd's transform reads it. ``direct``: per
    multiply-accumulate of torch's convolution in float32.
    """

    reorder: float
    read: float
    kernel: float
    transform: float
    call: float
    normalise: float
    prologue: float
    direct: float


SHIPPED = CostConstants(
    reorder=100.0,
    read=20.0,
    kernel=280.0,
    transform=27.0,
    call=2e7,
    normalise=160.0,
    prologue=40.0,
    direct=0.95,
)
"""Fitted to measurements of the shapes in the VAE and the U-Nets on two cores with AVX2."""


@dataclass(frozen=True)
class Conditions:
    """What measured times depend on. ``processor``: its name and the vectors that torch uses.
    ``threads``: torch's. ``kernels``: versions of what computes, and a digest of sdconv's own."""

    processor: str
    threads: int
    kernels: str


@dataclass(frozen=True)
class Calibration:
    """Constants fitted on a machine.

    ``day``: such as "2026-11-28". ``error``: the median of ``|modelled / measured - 1|``.
    ``shapes``: how many times they were fitted to.
    """

    conditions: Conditions
    constants: CostConstants
    day: str
    error: float
    shapes: int


def constants_path() -> Path:
    """The file of fitted constants: in the folder that ``SDCONV_CACHE`` names, or in the user's
    folder for caches."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named) / "cost-model.json"
    from platformdirs import user_cache_path

    return user_cache_path("sdconv", appauthor=False) / "cost-model.json"


def constants_in_force() -> CostConstants:
    """The constants by which methods are chosen now.

    Warns:
        SdconvWarning: the file of fitted constants cannot be used, once in a process.
    """
    return constants_for(torch.get_num_threads())


def calibration_in_force() -> Calibration | None:
    """What was fitted under the present conditions; None if the constants that ship are in force.

    Warns:
        SdconvWarning: the file of fitted constants cannot be used, once in a process.
    """
    return _calibration(torch.get_num_threads())


def present_conditions() -> Conditions:
    """The conditions under which this process computes."""
    return _conditions(torch.get_num_threads())


def other_conditions() -> list[Conditions]:
    """Conditions that constants were fitted under, without the present ones."""
    return [kept.conditions for kept in _kept() if kept.conditions != present_conditions()]


def keep(calibration: Calibration) -> Path:
    """Writes fitted constants to the file, which this and later processes use; they replace those
    of the same conditions. Entries of a file that cannot be read are lost.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = constants_path()
    others = [kept for kept in _kept() if kept.conditions != calibration.conditions]
    content = {"format": 2, "calibrations": [asdict(one) for one in (*others, calibration)]}
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda part: part.write_text(text, "utf-8"))
    forget()
    return path


def forget() -> None:
    """Reads the file again when it is needed next."""
    for function in (_kept, _calibration, constants_for):
        function.cache_clear()


@cache
def constants_for(threads: int) -> CostConstants:
    """`constants_in_force` with so many threads."""
    found = _calibration(threads)
    return SHIPPED if found is None else found.constants


@cache
def _calibration(threads: int) -> Calibration | None:
    kept = _kept()
    if not kept:
        return None
    conditions = _conditions(threads)
    return next((one for one in kept if one.conditions == conditions), None)


@cache
def _kept() -> tuple[Calibration, ...]:
    """The entries of the file."""
    path = constants_path()
    try:
        return _parsed(json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
        warnings.warn(
            SdconvWarning(
                f"{path}: not a file of cost constants ({problem}); those that ship are used. "
                "hint: write it again with `sdconv bench --calibrate`, or delete it"
            ),
            stacklevel=2,
        )
        return ()


def _parsed(content: Any) -> tuple[Calibration, ...]:
    """The entries of a file's content; an error of some kind if it has another form."""
    if content["format"] != 2:
        raise ValueError(f"format {content['format']}")
    return tuple(
        Calibration(
            conditions=Conditions(**one["conditions"]),
            constants=_checked(one["constants"]),
            day=str(one["day"]),
            error=float(one["error"]),
            shapes=int(one["shapes"]),
        )
        for one in content["calibrations"]
    )


def _checked(constants: Mapping[str, Any]) -> CostConstants:
    values = {field.name: float(constants[field.name]) for field in fields(CostConstants)}
    wrong = [name for name, value in values.items() if not (0 <= value < math.inf)]
    if wrong:
        raise ValueError(f"{wrong[0]} is {values[wrong[0]]}")
    return CostConstants(**values)


@cache
def _conditions(threads: int) -> Conditions:
    vectors = torch.backends.cpu.get_cpu_capability()
    return Conditions(f"{processor_name()}, {vectors}", threads, _kernels())


def processor_name() -> str:
    """The processor's name, as the system gives it; with family and model, because virtual machines
    shorten the name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8", "replace").splitlines() if info.exists() else []
    facts: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    numbers = [f"{one} {facts[one]}" for one in ("cpu family", "model") if one in facts]
    return f"{facts['model name']} ({', '.join(numbers)})"


def _kernels() -> str:
    """The versions of torch and Numba, and a digest of the fast backend's sources for CPUs."""
    digest = hashlib.blake2b(digest_size=8)
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        if path.name not in _NOT_KERNELS:
            digest.update(path.read_bytes())
    try:
        numba = f"numba {version('numba')}"
    except PackageNotFoundError:
        numba = "no numba"
    return f"torch {torch.__version__}, {numba}, sources {digest.hexdigest()}"


# change no kernel
_NOT_KERNELS = ("__init__.py", "cost_constants.py", "cost_model.py", "calibrate.py")
