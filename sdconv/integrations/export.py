"""Exports a half of an autoencoder to ONNX or OpenVINO, and compares the result with torch."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import tempfile
import warnings
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

_NEEDED = {".onnx": ("onnx", "onnxscript"), ".xml": ("openvino",)}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written. ``input``, ``output``: name and shape. ``difference``: the largest from
    torch's output for random input, over torch's largest value; None without the runtime."""

    files: tuple[Path, ...]
    input: tuple[str, tuple[int, ...]]
    output: tuple[str, tuple[int, ...]]
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
            f"{' and '.join(missing)} is not installed",
            where=path,
            expected="what writes this format",
            hint="pip install 'sdconv[export]'",
        )
    return suffix


def export_half(
    network: Autoencoder, half: str, path: str | Path, *, size: tuple[int, int], batch: int = 1
) -> Exported:
    """Writes a half of an autoencoder as a graph for another runtime, for inputs of one shape.

    The encoder's output ``moments`` is mean and log-variance, ``(B, 2C, h, w)``; of a tiny
    autoencoder it is ``latents``, ``(B, C, h, w)``. The decoder takes raw ``latents`` and gives a
    ``sample``, ``(B, 3, H, W)`` in [-1, 1]. The reference is exported.

    Args:
        network: the autoencoder; it stays as it is.
        half: ``"encoder"`` or ``"decoder"``.
        path: ends in ``.onnx``, or in ``.xml`` for OpenVINO, which writes a ``.bin`` next to it.
        size: rows and columns of the image, multiples of the network's downscale factor.
        batch: images.

    Raises:
        InputError: an argument has a value that is not allowed, or a package is missing.
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    suffix = check_export_path(path)
    module = _half(network, half)
    x = _example(network, half, size, batch)
    with torch.no_grad(), backend("reference"):
        expected = module(x)
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / path.name
            write = _write_onnx if suffix == ".onnx" else _write_xml
            written = write(module, x, part)
            found = _run(part, suffix, x)
            for file in written:  # the one that was asked for comes last
                write_whole(path.with_name(file.name), functools.partial(shutil.copy, file))
    difference = None
    if found is not None:
        largest = float(expected.abs().max())
        difference = float((found - expected).abs().max()) / largest if largest else 0.0
    return Exported(
        files=tuple(path.with_name(file.name) for file in written),
        input=(module.takes, tuple(x.shape)),
        output=(module.gives, tuple(expected.shape)),
        difference=difference,
    )


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


def _write_onnx(module: _Half, x: Tensor, path: Path) -> list[Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own future
        program: Any = torch.onnx.export(
            module,
            (x,),
            input_names=[module.takes],
            output_names=[module.gives],
            dynamo=True,
            verbose=False,
        )
        program.save(path, external_data=False)
    return [path]


def _write_xml(module: _Half, x: Tensor, path: Path) -> list[Path]:
    import openvino as ov

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, about sizes that are constant here
        model = ov.convert_model(module, example_input=x, input=[tuple(x.shape)])
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
