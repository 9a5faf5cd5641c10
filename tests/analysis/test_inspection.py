"""Inspection of weights: networks, other tensors, missing tensors, unusual values."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
from helpers import seeded
from safetensors.torch import save_file
from torch import Tensor

import sdconv
from sdconv.analysis.inspection import check_values, inspect
from sdconv.checkpoint.io.header import DTYPE_BITS
from sdconv.checkpoint.save import original_tensors

CONFIG = seeded.kl((32, 32), 4, True, layers_per_block=1)


def names_of(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A VAE among everything else that a checkpoint in the original layout holds."""
    vae = original_tensors(seeded.tensors(CONFIG), CONFIG)
    tensors = {f"first_stage_model.{name}": tensor.half() for name, tensor in vae.items()}
    tensors |= {
        "first_stage_model.loss.logvar": torch.zeros(()),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.ones(768),
        "model_ema.diffusion_modelout2bias": torch.ones(4),
        "model_ema.num_updates": torch.tensor(3),
        "betas": torch.ones(10),
        "sqrt_alphas_cumprod": torch.ones(10),
        "something.of.mine.3.weight": torch.ones(2, 2),
        "something.of.mine.4.weight": torch.ones(2, 2),
    }
    return names_of(tmp_path / "whole.safetensors", tensors, made="by hand")


def test_a_whole_checkpoint(whole: Path) -> None:
    found = inspect(whole)
    assert found.complaint is None
    (part,) = found.parts
    (vae,) = part.networks
    assert (vae.component, vae.class_name, vae.layout) == ("vae", "AutoencoderKL", "original")
    assert (vae.prefix, vae.family, vae.open_to) == ("first_stage_model.", "sd1", ())
    assert "text encoder" in vae.evidence
    assert vae.config["block_out_channels"] == (32, 32)
    network = seeded.network(CONFIG)
    assert vae.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert vae.amount.nbytes == 2 * vae.amount.numbers == 2 * vae.parameters
    assert vae.amount.dtypes == {"F16": vae.amount.tensors}
    assert part.metadata == {"made": "by hand"}
    others = {(one.what, one.prefix): one.amount.tensors for one in part.unused}
    assert others == {
        ("training loss", "first_stage_model.loss."): 1,
        ("text encoder", "cond_stage_model."): 1,
        ("EMA copy", "model_ema."): 2,
        ("noise schedule", ""): 2,
        ("unknown", "something.of.mine"): 2,
    }
    assert part.amount.tensors == vae.amount.tensors + sum(others.values())
    assert json.loads(json.dumps(found.to_json()))["parts"][0]["networks"][0]["family"] == "sd1"


def test_an_open_family_is_reported_and_decided_by_the_caller(tmp_path: Path) -> None:
    path = names_of(tmp_path / "vae.safetensors", seeded.tensors(CONFIG))
    assert inspect(path).network("vae").open_to == ("sd1", "sd2", "sdxl")
    assert "sd1 was taken (scaling_factor 0.18215" in (inspect(path).network("vae").guess or "")
    decided = inspect(path, family="sdxl").network(None)
    assert (decided.family, decided.open_to, decided.guess) == ("sdxl", (), None)
    assert decided.config["scaling_factor"] == 0.13025
    with pytest.raises(sdconv.InputError, match="unknown family"):
        inspect(path, family="sd99")


def test_missing_unexpected_and_misshapen_tensors(tmp_path: Path) -> None:
    tensors = seeded.tensors(CONFIG)
    del tensors["decoder.conv_in.bias"]
    tensors["encoder.conv_out.bias"] = torch.ones(3)
    tensors["decoder.mid_block.novel.weight"] = torch.ones(3)
    found = inspect(names_of(tmp_path / "vae.safetensors", tensors))
    vae = found.network("vae")
    assert vae.missing == ("decoder.conv_in.bias",)
    assert vae.misshapen == ("encoder.conv_out.bias",)
    assert vae.unexpected == ("decoder.mid_block.novel.weight",)
    assert not vae.whole
    assert found.complaint == (
        "the vae cannot be loaded: tensors 1 missing, 1 unexpected, 1 of the wrong shape"
    )


def test_weights_that_are_integers(tmp_path: Path) -> None:
    tensors = seeded.tensors(CONFIG) | {"quant_conv.weight": torch.ones(8, 8, 1, 1).to(torch.int8)}
    found = inspect(names_of(tmp_path / "vae.safetensors", tensors))
    assert found.network("vae").not_floating == ("quant_conv.weight",)
    assert not found.network("vae").whole
    assert found.complaint == ("the vae cannot be loaded: tensors 1 not floating-point")


