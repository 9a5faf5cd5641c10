"""Runtimes that networks are converted to: each as a call to time, in float32 unless named bf16.

They come with the `bench` extra, and are imported where they are used. A call returns the output.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]
# a network's method, as `scripts.bench.sides.call` calls it
Call = Callable[[Any, str, Inputs], Tensor]


class Called(nn.Module):
    """A network's method as a module, for exporters."""

    def __init__(self, network: nn.Module, work: str, call: Call) -> None:
        super().__init__()
        self.network, self.work, self.call = network, work, call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.network, self.work, inputs)


def openvino(module: Called, inputs: Inputs) -> Callable[[], object]:
    return _openvino(module, inputs, "f32")


def openvino_bf16(module: Called, inputs: Inputs) -> Callable[[], object]:
    """OpenVINO with its hint for bf16.

    Raises:
        RuntimeError: the processor has no bf16 units, and OpenVINO would compute in float32.
    """
    import openvino as ov

    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise RuntimeError("no bf16 units in this processor: OpenVINO would compute in float32")
    return _openvino(module, inputs, "bf16")


def _openvino(module: Called, inputs: Inputs, precision: str) -> Callable[[], object]:
    import openvino as ov

    example = inputs if len(inputs) > 1 else inputs[0]
    model = ov.convert_model(module, example_input=example)
    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
    request = ov.compile_model(model, "CPU", settings).create_infer_request()
    arrays = [tensor.numpy() for tensor in inputs]
    return lambda: request.infer(arrays)[0]


def onnxruntime(module: Called, inputs: Inputs) -> Callable[[], object]:
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        file, names = _onnx(module, inputs, Path(folder))
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    given = {name: one.numpy() for name, one in zip(names, inputs, strict=True)}
    return lambda: session.run(None, given)[0]


def mnn(module: Called, inputs: Inputs) -> Callable[[], object]:
    """MNN with Winograd's convolution, converted from ONNX."""
    import MNN

    with tempfile.TemporaryDirectory() as folder:
        file, names = _onnx(module, inputs, Path(folder))
        converted = Path(folder) / "network.mnn"
        command = [str(Path(sys.executable).parent / "mnnconvert"), "-f", "ONNX"]
        command += ["--modelFile", str(file), "--MNNModel", str(converted), "--bizCode", "bench"]
        _converted(command, converted, Path(folder))
        config = {"backend": "CPU", "precision": "high", "numThread": torch.get_num_threads()}
        runtime = MNN.nn.create_runtime_manager((config,))
        loaded = MNN.nn.load_module_from_file(
            str(converted), names, ["output"], runtime_manager=runtime
        )
    variables = [_mnn_variable(one) for one in inputs]

    def run() -> np.ndarray[Any, Any]:
        out = loaded.forward(variables)
        out = out[0] if isinstance(out, list | tuple) else out
        found: np.ndarray[Any, Any] = MNN.expr.convert(out, MNN.expr.NCHW).read()
        return found

    return run


def _mnn_variable(tensor: Tensor) -> Any:
    import MNN

    kind = MNN.expr.float if tensor.is_floating_point() else MNN.expr.int
    tensor = tensor if tensor.is_floating_point() else tensor.int()
    array = np.ascontiguousarray(tensor.numpy())
    variable = MNN.expr.placeholder(list(array.shape), MNN.expr.NCHW, kind)
    variable.write(array)
    return variable


def ncnn(module: Called, inputs: Inputs) -> Callable[[], object]:
    """ncnn with Winograd's convolution, converted from TorchScript by pnnx; only single images."""
    import ncnn as runtime

    net = runtime.Net()
    net.opt.num_threads = torch.get_num_threads()
    for name in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{name}", False)
    with tempfile.TemporaryDirectory() as folder:
        traced = Path(folder) / "network.pt"
        with torch.inference_mode(False), torch.no_grad():
            given = tuple(one.clone() for one in inputs)
            trace: Any = torch.jit.trace
            trace(module, given, check_trace=False).save(str(traced))
        shapes = ",".join(f"[{','.join(map(str, one.shape))}]" for one in inputs)
        param = traced.with_suffix(".ncnn.param")
        command = [str(Path(sys.executable).parent / "pnnx"), str(traced), f"inputshape={shapes}"]
        _converted([*command, "fp16=0"], param, Path(folder))
        if net.load_param(str(param)) or net.load_model(str(param.with_suffix(".bin"))):
            raise RuntimeError("ncnn cannot load what pnnx has written")
    names = [str(name) for name in net.input_names()]
    # without the batch, which ncnn does not know
    blobs = [np.ascontiguousarray(one[0] if one.ndim > 1 else one) for one in inputs]

    def run() -> np.ndarray[Any, Any]:
        with net.create_extractor() as extractor:
            for name, blob in zip(names, blobs, strict=True):
                # a copy, because the first layer may write over its input
                extractor.input(name, runtime.Mat(blob).clone())
            code, out = extractor.extract(net.output_names()[0])
            if code:
                raise RuntimeError(f"ncnn fails with code {code}")
            return np.array(out)[None]

    return run


def _onnx(module: Called, inputs: Inputs, folder: Path) -> tuple[Path, list[str]]:
    """The network as a file of ONNX, and its inputs' names."""
    names = [f"input_{i}" for i in range(len(inputs))]
    file = folder / "network.onnx"
    # the exporter traces, which inference tensors do not allow
    with torch.inference_mode(False), torch.no_grad():
        torch.onnx.export(
            module,
            tuple(one.clone() for one in inputs),
            file,
            input_names=names,
            output_names=["output"],
            dynamo=True,
            external_data=True,
            verbose=False,
        )
    return file, names


def _converted(command: list[str], file: Path, folder: Path) -> None:
    """Runs a converter that writes a file.

    Raises:
        RuntimeError: it has not, with the last line of what it says.
    """
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if ran.returncode or not file.exists():
        lines = (ran.stdout + ran.stderr).strip().splitlines() or ["nothing is said"]
        raise RuntimeError(f"{Path(command[0]).name} ends with {ran.returncode}: {lines[-1]}")


RUNTIMES: dict[str, Callable[[Called, Inputs], Callable[[], object]]] = {
    "openvino": openvino,
    "openvino_bf16": openvino_bf16,
    "onnxruntime": onnxruntime,
    "mnn": mnn,
    "ncnn": ncnn,
}
