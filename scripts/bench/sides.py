"""Full-size networks of sdconv and its peers, each as a call to time."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

import sdconv
from sdconv.config.unet import CROSS_DOWN, CROSS_UP, DOWN, UP
from sdconv.loading import build

Size = tuple[int, int]
Run = Callable[[], object]
FAST = "sdconv fast"

LABELS = {
    "plain": "diffusers",
    "channels_last": "diffusers, channels_last",
    "compiled": "diffusers, channels_last, compiled",
    "openvino": "OpenVINO, f32",
    "onnxruntime": "ONNX Runtime",
    FAST: FAST,
}

# what the configs of SD1.5's and SDXL's U-Nets set
UNETS: dict[str, dict[str, Any]] = {
    "unet": {"cross_attention_dim": 768},
    "unet-xl": {
        "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, UP),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def filled(network: nn.Module) -> Any:
    """A network from the meta device with random weights of about the scale of trained ones."""
    network.to_empty(device="cpu").eval()
    random = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=random)
        else:
            nn.init.constant_(parameter, float(name.endswith("weight")))
    return network


def ours(work: str) -> Any:
    """sdconv's full-size network."""
    if work in UNETS:
        kind: Any = sdconv.UNet2DConditionConfig
        with torch.device("meta"):
            return filled(build(kind.from_json({**kind.assumed, **UNETS[work]}, work)))
    if work.startswith("tiny"):
        with torch.device("meta"):
            return filled(
                sdconv.AutoencoderTiny(sdconv.AutoencoderTinyConfig.from_json({}, "TAESD"))
            )
    own: dict[str, Any] = {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
    }
    assumed = sdconv.AutoencoderKLConfig.assumed
    with torch.device("meta"):
        return filled(sdconv.AutoencoderKL(sdconv.AutoencoderKLConfig(**{**assumed, **own})))


def theirs(network: Any) -> Any:
    """diffusers' network with the same weights."""
    import diffusers

    kind = getattr(diffusers, network.config.class_name)
    with torch.device("meta"):
        peer = kind.from_config(network.config.to_json())
    peer.load_state_dict(network.state_dict(), assign=True)
    return peer.eval()


def size_of(text: str) -> Size:
    """``512x768`` as rows and columns."""
    height, width = map(int, text.split("x"))
    return height, width


def inputs_of(work: str, size: Size) -> tuple[Tensor, ...]:
    height, width = size
    torch.manual_seed(0)
    if work in ("encode", "tiny-encode"):
        return (torch.randn(1, 3, height, width),)
    if work in ("decode", "tiny-decode"):
        return (torch.randn(1, 4, height // 8, width // 8),)
    width_of_text = UNETS[work]["cross_attention_dim"]
    given = torch.randn(1, 4, height, width), torch.tensor(500), torch.randn(1, 77, width_of_text)
    return given if work == "unet" else (*given, torch.randn(1, 1280), torch.zeros(1, 6))


def call(network: Any, work: str, inputs: tuple[Tensor, ...]) -> Tensor:
    if work in UNETS:
        sample, time, text, *added = inputs
        names = ("text_embeds", "time_ids")[: len(added)]
        more = {"added_cond_kwargs": dict(zip(names, added, strict=True))} if added else {}
        out: Tensor = network(sample, time, text, **more, return_dict=False)[0]
    elif work in ("decode", "tiny-decode"):
        out = network.decode(*inputs, return_dict=False)[0]
    else:
        out = network.encode(*inputs, return_dict=False)[0]
        out = out if work == "tiny-encode" else out.mode()
    return out


def side_of(name: str, work: str, size: Size) -> Run:
    """The call to time for the side of that name."""
    network, inputs = ours(work), inputs_of(work, size)
    if name != FAST:
        return PEERS[name](theirs(network), work, inputs)

    def fast() -> Tensor:
        with sdconv.backend("fast"):
            return call(network, work, inputs)

    return fast


class Separate:
    """A side in its own process, so that no two sides share threads or memory."""

    _run: ClassVar[Run]

    def __init__(self, name: str, work: str, size: Size) -> None:
        self._process = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), self._begin, (name, work, size)
        )

    @classmethod
    def _begin(cls, name: str, work: str, size: Size) -> None:
        with torch.inference_mode():
            cls._run = staticmethod(side_of(name, work, size))

    @classmethod
    def _again(cls) -> None:
        with torch.inference_mode():
            cls._run()

    def __call__(self) -> None:
        self._process.submit(self._again).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown()


def plain(network: Any, work: str, inputs: tuple[Tensor, ...]) -> Run:
    return lambda: call(network, work, inputs)


def channels_last(network: Any, work: str, inputs: tuple[Tensor, ...]) -> Run:
    # a copy, since the other sides share the weights
    network.load_state_dict({k: v.clone() for k, v in network.state_dict().items()}, assign=True)
    network.to(memory_format=torch.channels_last)
    first = inputs[0].contiguous(memory_format=torch.channels_last)
    return lambda: call(network, work, (first, *inputs[1:]))


def compiled(network: Any, work: str, inputs: tuple[Tensor, ...]) -> Run:
    run = channels_last(network, work, inputs)
    return torch.compile(run)  # type: ignore[no-any-return]


class Called(nn.Module):
    """A network's method as a module, for exporters."""

    def __init__(self, network: nn.Module, work: str) -> None:
        super().__init__()
        self.network, self.work = network, work

    def forward(self, *inputs: Tensor) -> Tensor:
        return call(self.network, self.work, inputs)


def openvino(network: Any, work: str, inputs: tuple[Tensor, ...]) -> Run:
    import openvino as ov

    example = inputs if len(inputs) > 1 else inputs[0]
    model = ov.convert_model(Called(network, work), example_input=example)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = ov.compile_model(model, "CPU", settings).create_infer_request()
    arrays = [tensor.numpy() for tensor in inputs]
    return lambda: request.infer(arrays)


def onnxruntime(network: Any, work: str, inputs: tuple[Tensor, ...]) -> Run:
    import onnxruntime as ort

    names = [f"input_{i}" for i in range(len(inputs))]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        # the exporter traces, which inference tensors do not allow
        with torch.inference_mode(False), torch.no_grad():
            torch.onnx.export(
                Called(network, work),
                tuple(one.clone() for one in inputs),
                file,
                input_names=names,
                dynamo=True,
                external_data=True,
                verbose=False,
            )
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    given = {name: one.numpy() for name, one in zip(names, inputs, strict=True)}
    return lambda: session.run(None, given)


PEERS = {
    "plain": plain,
    "channels_last": channels_last,
    "compiled": compiled,
    "openvino": openvino,
    "onnxruntime": onnxruntime,
}
