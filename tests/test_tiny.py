"""The tiny autoencoders against their author's architecture, written down here a second time."""

from __future__ import annotations

from pathlib import Path

import pytest
import seeded
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import sdconv
from sdconv.integrations.peers import peer

# --- the author's networks, in [0, 1], from the facts: numbers of layers are part of them


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class Block(nn.Module):
    def __init__(self, width: int, pooled: bool) -> None:
        super().__init__()
        three = (nn.Conv2d(width, width, 3, 1, 1) for _ in range(3))
        self.conv = nn.Sequential(next(three), nn.ReLU(), next(three), nn.ReLU(), next(three))
        self.pool = None
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.GroupNorm(4, 4 * width),
                nn.ReLU(),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(x + self.conv(x))


def halve(before: int, width: int, bias: bool) -> nn.Module:
    return nn.Conv2d(before, width, 3, 2, 1, bias=bias)


def blocks(width: int, count: int, pooled: bool = False) -> list[nn.Module]:
    return [Block(width, pooled) for _ in range(count)]


def encoder(latent: int, pooled: bool) -> nn.Sequential:
    layers = [nn.Conv2d(3, 64, 3, 1, 1), *blocks(64, 1)]
    for stage in range(3):
        layers += [halve(64, 64, False), *blocks(64, 3, pooled and stage == 2)]
    return nn.Sequential(*layers, nn.Conv2d(64, latent, 3, 1, 1))


def sana_encoder(latent: int) -> nn.Sequential:
    layers = [halve(3, 32, True), nn.ReLU(), halve(32, 64, True), nn.ReLU(), *blocks(64, 1)]
    for _ in range(3):
        layers += [halve(64, 64, False), *blocks(64, 3)]
    return nn.Sequential(*layers, nn.Conv2d(64, latent, 3, 1, 1))


def decoder(latent: int, widths: tuple[int, ...], pooled: bool) -> nn.Sequential:
    layers: list[nn.Module] = [Clamp(), nn.Conv2d(latent, widths[0], 3, 1, 1), nn.ReLU()]
    for stage, width in enumerate(widths[:-1]):
        layers += [*blocks(width, 3, pooled and stage == 0), nn.Upsample(scale_factor=2)]
        layers += [nn.Conv2d(width, widths[stage + 1], 3, 1, 1, bias=False)]
    return nn.Sequential(*layers, *blocks(widths[-1], 1), nn.Conv2d(widths[-1], 3, 3, 1, 1))


SANA = (256, 128, 64, 64, 64, 64)
AUTHORS = {
    "taesd": (lambda: encoder(4, False), lambda: decoder(4, (64,) * 4, False)),
    "taef1": (lambda: encoder(16, False), lambda: decoder(16, (64,) * 4, False)),
    "taef2": (lambda: encoder(32, True), lambda: decoder(32, (64,) * 4, True)),
    "taesana": (lambda: sana_encoder(32), lambda: decoder(32, SANA, False)),
}
CONFIGS = {
    "taesd": seeded.tiny(),
    "taef1": seeded.tiny(latent_channels=16),
    "taef2": seeded.POOLED,
    "taesana": seeded.SANA,
}


def author(name: str) -> tuple[nn.Sequential, nn.Sequential]:
    """The author's two halves, with seeded weights."""
    halves = []
    for seed, build in enumerate(AUTHORS[name]):
        half = build().eval()
        shapes = {key: tuple(tensor.shape) for key, tensor in half.state_dict().items()}
        half.load_state_dict(seeded.weights(shapes, seed))
        halves.append(half)
    return halves[0], halves[1]


def files(folder: Path, *halves: nn.Module) -> list[Path]:
    """Each half in its own file, with bare numbers for names, as the author keeps them."""
    paths = [folder / f"{number}.safetensors" for number in range(len(halves))]
    for path, half in zip(paths, halves, strict=True):
        save_file(half.state_dict(), path)
    return paths


def near(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max() / b.abs().max()) < 1e-5


