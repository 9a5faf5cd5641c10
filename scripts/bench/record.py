"""What a benchmark's file holds: rows of results, the machine, and tables drawn from them."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sdconv.fast.cpu.cost_constants import calibration_in_force, processor_name

ROOT = Path(__file__).parents[2]
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_fp16", "asimd", "bf16")
_PACKAGES = ("torch", "numba", "numpy", "diffusers", "openvino", "onnxruntime", "MNN", "ncnn")


def machine() -> dict[str, Any]:
    """The processor, its memory and the software: what figures depend on; the day and the time, in
    UTC."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "processor": processor_name(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "features": [one for one in _FEATURES if one in _flags()],
        "cores": len(os.sched_getaffinity(0)),
        "caches": _caches(),
        "memory, GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "sdconv": _commit(),
        "cost model": "fitted on this machine" if calibration_in_force() else "shipped",
        "date": now.date().isoformat(),
        "time": now.time().isoformat("seconds"),
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two of `machine`'s, the day and the time aside."""
    names = dict.fromkeys((*now, *then))
    return [one for one in names if one not in ("date", "time") and now.get(one) != then.get(one)]


def _flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8", "replace").splitlines() if info.exists() else []
    return {
        flag
        for line in lines
        if line.startswith(("flags", "Features"))
        for flag in line.partition(":")[2].split()
    }


def _caches() -> dict[str, str]:
    """Size of each cache of the first core."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    found = {}
    for one in sorted(folder.glob("index*")):
        kind = (one / "type").read_text().strip()
        if kind != "Instruction":
            found[f"L{(one / 'level').read_text().strip()}"] = (one / "size").read_text().strip()
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The last commit that changed what is measured or what measures."""
    folders = ("--", "sdconv", "scripts/bench")
    commit = _git("log", "-1", "--format=%h", *folders)
    changed = _git("status", "--porcelain", *folders)
    return f"{commit or version('sdconv')}{', changed' if changed else ''}"


def _git(*arguments: str) -> str:
    try:
        ran = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
    except OSError:  # no git
        return ""
    return ran.stdout.strip()


def available_memory() -> int:
    """Bytes that are free for a new process."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise SystemExit("needs Linux: it reads /proc/meminfo")


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that at any moment it is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".half")
    half.write_text(text, "utf-8")
    half.replace(path)


def sentence(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as Markdown: a new table where the columns change; lists are left out."""
    lines: list[str] = []
    columns: list[str] = []
    for row in rows:
        shown = {name: value for name, value in row.items() if not isinstance(value, list)}
        if not set(shown) <= set(columns):
            columns = list(shown)
            lines += [""] if lines else []
            lines += [_line(columns), "|" + "---|" * len(columns)]
        lines.append(_line(shown.get(name, "") for name in columns))
    return "\n".join(lines) + "\n" if lines else ""


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
