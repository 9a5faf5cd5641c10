"""Values that a narrower dtype cannot hold: refused by name, or clamped and said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import seeded, unets
from helpers.weight_files import convert, is_mapped
from safetensors.torch import load_file, save_file
from torch import Tensor

import sdconv

KL = seeded.SMALL_KL
NAME = "decoder.conv_in.weight"
F16, BF16 = torch.float16, torch.bfloat16


def state(value: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A VAE's weights with one value of that size."""
    tensors = {name: tensor.to(dtype) for name, tensor in seeded.tensors(KL).items()}
    tensors[NAME] = tensors[NAME].clone()
    tensors[NAME].view(-1)[5] = value
    return tensors


BEYOND = [
    (70000.0, torch.float32, F16),
    (-70000.0, torch.float32, F16),
    (70000.0, BF16, F16),
    (1e300, torch.float64, F16),
    (3.4e38, torch.float32, BF16),
    (1e39, torch.float64, torch.float32),
]
WITHIN = [
    (65504.0, torch.float32, F16),
    (65519.0, torch.float32, F16),
    (70000.0, torch.float32, BF16),
    (3.38e38, torch.float32, BF16),
    (70000.0, torch.float32, torch.float64),
]


@pytest.mark.parametrize(("value", "stored", "dtype"), BEYOND)
def test_refused_with_name_and_value(
    value: float, stored: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors, path = state(value, stored), tmp_path / "vae.safetensors"
    save_file(tensors, path)
    number = float(torch.tensor(value, dtype=stored))
    words = rf"decoder\.conv_in\.weight holds {number:g}, which is infinite in".replace("+", r"\+")
    with pytest.raises(sdconv.CheckpointError, match=words):
        sdconv.load(path, dtype=dtype, family="sd1")
    for out in ("out.safetensors", "folder"):
        with pytest.raises(sdconv.CheckpointError, match=words):
            convert(path, tmp_path / out, "diffusers", family="sd1", dtype=dtype)
        assert not (tmp_path / out).exists()
    network = sdconv.load(path, family="sd1")
    with pytest.raises(sdconv.CheckpointError, match=words):
        sdconv.save(network, tmp_path / "saved", dtype=dtype)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(("value", "stored", "dtype"), BEYOND)
def test_clamped_and_said(
    value: float, stored: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = state(value, stored)
    limit = torch.finfo(dtype).max * (1 if value > 0 else -1)
    right = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    right[NAME].view(-1)[5] = limit
    with pytest.warns(sdconv.SdconvWarning, match=r"1 tensors .* clamped, first decoder\.conv_in"):
        network = sdconv.load(tensors, dtype=dtype, family="sd1", clamp=True)
    with pytest.warns(sdconv.SdconvWarning, match="clamped"):
        convert(tensors, tmp_path / "c", "diffusers", family="sd1", dtype=dtype, clamp=True)
    with pytest.warns(sdconv.SdconvWarning, match="clamped"):
        sdconv.save(sdconv.load(tensors, family="sd1"), tmp_path / "s", dtype=dtype, clamp=True)
    for found in (
        network.state_dict(),
        load_file(tmp_path / "c" / "diffusion_pytorch_model.safetensors"),
        load_file(tmp_path / "s" / "diffusion_pytorch_model.safetensors"),
    ):
        assert all(torch.equal(found[name], tensor) for name, tensor in right.items())


@pytest.mark.parametrize(("value", "stored", "dtype"), WITHIN)
def test_what_fits_is_cast(value: float, stored: torch.dtype, dtype: torch.dtype) -> None:
    network = sdconv.load(state(value, stored), dtype=dtype, family="sd1")
    assert float(network.state_dict()[NAME].view(-1)[5]) == float(
        torch.tensor(value, dtype=stored).to(dtype)
    )


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinity_was_there_before(value: float) -> None:
    for clamp in (False, True):
        network = sdconv.load(state(value), dtype=F16, family="sd1", clamp=clamp)
        assert float(network.state_dict()[NAME].view(-1)[5]) == value


def test_save_in_another_dtype(tmp_path: Path) -> None:
    network = sdconv.load(state(1.0), family="sd1")
    sdconv.save(network, tmp_path / "half.safetensors", dtype=F16)
    assert network.dtype == torch.float32
    assert {t.dtype for t in load_file(tmp_path / "half.safetensors").values()} == {F16}
    with pytest.raises(sdconv.InputError, match="do not compute in this dtype"):
        sdconv.save(network, tmp_path / "x", dtype=torch.int8)


def test_without_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    save_file(state(1.0), path)
    mapped = sdconv.load(path, family="sd1").state_dict()[NAME]
    copied = sdconv.load(path, family="sd1", mmap=False).state_dict()[NAME]
    assert is_mapped(mapped, path)
    assert not is_mapped(copied, path)
    assert torch.equal(mapped, copied)


def test_a_model_is_written_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    network = unets.on_meta(unets.smallest("SD1"))
    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    weights = {f"unet.{k}": v for k, v in seeded.weights(shapes).items()}
    whole = weights | {f"vae.{k}": v for k, v in seeded.tensors(KL).items()}
    weights["unet.conv_in.bias"].view(-1)[0] = 70000
    out = tmp_path / "model"
    with pytest.raises(sdconv.CheckpointError, match=r"unet\.conv_in\.bias holds 70000"):
        convert(whole, out, "diffusers", family="sd1", dtype=F16)
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(sdconv.CheckpointError, match="infinite"):
        convert(whole, out, "diffusers", family="sd1", dtype=F16)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    convert(whole, out, "diffusers", family="sd1", dtype=BF16)
    assert (out / "unet" / "config.json").exists()
