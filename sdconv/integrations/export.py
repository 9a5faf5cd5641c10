"""Exports a half of an autoencoder to ONNX or OpenVINO, and compares the result with torch."""

from __future__ import annotations

import functools
import importlib.util
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sdconv.backends import backend
from sdconv.checkpoint.io.write import write_whole
from sdconv.errors import InputError
from sdconv.models.base import Autoencoder
from sdconv.models.tiny import AutoencoderTiny
from sdconv.models.vae import AutoencoderKL

HALVES = ("encoder", "decoder")

STAGES = ("computing in torch", "writing", "computing in the runtime")
"""What ``export_half`` does, in this order."""

_DTYPES = (torch.float32, torch.float16)  # in which both runtimes have convolutions

_NEEDED = {".onnx": ("onnx", "onnxscript"), ".xml": ("openvino",)}

# images, rows and columns of latents: a graph for any size is traced for the first (a single image
# would be taken for a constant), and runs for both
_RUNS = ((2, 6, 10), (1, 9, 5))


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written. ``input``, ``output``: name and shape, with None for what may have any
    size. ``difference``: the largest from torch's output for random input, over torch's largest
    value, of all sizes that were run; None without the runtime."""

    files: tuple[Path, ...]
    input: tuple[str, tuple[int | None, ...]]
    output: tuple[str, tuple[int | None, ...]]
    difference: float | None


def check_export_path(path: Path) -> str:
    """The suffix of the file to write, ``.onnx`` or ``.xml``.

    Raises:
        InputError: another suffix, or what writes the format is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in _NEEDED:
        raise InputError(
            "not the name of a format that is exported",
            where=path,
            expected="a name ending in .onnx, or in .xml for OpenVINO",
            got=path.suffix or "no suffix",
        )
    missing = [name for name in _NEEDED[suffix] if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"not installed: {' and '.join(missing)}",
            where=path,
            expected="what writes this format",
            hint="pip install 'sdconv[export]'",
        )
    return suffix


