"""Raw and scaled latents: each family's formula, its inverse, and files that record which."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import seeded
from safetensors.torch import save_file
from torch import Tensor

import sdconv
from sdconv.latents import (
    LatentScale,
    StoredLatents,
    read_latents,
    read_stored,
    scale,
    unscale,
    write_latents,
)

SD3 = seeded.kl((32, 32), 16, False, scaling_factor=1.5305, shift_factor=0.0609)
SPREAD = seeded.kl(
    (32, 32), 2, False, scaling_factor=0.5, latents_mean=(1.0, 2.0), latents_std=(4.0, 8.0)
)
FLUX1 = seeded.kl((32, 32), 16, False, scaling_factor=0.3611, shift_factor=0.1159)
FLUX2 = seeded.flux2((32, 32), layers_per_block=1)


def latents(channels: int, rows: int = 4, columns: int = 6) -> Tensor:
    return torch.randn(2, channels, rows, columns, generator=torch.Generator().manual_seed(3))


def patches_as_diffusers_makes_them(z: Tensor) -> Tensor:
    """``Flux2Pipeline._patchify_latents``."""
    b, c, h, w = z.shape
    z = z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return z.reshape(b, 4 * c, h // 2, w // 2)


def test_shift_and_factor() -> None:
    z = latents(16)
    assert torch.equal(scale(seeded.network(SD3), z), (z - 0.0609) * 1.5305)


def test_mean_and_standard_deviation_of_each_channel() -> None:
    z = torch.ones(1, 2, 1, 1)
    assert scale(seeded.network(SPREAD), z).flatten().tolist() == [0.0, -0.0625]


def test_a_tiny_autoencoders_latents_are_already_scaled() -> None:
    z = latents(4)
    assert torch.equal(scale(seeded.network(seeded.tiny()), z), z)


def test_flux2_normalises_patches() -> None:
    network, z = seeded.network(FLUX2), latents(32)
    mean, variance = (
        t.view(1, -1, 1, 1) for t in (network.bn.running_mean, network.bn.running_var)
    )
    expected = (patches_as_diffusers_makes_them(z) - mean) / torch.sqrt(variance + 1e-4)
    assert torch.equal(scale(network, z), expected)
    assert scale(network, z).shape == (2, 128, 2, 3)


@pytest.mark.parametrize("config", [SD3, SPREAD, FLUX2, seeded.tiny()])
def test_there_and_back(config: sdconv.AutoencoderKLConfig) -> None:
    network, z = seeded.network(config), latents(config.latent_channels)
    assert torch.allclose(unscale(network, scale(network, z)), z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [SD3, FLUX2])
@pytest.mark.parametrize("direction", [scale, unscale])
def test_other_channels(config: sdconv.AutoencoderKLConfig, direction: object) -> None:
    with pytest.raises(sdconv.InputError, match="wrong shape"):
        direction(seeded.network(config), latents(5))  # type: ignore[operator]


@pytest.mark.parametrize("config", [SD3, FLUX2])
@pytest.mark.parametrize("direction", [scale, unscale])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "latents must be a tensor"),
        (latents(16).numpy(), "latents must be a tensor"),
        (torch.zeros(1, 16, 4, 4, dtype=torch.int64), "latents must be floating-point numbers"),
    ],
)
def test_not_a_floating_point_tensor(
    config: sdconv.AutoencoderKLConfig, direction: object, value: object, words: str
) -> None:
    network = seeded.network(config)
    if isinstance(value, Tensor):
        channels = config.latent_channels
        wanted = 4 * channels if config is FLUX2 and direction is unscale else channels
        value = value[:, :1].expand(1, wanted, 4, 4)
    with pytest.raises(sdconv.InputError, match=words):
        direction(network, value)  # type: ignore[operator]


def test_odd_sizes_cannot_be_cut_into_patches() -> None:
    with pytest.raises(sdconv.InputError, match="cannot be cut into patches"):
        scale(seeded.network(FLUX2), latents(32, 3, 4))


@pytest.mark.parametrize("scaled", [True, False])
def test_a_file_records_whether_they_are_scaled(scaled: bool, tmp_path: Path) -> None:
    path = tmp_path / "z.safetensors"
    for named in (path, str(path)):
        write_latents(latents(4), named, scaled=scaled)
    read, said = read_latents(path)
    assert torch.equal(read, latents(4))
    assert said is scaled


def test_files_of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "z.safetensors"
    save_file({"samples": latents(4)[0].half()}, path)
    read, said = read_latents(path)
    assert (read.shape, read.dtype, said) == ((1, 4, 4, 6), torch.float32, None)
    save_file({"samples": latents(4), "noise": latents(3)}, path)
    assert read_latents(path, "noise")[0].shape[1] == 3


@pytest.mark.parametrize(
    ("tensors", "key", "words"),
    [
        ({"a": torch.zeros(1, 4, 2, 2), "b": torch.zeros(1, 4, 2, 2)}, None, "which tensor"),
        ({"a": torch.zeros(4, 2, 2), "b": torch.zeros(1)}, None, "which tensor"),
        ({"a": torch.zeros(1, 4, 2, 2)}, "b", "which tensor"),
        ({"a": torch.zeros(4)}, None, "not latents"),
        ({"a": torch.zeros(1, 4, 0, 2)}, None, "not latents"),
        ({"a": torch.zeros(1, 4, 2, 2, dtype=torch.int32)}, None, "not latents"),
        ({"a": torch.full((1, 4, 2, 2), torch.nan)}, None, "NaN"),
    ],
)
def test_not_latents(
    tensors: dict[str, Tensor], key: str | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "z.safetensors"
    save_file(tensors, path)
    with pytest.raises(sdconv.InputError, match=words):
        read_latents(path, key)


EMPTY = torch.tensor([])
KL = seeded.SMALL_KL


@pytest.mark.parametrize(
    ("tensors", "factor", "scaled"),
    [
        # ComfyUI's files: today's, and those before they were marked
        ({"latent_tensor": latents(4), "latent_format_version_0": EMPTY}, 1.0, False),
        ({"latent_tensor": latents(4)}, 1 / 0.18215, False),
        ({"samples": latents(4), "noise_mask": torch.ones(2, 1, 32, 48)}, 1.0, False),
        ({"samples": latents(4), "noise_mask": torch.ones(32, 48)}, 1.0, False),
        # the only tensor with four axes, and a known name
        ({"z": latents(4), "sigma": torch.ones(3), "mask": torch.ones(2, 4, 6)}, 1.0, None),
        ({"samples": latents(4), "other": latents(4)}, 1.0, None),
        ({"latents": latents(4), "samples": latents(4) + 1}, 1.0, None),
    ],
)
def test_which_tensor_and_what_it_is(
    tensors: dict[str, Tensor], factor: float, scaled: bool | None, tmp_path: Path
) -> None:
    path = tmp_path / "z.latent"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    read, said = read_latents(path)
    assert torch.allclose(read, latents(4) * factor, rtol=1e-6)
    assert said is scaled
    if "latent_tensor" in tensors:
        assert torch.equal(read_latents(path, "latent_tensor")[0], read)


def test_old_files_of_comfyui_have_a_known_scale(tmp_path: Path) -> None:
    """So a tiny autoencoder can decode them; today's do not name their model."""
    path, tiny = tmp_path / "z.latent", seeded.network(seeded.tiny())
    save_file({"latent_tensor": latents(4)}, path)
    assert torch.allclose(read_stored(path).for_decoder(tiny), latents(4), rtol=1e-5)
    save_file({"latent_tensor": latents(4), "latent_format_version_0": EMPTY}, path)
    with pytest.raises(
        sdconv.InputError, match=r"(?s)raw, and their file does.*pass family= .*: sd1"
    ):
        read_stored(path).for_decoder(tiny)
    assert torch.equal(read_stored(path).for_decoder(seeded.network(KL)), latents(4))


