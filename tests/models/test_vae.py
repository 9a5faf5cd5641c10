"""The VAE against diffusers': outputs, order of parameters, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from helpers import seeded
from helpers.numbers import randn
from torch import Tensor, nn

import sdconv
from sdconv.config import Config
from sdconv.integrations.peers import peer
from sdconv.models.base import Autoencoder

SMALL = seeded.kl((32, 32), 4, True, layers_per_block=1)
SMALL_FLUX2 = seeded.flux2((32, 32), layers_per_block=1)


def pair(config: Config) -> tuple[Autoencoder, Any]:
    theirs, _ = peer(config, None, seeded.tensors(config), "diffusers")
    return seeded.network(config), theirs


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", seeded.WITH_PEER)
def test_order_of_parameters_and_buffers(kind: str) -> None:
    ours, theirs = pair(seeded.WITH_PEER[kind])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]


def test_latent_distribution() -> None:
    ours, theirs = pair(SMALL)
    x = randn(2, 3, 18, 22)
    with torch.no_grad():
        a, b = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
        other_a, other_b = ours.encode(-x).latent_dist, theirs.encode(-x).latent_dist
    for name in ("parameters", "mean", "logvar", "std", "var"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert torch.equal(a.mode(), b.mode())
    assert torch.equal(a.sample(generator()), b.sample(generator()))
    several = [generator(1), generator(2)]
    same = [generator(1), generator(2)]
    assert torch.equal(a.sample(several), b.sample(same))
    assert torch.equal(a.kl(), b.kl()) and a.kl().shape == (2,)
    assert torch.equal(a.kl(other_a), b.kl(other_b))
    assert torch.equal(a.nll(randn(2, 4, 9, 11)), b.nll(randn(2, 4, 9, 11)))
    with pytest.raises(sdconv.InputError, match="expected one generator"):
        a.sample([generator(), generator(), generator()])


def test_log_variance_is_clamped() -> None:
    wide = torch.full((1, 4, 1, 1), 100.0)
    for moments in (wide, -wide):
        a = sdconv.models.outputs.DiagonalGaussianDistribution(moments)
        b = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(moments)
        assert torch.equal(a.std, b.std) and torch.equal(a.kl(), b.kl())


def test_samples_use_the_global_random_state_as_in_diffusers() -> None:
    ours, theirs = pair(SMALL)
    x = randn(1, 3, 16, 16)
    drawn = []
    for network in (ours, theirs):
        torch.manual_seed(0)
        with torch.no_grad():
            drawn.append(network.encode(x).latent_dist.sample())
    assert torch.equal(*drawn)


@pytest.mark.parametrize("config", [SMALL, SMALL_FLUX2], ids=["kl", "flux2"])
def test_forward(config: Config) -> None:
    ours, theirs = pair(config)
    x = randn(2, 3, 16, 16)
    for options in ({}, {"sample_posterior": True}):
        with torch.no_grad():
            a = ours(x, **options, generator=generator())
            b = theirs(x, **options, generator=generator())
        assert torch.equal(a.sample, b.sample)


def test_outputs_by_name_key_and_index() -> None:
    ours, theirs = pair(SMALL)
    x, z = randn(1, 3, 16, 16), randn(1, 4, 8, 8)
    for network in (ours, theirs):
        with torch.no_grad():
            encoded, decoded = network.encode(x), network.decode(z)
            plain = network.encode(x, return_dict=False), network.decode(z, return_dict=False)
        assert encoded.latent_dist is encoded["latent_dist"] is encoded[0]
        assert decoded.sample is decoded["sample"] is decoded[0] is decoded.to_tuple()[0]
        assert list(decoded) == list(decoded.keys()) == ["sample"]
        assert len(decoded) == 1 and "sample" in decoded and "latents" not in decoded
        assert dict(**decoded)["sample"] is dict(decoded.items())["sample"] is decoded.sample
        assert next(iter(decoded.values())) is decoded[:1][0] is decoded.sample
        with pytest.raises(KeyError):
            _ = decoded["no such field"]
        assert all(type(result) is tuple and len(result) == 1 for result in plain)
        assert torch.equal(plain[0][0].parameters, encoded.latent_dist.parameters)
        assert torch.equal(plain[1][0], decoded.sample)


def test_decode_does_not_clamp() -> None:
    with torch.no_grad():
        assert seeded.network(SMALL).decode(9 * randn(1, 4, 8, 8)).sample.abs().max() > 1


@pytest.mark.parametrize("config", [SMALL, SMALL_FLUX2], ids=["kl", "flux2"])
def test_config_has_diffusers_values(config: Config) -> None:
    ours, theirs = pair(config)
    known = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
    if config is SMALL_FLUX2:
        known.pop("force_upcast", None)  # which diffusers 0.37 names and never reads
    for key, value in known.items():
        for mine in (getattr(ours.config, key), ours.config[key]):
            assert mine == (tuple(value) if isinstance(value, list) else value)
    with pytest.raises(KeyError):
        ours.config["no such field"]
    with pytest.raises(AttributeError):
        _ = ours.config.no_such_field


def test_dtype_and_device() -> None:
    network = seeded.network(SMALL)
    assert (network.dtype, network.device) == (torch.float32, torch.device("cpu"))
    assert network.half().dtype == torch.float16
    assert network.to("meta").device == torch.device("meta")


@pytest.mark.parametrize(
    ("config", "latent", "result"),
    [(SMALL, 4, "latent_dist"), (seeded.tiny(), 4, "latents")],
    ids=["kl", "tiny"],
)
def test_slicing(config: Config, latent: int, result: str) -> None:
    """Images are computed one by one, with the same numbers as on their own."""
    ours, theirs = pair(config)
    x, z = randn(3, 3, 16, 24), randn(3, latent, 4, 6)

    def encoded(network: Any, batch: Tensor) -> Tensor:
        output = network.encode(batch)[result]
        return output if isinstance(output, Tensor) else output.parameters

    sizes: list[int] = []
    ours.encoder.register_forward_hook(lambda module, given, output: sizes.append(len(given[0])))
    with torch.no_grad():
        alone = torch.cat([encoded(theirs, one) for one in x.split(1)])
        images = torch.cat([theirs.decode(one).sample for one in z.split(1)])
        for network in (ours, theirs):
            network.enable_slicing()
            assert torch.equal(encoded(network, x), alone)
            assert torch.equal(network.decode(z).sample, images)
            network.disable_slicing()
        encoded(ours, x)
    assert sizes == [1, 1, 1, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n: n.encode(randn(1, 4, 16, 16)), r"\(B, 3, H, W\)"),
        (lambda n: n.encode(randn(3, 16, 16)), r"got: \(3, 16, 16\)"),
        (lambda n: n.encode(randn(1, 3, 1, 16)), "at least 2"),
        (lambda n: n.decode(randn(1, 3, 16, 16)), r"\(B, 4, H, W\)"),
    ],
)
def test_invalid_shapes(call: Callable[[nn.Module], object], message: str) -> None:
    with pytest.raises(sdconv.InputError, match=message):
        call(seeded.network(SMALL))


def test_flux2_keeps_its_batch_norm_statistics() -> None:
    ours, theirs = pair(SMALL_FLUX2)
    assert isinstance(ours.bn, nn.BatchNorm2d) and not ours.bn.training
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(ours.bn, name), getattr(theirs.bn, name))
    assert ours.bn.eps == theirs.bn.eps == 1e-4
    patches = randn(1, 128, 4, 4)
    assert torch.equal(ours.bn(patches), theirs.bn(patches))
    assert ours.bn.running_var.shape == (4 * 32,)


# --- gradients


def gradients(network: Any, result: str) -> dict[str, Tensor]:
    """Gradients of a number that depends on every output, for the inputs and all parameters."""
    latent = network.config["latent_channels"]
    x, z = randn(2, 3, 18, 22).requires_grad_(), randn(2, latent, 4, 5).requires_grad_()
    encoded = network.encode(x)[result]
    if not isinstance(encoded, Tensor):
        encoded = encoded.sample(generator())
    decoded = network.decode(z).sample
    ((encoded * randn(*encoded.shape)).sum() + (decoded * randn(*decoded.shape)).sum()).backward()
    network_gradients = {n: p.grad for n, p in network.named_parameters()}
    assert all(grad is not None for grad in network_gradients.values())
    return {"x": x.grad, "z": z.grad} | network_gradients


@pytest.mark.parametrize(
    ("config", "result"),
    [
        (seeded.SMALL_KL, "latent_dist"),
        (seeded.kl((32, 64), 16, False, layers_per_block=1), "latent_dist"),
        (SMALL_FLUX2, "latent_dist"),
        (seeded.tiny(), "latents"),
    ],
    ids=["kl", "kl without quant", "flux2", "tiny"],
)
def test_gradients_equal_bit_for_bit(config: Config, result: str) -> None:
    ours, theirs = pair(config)
    a, b = gradients(ours.train(), result), gradients(theirs.train(), result)
    assert list(a) == list(b)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []

    ours.zero_grad()
    ours.enable_gradient_checkpointing()
    assert ours.is_gradient_checkpointing
    runs: list[int] = []
    part = ours.decoder.layers[2] if result == "latents" else ours.decoder.mid_block
    part.register_forward_pre_hook(lambda *_: runs.append(1))
    again = gradients(ours, result)
    assert [name for name in a if not torch.equal(a[name], again[name])] == []
    assert len(runs) == 2  # once forward and once backward
    ours.disable_gradient_checkpointing()
    assert not ours.is_gradient_checkpointing