def export_half(
    network: Autoencoder,
    half: str,
    path: str | Path,
    *,
    size: tuple[int, int] | None,
    batch: int = 1,
    on_stage: Callable[[str], object] = lambda name: None,
) -> Exported:
    """Writes a half of an autoencoder as a graph for another runtime.

    The encoder's output ``moments`` is mean and log-variance, ``(B, 2C, h, w)``; of a tiny
    autoencoder it is ``latents``, ``(B, C, h, w)``. The decoder takes raw ``latents`` and gives a
    ``sample``, ``(B, 3, H, W)`` in [-1, 1]. The reference is exported.

    Args:
        network: the autoencoder, in float32 or float16; it stays as it is.
        half: ``"encoder"`` or ``"decoder"``.
        path: ends in ``.onnx``, or in ``.xml`` for OpenVINO, which writes a ``.bin`` next to it.
        size: rows and columns of the image, multiples of the network's downscale factor; None for a
            graph that takes any number of images of any such size.
        batch: images of that size; without a size, any number.
        on_stage: called with the name of each of ``STAGES`` when it begins.

    Raises:
        InputError: an argument has a value that is not allowed, or a package is missing.
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    suffix = check_export_path(path)
    module = _half(network, half)
    if network.dtype not in _DTYPES:
        raise InputError(
            "the runtimes have no convolutions in this dtype",
            where=path,
            expected="a network in float32 or float16",
            got=str(network.dtype).removeprefix("torch."),
            hint="network.to(torch.float32), or --dtype float32",
        )
    scale = network.downscale
    runs = [(batch, size)] if size else [(n, (h * scale, w * scale)) for n, h, w in _RUNS]
    inputs = [_example(network, half, sides, count) for count, sides in runs]
    multiple = None if size else scale if half == "encoder" else 1
    with torch.no_grad(), backend("reference"):
        on_stage(STAGES[0])
        expected = [module(x) for x in inputs]
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / path.name
            write = _write_onnx if suffix == ".onnx" else _write_xml
            on_stage(STAGES[1])
            with _quiet():
                written = write(module, inputs[0], part, multiple)
            on_stage(STAGES[2])
            found = [_run(part, suffix, x) for x in inputs]
            for file in written:  # the one that was asked for comes last
                write_whole(path.with_name(file.name), functools.partial(shutil.copy, file))
    return Exported(
        files=tuple(path.with_name(file.name) for file in written),
        input=(module.takes, _shape(inputs[0], size)),
        output=(module.gives, _shape(expected[0], size)),
        difference=None if found[0] is None else max(map(_relative, found, expected)),
    )


def _shape(x: Tensor, size: object) -> tuple[int | None, ...]:
    return tuple(x.shape) if size else (None, x.shape[1], None, None)


def _relative(found: Tensor | None, expected: Tensor) -> float:
    """The largest difference over the largest expected value."""
    assert found is not None
    largest = float(expected.abs().max())
    return float((found - expected).abs().max()) / largest if largest else 0.0


class _Half(nn.Module):
    """A half of an autoencoder, from one tensor to one tensor."""

    def __init__(self, network: Autoencoder, takes: str, gives: str) -> None:
        super().__init__()
        self.network, self.takes, self.gives = network, takes, gives

    def forward(self, x: Tensor) -> Tensor:
        if self.takes == "latents":
            return cast(Tensor, self.network.decode(x, return_dict=False)[0])
        encoded = self.network.encode(x, return_dict=False)[0]
        return cast(Tensor, encoded.parameters if self.gives == "moments" else encoded)


def _half(network: Autoencoder, half: str) -> _Half:
    if half not in HALVES:
        raise InputError(
            "not a half of an autoencoder", where="half", expected=" or ".join(HALVES), got=half
        )
    if getattr(network, "streaming", None) is not None:
        raise InputError(
            "a graph computes whole feature maps",
            where="half",
            hint="call network.disable_streaming() first",
        )
    if half == "decoder":
        return _Half(network, "latents", "sample")
    tiny = isinstance(network, AutoencoderTiny)
    return _Half(network, "image", "latents" if tiny else "moments")


def _example(network: Autoencoder, half: str, size: tuple[int, int], batch: int) -> Tensor:
    scale = network.downscale
    if any(side % scale or not side for side in size):
        raise InputError(
            "the size does not fit this network",
            where="size",
            expected=f"multiples of {scale}",
            got=f"{size[0]}x{size[1]}",
        )
    channels, sides = network.config["in_channels"], size
    if half == "decoder":
        channels, sides = network.config["latent_channels"], (size[0] // scale, size[1] // scale)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, *sides, generator=generator)
    if isinstance(network, AutoencoderKL | AutoencoderTiny) and half == "encoder":
        x = x.clamp(-1, 1)
    return x.to(network.device, network.dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say about their own future, sizes that are constant here, and packages
    that these networks do not need."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _write_onnx(module: _Half, x: Tensor, path: Path, multiple: int | None) -> list[Path]:
    """``multiple``: rows and columns may be any multiple of it; None for those of ``x``."""
    shapes: Any = None
    if multiple is not None:
        side: Any = torch.export.Dim
        rows, columns = (side(name, min=2, max=1 << 14) for name in ("rows", "columns"))
        shapes = ({0: torch.export.Dim("batch"), 2: multiple * rows, 3: multiple * columns},)
    program: Any = torch.onnx.export(
        module,
        (x,),
        input_names=[module.takes],
        output_names=[module.gives],
        dynamo=True,
        dynamic_shapes=shapes,
        verbose=False,
    )
    program.save(path, external_data=False)
    return [path]


def _write_xml(module: _Half, x: Tensor, path: Path, multiple: int | None) -> list[Path]:
    import openvino as ov

    shape = tuple(x.shape) if multiple is None else (-1, x.shape[1], -1, -1)
    model = ov.convert_model(module, example_input=x, input=[shape])
    model.inputs[0].get_tensor().set_names({module.takes})
    model.outputs[0].get_tensor().set_names({module.gives})
    ov.save_model(model, path, compress_to_fp16=False)
    return [path.with_suffix(".bin"), path]


def _run(path: Path, suffix: str, x: Tensor) -> Tensor | None:
    """The output of the written file; None without a runtime for it."""
    array = x.cpu().numpy()
    if suffix == ".xml":
        import openvino as ov

        compiled = ov.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return torch.from_numpy(compiled([array])[0].copy()).to(x.device, x.dtype)
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: array})
    return torch.from_numpy(found).to(x.device, x.dtype)