@pytest.mark.parametrize("config", [SD3, SPREAD, KL])
def test_a_vaes_latents_through_a_tiny_autoencoder(
    config: sdconv.AutoencoderKLConfig, tmp_path: Path
) -> None:
    vae, path = seeded.network(config), tmp_path / "z.safetensors"
    tiny = seeded.network(seeded.tiny(latent_channels=config.latent_channels))
    raw = latents(config.latent_channels)
    for scaled in (False, True):
        written = scale(vae, raw) if scaled else raw
        write_latents(written, path, scaled=scaled, network=vae)
        stored = read_stored(path)
        assert stored.made_by == LatentScale.of(vae)
        assert torch.allclose(stored.for_decoder(tiny), scale(vae, raw), rtol=1e-5, atol=1e-6)
        assert torch.allclose(stored.for_decoder(vae), raw, rtol=1e-5, atol=1e-6)
        diffused = stored.for_diffusion(path)
        assert torch.allclose(diffused, scale(vae, raw), rtol=1e-5, atol=1e-6)
    # a tiny autoencoder's through the VAE
    write_latents(raw, path, scaled=True, network=tiny)
    stored = read_stored(path)
    assert stored.made_by is None
    assert torch.equal(stored.for_decoder(vae), unscale(vae, raw))
    assert torch.equal(stored.for_decoder(tiny), raw)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("sd1", KL),
        ("taesd", KL),
        ("sdxl", replace(KL, scaling_factor=0.13025)),
        ("taesdxl", replace(KL, scaling_factor=0.13025)),
        ("taef1", FLUX1),
        ("sd3", SD3),
    ],
)
def test_the_family_says_which_vae_made_raw_latents(
    family: str, config: sdconv.AutoencoderKLConfig, tmp_path: Path
) -> None:
    raw, path = latents(config.latent_channels), tmp_path / "z.latent"
    tiny = seeded.network(seeded.tiny(latent_channels=config.latent_channels))
    save_file({"latent_tensor": raw, "latent_format_version_0": EMPTY}, path)
    right = scale(seeded.network(config), raw)
    assert torch.allclose(read_stored(path).for_decoder(tiny, family=family), right, rtol=1e-5)
    assert torch.allclose(read_stored(path).for_diffusion(path, family), right, rtol=1e-5)
    assert not torch.allclose(raw, right, rtol=0.1), "the control"
    other = "sd3" if config.latent_channels == 4 else "sdxl"
    with pytest.raises(sdconv.InputError, match=f"family: the family '{other}' has no known scale"):
        read_stored(path).for_decoder(tiny, family=other)
    # what the file says is not overruled
    write_latents(raw, path, scaled=False, network=seeded.network(config))
    assert torch.allclose(read_stored(path).for_decoder(tiny, family=family), right, rtol=1e-5)
    other = (
        "x4-upscaler" if config.latent_channels == 4 else "sd3" if family == "taef1" else "flux1"
    )
    with pytest.raises(sdconv.InputError, match="names the scale of another family"):
        read_stored(path).for_decoder(tiny, family=other)


