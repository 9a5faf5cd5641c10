"""Registers and shared memory that the Triton kernels need on NVIDIA's architectures, as a table.

It compiles them and reads the result; no GPU is needed, and nothing is measured.

    python -m scripts.bench.kernel_resources
    python -m scripts.bench.kernel_resources --dtype fp32
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdconv.fast.cuda.choices import SHIPPED, TILINGS

ARCHITECTURES = (80, 90, 100)
# the kernels' arguments that are in the dtype of feature maps
TENSORS = ("x", "bias", "added", "residual", "residual_bias", "weight", "weights", "shift", "out")
# a group of 10 channels
GROUP = {"SIZE": 10, "WIDTH": 16, "PIXELS": 256}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs: registers of a thread, and bytes of shared memory and of
    spilled registers."""

    kernel: str
    case: str
    architecture: int
    registers: int
    shared: int
    spilled: int


def resources(architecture: int, dtype: str) -> Iterator[Resources]:
    """Compiles each kernel for an architecture, such as 90, and a dtype, such as ``"bf16"``."""
    import triton

    kernels: Any = importlib.import_module("sdconv.fast.cuda.triton_kernels")
    softmax: Any = importlib.import_module("sdconv.fast.cuda.triton_softmax")
    backends: Any = importlib.import_module("triton.backends.compiler")
    target = backends.GPUTarget("cuda", architecture, 32)
    tiling = TILINGS[SHIPPED["tiling"]]
    block = {"PIXELS": tiling.values // tiling.channels, "CHANNELS": tiling.channels}
    nothing = dict.fromkeys(("bias", "added", "residual", "residual_bias", "out", "parts"))
    for case, kernel, constants in (
        ("statistics", kernels.sum_and_stats, _only(nothing, "bias", "added", "parts")),
        ("epilogue", kernels.sum_and_stats, _only(nothing, "bias", "residual", "out", "parts")),
        ("epilogue, sub-pixel", kernels.sum_and_stats, _only(nothing, "bias", "out", "parts")),
        ("", kernels.combine, {"SIZE": 4, "WIDTH": 4, "MERGED": tiling.merged // 4}),
        ("", kernels.normalise, {"added": None, "SILU": True, **block}),
        ("", kernels.normalise_group, {"added": None, "SILU": True, **GROUP}),
        ("", kernels.add_taps, {"OUTPUTS": 16, "CHANNELS": 32}),
        ("", softmax.softmax_rows, {"COLUMNS": softmax.COLUMNS}),
    ):
        own = dict(constants)
        if kernel is kernels.sum_and_stats:
            own |= {"SUBPIXEL": "sub-pixel" in case, **block}
        signature = {name: _type(name, own, dtype) for name in kernel.arg_names}
        # Triton knows of each argument whether 16 divides it.
        divides = {
            (i,): [["tt.divisibility", 16]]
            for i, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or name in ("channels", "pixels", "rows")
        }
        source = triton.compiler.ASTSource(
            fn=kernel, signature=signature, constexprs=own, attrs=divides
        )
        warps = 8 if kernel in (kernels.normalise_group, softmax.softmax_rows) else tiling.warps
        compiled = triton.compile(source, target=target, options={"num_warps": warps})
        registers, spilled = _usage(compiled.asm["cubin"])
        name = kernel.__name__
        shared = int(compiled.metadata.shared)
        yield Resources(name, case, architecture, registers, shared, spilled)


def _only(nothing: Mapping[str, None], *given: str) -> dict[str, Any]:
    return {name: None for name in nothing if name not in given}


def _type(name: str, constants: Mapping[str, Any], dtype: str) -> str:
    if name in constants:
        return "constexpr"
    if name in ("parts", "stats", "scores", "sums"):
        return "*fp32"
    if name in (
        "x",
        "bias",
        "added",
        "residual",
        "residual_bias",
        "weight",
        "weights",
        "shift",
        "out",
    ):
        return f"*{dtype}"
    return "fp32" if name in ("eps", "scale") else "i32"


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of local memory and stack, from NVIDIA's disassembler, which
    comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "fp16", "bf16"])
    dtype = parser.parse_args().dtype
    rows: dict[tuple[str, str], list[str]] = {}
    for architecture in ARCHITECTURES:
        for used in resources(architecture, dtype):
            text = f"{used.registers} registers, {used.shared} B"
            if used.spilled:
                text += f", {used.spilled} B spilled"
            rows.setdefault((used.kernel, used.case), []).append(text)
    print("| kernel | " + " | ".join(f"sm_{one}" for one in ARCHITECTURES) + " |")
    print("|---" * (1 + len(ARCHITECTURES)) + "|")
    for (kernel, case), cells in rows.items():
        name = f"`{kernel}`" + (f", {case}" if case else "")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
