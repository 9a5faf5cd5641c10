"""A half of an autoencoder in ONNX Runtime and OpenVINO gives torch's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import seeded
from helpers.commands import answer, run

import sdconv
from sdconv.images import example_image, to_tensor
from sdconv.integrations.export import export_half

SMALL = seeded.kl((32, 64), 4, True, layers_per_block=1)


def expected(network: Any, half: str, x: torch.Tensor) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        if half == "decoder":
            return np.asarray(network.decode(x).sample)
        out = network.encode(x)
        return np.asarray(out.latents if "latents" in out else out.latent_dist.parameters)


def onnx(path: Path, x: torch.Tensor) -> np.ndarray[Any, Any]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return np.asarray(found)


def openvino(path: Path, x: torch.Tensor) -> np.ndarray[Any, Any]:
    ov = pytest.importorskip("openvino")
    compiled = ov.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.asarray(compiled([x.numpy()])[0])


@pytest.mark.slow
@pytest.mark.parametrize("half", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", ["kl", "tiny"])
@pytest.mark.parametrize(("suffix", "runtime"), [(".onnx", onnx), (".xml", openvino)])
def test_a_runtime_gives_torchs_numbers(
    kind: str, half: str, suffix: str, runtime: Any, tmp_path: Path
) -> None:
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason="needs the export extra: pip install '.[export]'")
    network: Any = seeded.network({"kl": SMALL, "tiny": seeded.SMALL_TINY}[kind])
    path = tmp_path / f"half{suffix}"
    scale = network.downscale
    done = export_half(network, half, path, size=(16, 24), batch=2)
    assert done.files[-1] == path and all(file.is_file() for file in done.files)
    assert done.difference is not None and done.difference < 1e-4
    # other numbers than those that the graph was traced with
    x = to_tensor(example_image().resize((24, 16))).repeat(2, 1, 1, 1)
    if half == "decoder":
        x = torch.randn(2, network.config["latent_channels"], 16 // scale, 24 // scale)
    theirs, ours = runtime(path, x.contiguous()), expected(network, half, x)
    np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-4 * np.abs(ours).max())
    other = expected(network, half, x.flip(-1))
    assert np.abs(theirs - other).max() > 1e-2 * np.abs(ours).max(), "the control"
    assert (done.input[1], done.output[1]) == (tuple(x.shape), ours.shape)


@pytest.mark.slow
@pytest.mark.parametrize("half", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", ["kl", "tiny"])
@pytest.mark.parametrize(("suffix", "runtime"), [(".onnx", onnx), (".xml", openvino)])
def test_a_dynamic_graph_takes_other_sizes(
    kind: str, half: str, suffix: str, runtime: Any, tmp_path: Path
) -> None:
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason="needs the export extra: pip install '.[export]'")
    network: Any = seeded.network({"kl": SMALL, "tiny": seeded.SMALL_TINY}[kind])
    path, fixed, scale = tmp_path / f"half{suffix}", tmp_path / f"fixed{suffix}", network.downscale
    done = export_half(network, half, path, size=None)
    assert done.difference is not None and done.difference < 1e-4
    assert done.input[1][0] is None and done.output[1][2:] == (None, None)
    channels = network.config["latent_channels" if half == "decoder" else "in_channels"]
    unit = scale if half == "encoder" else 1
    for batch, rows, columns in ((1, 4, 7), (3, 8, 5)):  # none of them was traced or run before
        x = torch.randn(batch, channels, rows * unit, columns * unit)
        ours = expected(network, half, x)
        np.testing.assert_allclose(
            runtime(path, x), ours, rtol=1e-3, atol=1e-4 * np.abs(ours).max()
        )
    export_half(network, half, fixed, size=(6 * scale, 6 * scale))
    with pytest.raises(Exception, match=r"(?i)shape|dimension"):  # the runtimes' own
        runtime(fixed, x)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    network: Any = seeded.network(SMALL)
    with pytest.raises(sdconv.InputError, match=r"ending in \.onnx, or in \.xml"):
        export_half(network, "decoder", tmp_path / "half.pt", size=(16, 16))
    pytest.importorskip("openvino", reason="needs the export extra: pip install '.[export]'")
    with pytest.raises(sdconv.InputError, match="not a half of an autoencoder"):
        export_half(network, "decode", tmp_path / "half.xml", size=(16, 16))
    with pytest.raises(sdconv.InputError, match="multiples of 2"):
        export_half(network, "decoder", tmp_path / "half.xml", size=(16, 17))
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(sdconv.InputError, match="expected: a network in float32 or float16"):
            export_half(network.to(dtype), "decoder", tmp_path / "half.xml", size=(16, 16))
    network.float().enable_streaming(progress=False)
    with pytest.raises(sdconv.InputError, match="disable_streaming"):
        export_half(network, "decoder", tmp_path / "half.xml", size=(16, 16))
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs the export extra: pip install '.[export]'")
    out = tmp_path / "half.xml"
    given = ("export", "tiny-vae", "--half", "decoder", "--size", "32", "--out", out)
    said = answer(*given)
    assert said["input"] == {"name": "latents", "shape": [1, 4, 4, 4]}
    assert said["output"] == {"name": "sample", "shape": [1, 3, 32, 32]}
    assert said["difference"] < 1e-4
    assert {Path(file).name for file in said["files"]} == {"half.xml", "half.bin"}
    assert "half.xml: exists already" in run(*given).stderr
    out.unlink()
    assert "half.bin: exists already" in run(*given).stderr
    refused = run(
        "export", "tiny-vae", "--half", "decoder", "--size", "any", "--batch", 2, "-o", out
    )
    assert refused.exit_code == 2 and "takes any number of images" in refused.stderr