def test_latents_of_another_vae(tmp_path: Path) -> None:
    path, z = tmp_path / "z.safetensors", latents(4)
    sd1 = seeded.network(KL)
    sdxl = seeded.network(seeded.kl((32, 64), 4, True, layers_per_block=1, scaling_factor=0.13025))
    write_latents(z, path, scaled=True, network=sd1)
    with pytest.raises(sdconv.InputError, match=r"scaled for another VAE\n.*0\.13025\n.*0\.18215"):
        read_stored(path).for_decoder(sdxl)
    write_latents(z, path, scaled=False, network=sd1)
    with pytest.warns(sdconv.SdconvWarning, match=r"a VAE with factor 0\.18215; .* 0\.13025"):
        assert torch.equal(read_stored(path).for_decoder(sdxl), z)
    assert torch.equal(read_stored(path).for_decoder(sd1), z), "the control warns of nothing"


def test_raw_latents_without_a_scale() -> None:
    stored = StoredLatents(latents(4), scaled=False)
    with pytest.raises(sdconv.InputError, match="does not say of which VAE they are"):
        stored.for_diffusion("a U-Net")
    with pytest.raises(sdconv.InputError, match="does not say of which VAE they are"):
        stored.for_decoder(seeded.network(seeded.tiny()))
    unsaid = StoredLatents(latents(4), scaled=None)
    assert torch.equal(unsaid.for_decoder(seeded.network(seeded.tiny())), latents(4))
    assert torch.equal(unsaid.for_decoder(seeded.network(KL)), latents(4))
    assert torch.equal(
        unsaid.for_decoder(seeded.network(KL), scaled=True), unscale(seeded.network(KL), latents(4))
    )


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"factor": "a"}', '{"factor": 0}', '{"factor": 1, "mean": [1]}', "[" * 9999],
)
def test_a_damaged_scale(text: str, tmp_path: Path) -> None:
    path = tmp_path / "z.safetensors"
    save_file({"latents": latents(4)}, path, {"sdconv.latents.scale": text})
    with pytest.raises(sdconv.InputError, match="not a latent scale"):
        read_stored(path)


def test_numpys_files_and_a_single_tensor(tmp_path: Path) -> None:
    """sd-scripts' are raw, but for FLUX.1's; others do not say."""
    raw, files = latents(4)[:1], {}
    size = {"original_size": np.array([48, 32]), "crop_ltrb": np.zeros(4)}
    files["a.npz"] = {"latents": raw[0].numpy(), **size}
    files["a_48x32_sd3.npz"] = {"latents_4x6": raw[0].numpy(), "original_size_4x6": np.zeros(2)}
    files["a_48x32_flux.npz"] = {"latents_4x6": raw[0].numpy()}
    for name, arrays in files.items():
        np.savez(tmp_path / name, **arrays)
        read, said = read_latents(tmp_path / name)
        assert torch.equal(read, raw)
        assert said is (None if "flux" in name else False)
    np.save(tmp_path / "a.npy", raw.numpy())
    torch.save(raw, tmp_path / "a.pt")
    for name in ("a.npy", "a.pt"):
        read, said = read_latents(tmp_path / name)
        assert torch.equal(read, raw) and said is None
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 and no more")
    for name in ("o.npy", "b.npz"):
        with pytest.raises(sdconv.CheckpointError, match="numpy's arrays"):
            read_latents(tmp_path / name)
    with pytest.raises(sdconv.CheckpointError, match="does not exist"):
        read_latents(tmp_path / "gone.npz")


def test_another_format_of_comfyui(tmp_path: Path) -> None:
    path = tmp_path / "z.latent"
    save_file({"latent_tensor": latents(4), "latent_format_version_1": EMPTY}, path)
    with pytest.raises(sdconv.InputError, match="format of ComfyUI that sdconv does not know"):
        read_latents(path)