def test_a_config_that_contradicts_the_weights(tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    sdconv.save(seeded.network(CONFIG), folder)
    assert inspect(folder).network("vae").contradicted == ()
    content = json.loads((folder / "config.json").read_text()) | {"latent_channels": 16}
    (folder / "config.json").write_text(json.dumps(content))
    found = inspect(folder)
    assert found.network("vae").contradicted == ("latent_channels = 16 where the shapes say 4",)
    assert found.complaint is not None
    assert found.complaint.endswith("its config says latent_channels = 16 where the shapes say 4")


@pytest.mark.parametrize("paths", [None, 3, [], [None], b"vae.safetensors"])
def test_arguments_that_are_not_paths(paths: object) -> None:
    for look in (inspect, check_values):
        with pytest.raises(sdconv.InputError):
            look(paths)  # type: ignore[arg-type]


def test_a_language_model(tmp_path: Path) -> None:
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": torch.ones(4, 4) for n in range(3)}
    found = inspect(names_of(tmp_path / "llm.safetensors", tensors))
    assert found.networks == ()
    assert found.complaint is not None
    assert "no network that sdconv knows" in found.complaint
    (unused,) = found.parts[0].unused
    assert (unused.what, unused.prefix, unused.amount.numbers) == ("unknown", "model.layers", 48)
    with pytest.raises(sdconv.UnknownNetworkError, match="no network"):
        found.network(None)


def test_a_pipelines_folder(tmp_path: Path) -> None:
    sdconv.save(seeded.network(CONFIG), tmp_path / "vae")
    (tmp_path / "text_encoder").mkdir()
    names_of(tmp_path / "text_encoder/model.safetensors", {"text_model.a.weight": torch.ones(2)})
    (tmp_path / "model_index.json").write_text("{}", encoding="utf-8")
    found = inspect(tmp_path)
    assert [part.name for part in found.parts] == ["text_encoder", "vae"]
    assert found.complaint is None
    assert found.network(None).config == CONFIG
    assert [one.what for one in found.parts[0].unused] == ["text encoder"]
    with pytest.raises(sdconv.UnknownNetworkError, match="no such component"):
        found.network("unet")
    assert check_values(tmp_path).tensors == sum(part.amount.tensors for part in found.parts)


def test_two_halves_in_two_files(tmp_path: Path) -> None:
    config = seeded.tiny()
    halves = original_tensors(seeded.tensors(config), config)
    paths = [
        names_of(
            tmp_path / f"{half}.safetensors",
            {k.removeprefix(f"{half}."): v for k, v in halves.items() if k.startswith(half)},
        )
        for half in ("decoder", "encoder")
    ]
    found = inspect(paths)
    (tiny,) = found.networks
    assert (tiny.class_name, tiny.whole) == ("AutoencoderTiny", True)
    assert tiny.amount.tensors == len(halves)
    assert inspect(paths[:1]).network(None).config["num_encoder_blocks"] == ()
    both = inspect([paths[0], paths[0]])
    assert both.complaint is not None
    assert "one encoder and one decoder" in both.complaint


def test_statistics_are_not_parameters(tmp_path: Path) -> None:
    config = seeded.flux2((32, 32), layers_per_block=1)
    network = seeded.network(config)
    found = inspect(sdconv.save(network, tmp_path / "vae.safetensors")[0]).network("vae")
    assert found.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert found.parameters < found.amount.numbers


def test_only_headers_are_read(whole: Path, tmp_path: Path) -> None:
    # a sparse file, larger than memory
    header = json.dumps(
        {
            "first_stage_model.post_quant_conv.weight": {
                "dtype": "F32",
                "shape": [1 << 14, 1 << 24],
                "data_offsets": [0, 1 << 40],
            }
        }
    ).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 40))
    assert inspect(path).parts[0].amount.nbytes == 1 << 40


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_unusual_values(dtype: torch.dtype, tmp_path: Path) -> None:
    small = dtype.itemsize == 1  # E4M3 has no infinity
    odd = torch.tensor([1.0, torch.nan, 1.0 if small else torch.inf]).to(dtype)
    tensors = {
        "sound": torch.ones(3).to(dtype),
        "odd": odd,
        "zero": torch.zeros(3).to(dtype),
        "count": torch.zeros(3, dtype=torch.int64),
        "none": torch.zeros(0, 4).to(dtype),
    }
    read: list[str] = []
    report = check_values(
        names_of(tmp_path / "a.safetensors", tensors),
        on_tensor=lambda name, done, total: read.append(name) or None,
    )
    assert report.nan == {"odd": 1}
    assert report.infinite == ({} if small else {"odd": 1})
    assert report.zero == ["zero"]
    assert not report.sound
    assert sorted(read) == sorted(tensors)
    assert report.tensors == len(tensors)
    assert check_values(names_of(tmp_path / "b.safetensors", {"a": torch.ones(2)})).sound


def test_dtypes_that_torch_lacks_are_not_read(tmp_path: Path) -> None:
    header = b'{"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}'
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    report = check_values(path)
    assert (report.tensors, report.unread, report.sound) == (0, {"a": "F4"}, True)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["sd15-ldm-with-ema", "sdxl-base-ldm", "sd3-flux-vae-ldm"])
def test_full_size_headers(name: str, shared_dir: Path, tmp_path: Path) -> None:
    listed = json.loads((shared_dir / "headers" / f"{name}.json").read_text(encoding="utf-8"))
    entries, end = {}, 0
    for tensor, (shape, dtype) in listed.items():
        start, end = end, end + DTYPE_BITS[dtype] // 8 * prod(shape)
        entries[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    path = tmp_path / "full.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    found = inspect(path)
    assert found.complaint is None
    assert found.network("vae").whole
    kinds = {one.what for one in found.parts[0].unused}
    assert "unknown" not in kinds
    assert ("EMA copy" in kinds) == ("ema" in name)
    assert ("text encoder" in kinds) == name.startswith("sd15")