@pytest.mark.parametrize("name", AUTHORS)
@pytest.mark.parametrize("turned", [False, True], ids=["encoder first", "decoder first"])
def test_equals_the_authors(name: str, turned: bool, tmp_path: Path) -> None:
    halves = author(name)
    paths = files(tmp_path, *halves)
    network = sdconv.load(paths[::-1] if turned else paths)
    assert isinstance(network, sdconv.AutoencoderTiny)
    assert network.config == CONFIGS[name]
    stride = network.downscale
    assert stride == (32 if name == "taesana" else 8)
    random = torch.Generator().manual_seed(1)
    image = torch.rand((2, 3, 2 * stride, 3 * stride), generator=random)
    latents = 4 * torch.randn((2, network.config.latent_channels, 2, 3), generator=random)
    with torch.no_grad():
        ours = network.encode(2 * image - 1).latents, network.decode(latents).sample
        theirs = halves[0](image), 2 * halves[1](latents) - 1
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert near(a, b)


@pytest.mark.parametrize("name", AUTHORS)
def test_one_file_of_both_halves(name: str, tmp_path: Path) -> None:
    both = nn.Module()
    both.encoder, both.decoder = author(name)
    (path,) = files(tmp_path, both)
    network = sdconv.load(path)
    assert network.config == CONFIGS[name]
    assert len(network.state_dict()) == len(both.state_dict())


@pytest.mark.parametrize("name", AUTHORS)
def test_one_half_alone(name: str, tmp_path: Path) -> None:
    halves = author(name)
    paths = files(tmp_path, *halves)
    stride, latent = (32 if name == "taesana" else 8), CONFIGS[name].latent_channels
    image, latents = torch.zeros(1, 3, stride, stride), torch.zeros(1, latent, 1, 1)

    encoding = sdconv.load(paths[0])
    assert encoding.downscale == stride
    assert encoding.encode(image).latents.shape == latents.shape
    with pytest.raises(sdconv.SdconvError, match=r"decoder is missing.*cannot decode") as raised:
        encoding.decode(latents)
    assert "got: weights of the encoder only" in str(raised.value)
    assert "sdconv.load([encoder_file, decoder_file])" in str(raised.value)

    decoding = sdconv.load(paths[1])
    assert decoding.downscale == stride
    assert decoding.decode(latents).sample.shape == image.shape
    with pytest.raises(sdconv.SdconvError, match=r"encoder is missing.*cannot encode"):
        decoding.encode(image)


def test_two_encoders_are_an_error(tmp_path: Path) -> None:
    one = author("taesd")[0]
    with pytest.raises(sdconv.SdconvError, match="not the two halves"):
        sdconv.load(files(tmp_path, one, one))


def test_halves_of_different_autoencoders_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(sdconv.SdconvError, match="different autoencoders"):
        sdconv.load(files(tmp_path, author("taesd")[0], author("taef1")[1]))


def test_results_and_the_way_through_bytes_are_diffusers() -> None:
    config = seeded.tiny()
    ours = seeded.network(config)
    theirs, _ = peer(config, None, seeded.tensors(config), "diffusers")
    x = torch.randn((2, 3, 24, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        encoded, decoded = ours.encode(x), ours(x)
        assert torch.equal(encoded.latents, theirs.encode(x).latents)
        assert encoded.latents is encoded["latents"] is encoded[0]
        assert torch.equal(decoded.sample, theirs(x).sample)
        assert torch.equal(ours(x, return_dict=False)[0], theirs(x, return_dict=False)[0])
        latents = encoded.latents
        scaled = ours.scale_latents(latents)
        assert torch.equal(scaled, theirs.scale_latents(latents))
        assert torch.equal(ours.unscale_latents(scaled), theirs.unscale_latents(scaled))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_way_through_bytes_in_half_precision(dtype: torch.dtype) -> None:
    """Where diffusers' own fails: bytes divide to float32."""
    network, x = seeded.network(seeded.tiny()).to(dtype), torch.zeros(1, 3, 16, 16, dtype=dtype)
    assert network(x).sample.dtype == dtype


def test_config_reads_as_diffusers_does() -> None:
    config = seeded.tiny()
    theirs, _ = peer(config, None, seeded.tensors(config), "diffusers")
    for key, value in theirs.config.items():
        if not key.startswith("_"):
            assert config[key] == (tuple(value) if isinstance(value, list) else value), key


def test_tiling_is_refused() -> None:
    with pytest.raises(sdconv.SdconvError, match=r"AutoencoderTiny.enable_tiling: tiling is not"):
        seeded.network(seeded.tiny()).enable_tiling()
