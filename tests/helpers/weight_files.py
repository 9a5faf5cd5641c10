"""Hand-made files of weights, byte by byte or in folders, for the tests of their readers."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sdconv.checkpoint import convert as conversion
from sdconv.loading import build

HUGE = 2**63
convert = partial(conversion.convert, build=build)
PLAIN = "diffusion_pytorch_model.safetensors"
A, B = torch.arange(6.0).reshape(2, 3), torch.ones(4, dtype=torch.bfloat16)


def packed(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file's bytes; a ``header`` of bytes is JSON already."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object, shape: object, *offsets: object) -> dict[str, object]:
    """A tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


U8 = entry("U8", [1], 0, 1)


def written(folder: Path, content: bytes) -> Path:
    """A file with this content."""
    file = folder / "weights.safetensors"
    file.write_bytes(content)
    return file


def put(file: Path, **tensors: torch.Tensor) -> Path:
    """A file of tensors: safetensors or a pickle, according to its name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_file(tensors, file, metadata={"format": "pt", "of": file.stem})
    else:
        torch.save(tensors, file)
    return file


def sharded(folder: Path, kind: str = "safetensors", **weight_map: str) -> Path:
    """A folder of two shards, ``a`` in the first and ``b`` in the second, with an index."""
    first = put(folder / f"diffusion_pytorch_model-00001-of-00002.{kind}", a=A)
    second = put(folder / f"diffusion_pytorch_model-00002-of-00002.{kind}", b=B)
    listed = weight_map or {"a": first.name, "b": second.name}
    index = folder / f"diffusion_pytorch_model.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": listed}))
    return index


def is_mapped(tensor: torch.Tensor, file: Path) -> bool:
    """Whether a tensor's values are the file's own pages."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(f" {file}"):
            start, end = (int(end, 16) for end in line.split()[0].split("-"))
            if start <= tensor.data_ptr() < end:
                return True
    return False


@contextmanager
def without_permission(closed: Path | None = None) -> Iterator[None]:
    """Runs as nobody, because root may read everything; nobody may read ``closed``."""
    root = os.geteuid() == 0
    mode = closed.stat().st_mode if closed else 0
    if closed:
        closed.chmod(0)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        if closed:
            closed.chmod(mode)


def raw(path: Path) -> dict[str, tuple[Any, ...]]:
    """Every tensor's dtype, shape and bytes, read without sdconv."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    return {
        name: (one["dtype"], one["shape"], body[slice(*one["data_offsets"])])
        for name, one in header.items()
        if name != "__metadata__"
    }
